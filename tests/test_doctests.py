"""The examples in docstrings run and print what they say, and none is skipped."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
from test_structure import FILES

EXAMPLES = [name for name, file in FILES.items() if ">>> " in file.read_text()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_module_print_what_they_say(name: str) -> None:
    found = doctest.testmod(import_module(f"rolora.{name}".removesuffix(".__init__")))
    assert found.attempted > 0
    assert found.failed == 0
    assert "doctest: +SKIP" not in FILES[name].read_text()
