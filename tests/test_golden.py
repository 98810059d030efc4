"""Claims about what methods learn: to the bit what they learned when the values were written."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.make_place(tmp_path_factory.mktemp("golden"))


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_the_adapter_of_a_case_is_the_one_it_was(name: str, place: Path, tmp_path: Path) -> None:
    good, said = golden.judge(name, golden.run(golden.CASES[name], place, tmp_path / "run"))
    assert good, said
