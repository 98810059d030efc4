"""The table of the methods says what the methods do, for people and for programs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from rolora.algorithm.adapter import Roles
from rolora.algorithm.method import Method
from rolora.cli import main as cli
from rolora.cli import printing
from rolora.methods import METHODS, get_method, method_names
from rolora.plan import method_table
from rolora.plan.method_table import MethodRow, describe_methods, travels

HEAD: Roles = frozenset({"head"})
PAPERS = {
    "centralized": "arXiv:2106.09685",
    "fed_sb": "arXiv:2502.15436",
    "fedex_lora": "arXiv:2410.09432",
    "fedit": "arXiv:2305.05644",
    "fedmomentum": "arXiv:2603.08014",
    "fedrot_lora": "arXiv:2602.23638",
    "fedsa_lora": "arXiv:2410.01463",
    "fedsvd": "arXiv:2505.12805",
    "ffa_lora": "arXiv:2403.12313",
    "flexlora": "arXiv:2402.11505",
    "flora": "arXiv:2409.05976",
    "hetlora": "arXiv:2401.06432",
    "la_lora": "arXiv:2602.19926",
    "local": "arXiv:1602.05629",
    "lora_a2": "arXiv:2410.22815",
    "lora_fair": "arXiv:2411.14961",
    "ravan": "arXiv:2506.05568",
    "rolora": "arXiv:2502.01755",
}
A, B, AB, CORE = ("A", "A"), ("B", "B"), ("A+B", "A+B"), ("core", "core")
TURNS, DELTA, NOTHING = ("B", "A"), ("A+B+delta", "A+B+delta"), ("nothing", "nothing")
Rounds = tuple[str, str]
# trains, up, down, keeps, exact, ranks, secure, averaged
ROWS: dict[str, tuple[Rounds, Rounds, Rounds, str, bool | None, bool, bool, bool]] = {
    "centralized": (AB, NOTHING, NOTHING, "nothing", None, False, True, False),
    "fed_sb": (CORE, CORE, CORE, "nothing", True, False, True, True),
    "fedex_lora": (AB, AB, DELTA, "nothing", True, False, False, False),
    "fedit": (AB, AB, AB, "nothing", False, False, True, True),
    "fedmomentum": (AB, AB, DELTA, "nothing", False, False, False, False),
    "fedrot_lora": (AB, AB, AB, "nothing", False, False, True, True),
    "fedsa_lora": (AB, A, A, "B", None, False, True, True),
    "fedsvd": (B, B, AB, "nothing", True, False, True, False),
    "ffa_lora": (B, B, B, "nothing", True, False, True, True),
    "flexlora": (AB, AB, AB, "nothing", False, True, False, False),
    "flora": (AB, AB, DELTA, "nothing", True, True, False, False),
    "hetlora": (AB, AB, AB, "nothing", False, True, False, False),
    "la_lora": (AB, AB, AB, "nothing", False, False, True, True),
    "local": (AB, NOTHING, NOTHING, "A+B", None, False, True, False),
    "lora_a2": (TURNS, TURNS, TURNS, "nothing", True, True, True, True),
    "lora_fair": (AB, AB, AB, "nothing", False, False, False, False),
    "ravan": (CORE, CORE, CORE, "nothing", True, False, True, True),
    "rolora": (TURNS, TURNS, TURNS, "nothing", True, False, True, True),
}


def row_of(name: str) -> MethodRow:
    (row,) = (row for row in describe_methods() if row.name == name)
    return row


def test_there_is_one_row_for_every_method_and_it_cites_its_paper() -> None:
    assert {row.name: row.paper for row in describe_methods()} == PAPERS
    assert [row.name for row in describe_methods()] == method_names()


@pytest.mark.parametrize("name", ROWS)
def test_the_row_of_a_known_method_is_this_one(name: str) -> None:
    row = row_of(name)
    assert dataclasses.astuple(row)[1:9] == ROWS[name]
    assert "arXiv" not in row.summary
    assert row.summary


@pytest.mark.parametrize("name", method_names())
def test_the_row_of_a_method_says_what_the_method_does(name: str) -> None:
    method, row = get_method(name), row_of(name)

    def roles(text: str) -> set[str]:
        return set() if text == "nothing" else set(text.split("+"))

    for index, round in enumerate((1, 2)):
        assert roles(row.trains[index]) == method.trained(round) - HEAD
        assert roles(row.up[index]) == (set() if method.pooled else method.shared(round) - HEAD)
    assert roles(row.keeps) == method.personal(1) - HEAD
    options = inspect.signature(METHODS.factory(name)).parameters
    assert row.options == tuple(f"{key}={one.default!r}" for key, one in options.items())


def test_the_bytes_that_travel_are_those_of_the_papers_where_they_state_them() -> None:
    out, width, rank = 12, 10, 4

    def per_round(name: str) -> tuple[list[int], list[int]]:
        rounds = travels(get_method(name), out, width, rank)
        up = [one.bytes_up // 4 for one in rounds]
        return up[:2], [one.bytes_down // 4 for one in rounds[1:]]

    factor_b, factor_a = rank * out, rank * width
    both, whole = factor_a + factor_b, out * width
    assert per_round("rolora") == ([factor_b, factor_a], [factor_b, factor_a])
    assert per_round("ffa_lora") == ([factor_b] * 2, [factor_b] * 2)
    assert per_round("fedit") == ([both] * 2, [both] * 2)
    assert per_round("fedsvd") == ([factor_b] * 2, [both] * 2)
    assert per_round("fedex_lora") == ([both] * 2, [both + whole] * 2)
    assert per_round("fedsa_lora") == ([factor_a] * 2, [factor_a] * 2)
    assert per_round("fed_sb") == ([rank**2] * 2, [rank**2] * 2)
    assert per_round("ravan") == ([rank**2 // 2 + 2] * 2, [rank**2 // 2 + 2] * 2)
    assert per_round("local") == per_round("centralized") == ([0, 0], [0, 0])
    half = (rank // 2) * out * 4 + 1  # and a bit for each of the four pieces
    assert travels(get_method("lora_a2"), out, width, rank)[0].bytes_up == half


def test_a_client_that_comes_for_the_first_time_is_sent_all_that_there_is() -> None:
    for name in method_names():
        first, second, _ = travels(get_method(name), 6, 5, 2)
        if not get_method(name).pooled:
            assert first.down >= second.down | {"A", "B"}


def printed(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    console = Console(width=width, highlight=False, soft_wrap=True, no_color=True)
    monkeypatch.setattr(printing, "out_console", console)
    with console.capture() as captured:
        printing.print_methods(describe_methods())
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_a_terminal_and_cuts_no_word(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    lines = printed(monkeypatch, width)
    assert max(len(text.rstrip()) for text in lines) <= width
    table = "\n".join(lines[: lines.index("")])
    words = set(table.replace(",", " ").split())
    assert "…" not in table
    for row in describe_methods():
        assert {row.name, row.paper.removeprefix("arXiv:")} <= words
        assert {option.partition("=")[0] for option in row.options} <= words


def test_the_table_has_the_facts_of_a_row_in_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {text.split()[0]: text for text in printed(monkeypatch, 140) if text}
    for name, facts in {
        "rolora": "B, A B, A B, A – yes no yes first, b_rounds, alternate, orthogonal_a 2502.01755",
        "fedex_lora": "A+B A+B A+B+Δ – yes no no 2410.09432",
        "fedsa_lora": "A+B A A B – no yes 2410.01463",
        "hetlora": "A+B A+B A+B – no yes no gamma, decay 2401.06432",
        "local": "A+B – – A+B – – – 1602.05629",
    }.items():
        assert " ".join(lines[name].split()) == f"{name} {facts}"


def test_json_has_every_field_of_every_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rolora.cli.main.signal.signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["rolora", "methods", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    rows = json.loads(capsys.readouterr().out)
    assert not ended.value.code
    assert len(rows) == len(method_names()) >= 18
    fields = {field.name for field in dataclasses.fields(MethodRow)}
    for row, told in zip(describe_methods(), rows, strict=True):
        assert told.keys() == fields
        assert told == json.loads(json.dumps(dataclasses.asdict(row)))


def test_a_method_that_is_dropped_in_gets_a_row_of_what_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def swapped(name: str) -> Method:
        moving: Roles = frozenset({"A"})
        return Method(name=name, trainable=lambda round, step: moving, shared=lambda round: moving)

    make: Callable[..., Method] = swapped
    monkeypatch.setattr(method_table, "get_method", make)
    row = row_of("ffa_lora")
    assert (row.trains, row.up, row.down) == (A, A, A)


def test_travelling_parts_leave_no_trace_in_torch_s_own_generator() -> None:
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    describe_methods()
    assert torch.equal(torch.rand(1), first)
