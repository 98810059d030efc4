"""Whatever bytes another party wrote, a reader refuses them in its own words or reads them whole.

The targets and their checks are in ``tests/fuzz``; these are a few hundred inputs of each, the same
every time. Longer runs: ``make fuzz``.
"""

from __future__ import annotations

import random

import pytest
from fuzz import TARGETS, crashes, load
from fuzz.changes import changed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEWER = {"question": 100}  # a site that trains


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_read(name: str) -> None:
    target, seeds = load(name)
    assert len(seeds) > 1
    for seed in seeds:
        target(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_that_once_went_wrong_is_refused_or_read(name: str) -> None:
    target, _ = load(name)
    for file in crashes(name):
        target(file.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_arbitrary_and_changed_bytes_are_refused_or_read(name: str) -> None:
    target, seeds = load(name)
    numbers = st.integers(0, 2**32).map(lambda number: changed(seeds, random.Random(number)))

    @settings(
        max_examples=FEWER.get(name, 400),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=300) | numbers | numbers | numbers)
    def tried(data: bytes) -> None:
        target(data)

    tried()
