"""The table of the methods says what the methods do, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable

import pytest
import torch
from method_rows import ROWS
from rich.console import Console

from rolora.algorithm.adapter import Roles
from rolora.algorithm.method import Method
from rolora.cli import main as cli
from rolora.cli import tables
from rolora.methods import METHODS, get_method, method_names
from rolora.plan import method_table
from rolora.plan.dry_run import travels
from rolora.plan.method_table import MethodRow, describe_methods

HEAD: Roles = frozenset({"head"})


def row_of(name: str) -> MethodRow:
    (row,) = (row for row in describe_methods() if row.name == name)
    return row


def test_there_is_one_row_for_every_method_and_it_cites_its_paper() -> None:
    papers = {name: f"arXiv:{row.paper}" for name, row in ROWS.items()}
    assert {row.name: row.paper for row in describe_methods()} == papers
    assert [row.name for row in describe_methods()] == method_names()


@pytest.mark.parametrize("name", ROWS)
def test_the_row_of_a_known_method_is_this_one(name: str) -> None:
    row = row_of(name)
    known = dataclasses.asdict(ROWS[name])
    told = {key: value for key, value in dataclasses.asdict(row).items() if key in known}
    assert told == {**{key: known[key] for key in told}, "paper": row.paper}
    assert "arXiv" not in row.summary
    assert row.summary


@pytest.mark.parametrize("name", method_names())
def test_the_row_of_a_method_says_what_the_method_does(name: str) -> None:
    method, row = get_method(name), row_of(name)

    def roles(text: str) -> set[str]:
        return set() if text == "nothing" else set(text.split("+"))

    for index, round in enumerate((1, 2)):
        assert roles(row.trains[index]) == method.trained(round) - HEAD
        assert roles(row.up[index]) == (method.shared(round) - HEAD if method.federated else set())
    assert roles(row.keeps) == method.personal(1) - HEAD
    options = METHODS.options(name)
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
    assert per_round("fed_alora") == ([factor_b] * 2, [factor_b] * 2)
    assert per_round("fed_sb") == ([rank**2] * 2, [rank**2] * 2)
    assert per_round("ravan") == ([rank**2 // 2 + 2] * 2, [rank**2 // 2 + 2] * 2)
    assert per_round("local") == per_round("centralized") == ([0, 0], [0, 0])
    half = (rank // 2) * out * 4 + 1  # and a bit for each of the four pieces
    assert travels(get_method("lora_a2"), out, width, rank)[0].bytes_up == half


def test_a_client_that_comes_for_the_first_time_is_sent_all_that_there_is() -> None:
    for name in method_names():
        first, second, _ = travels(get_method(name), 6, 5, 2)
        if get_method(name).federated:
            assert first.down >= second.down | {"A", "B"}


def printed(width: int) -> list[str]:
    console = Console(width=width, highlight=False, soft_wrap=True, no_color=True)
    with console.capture() as captured:
        console.print(tables.methods_table(describe_methods()))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_a_terminal_and_cuts_no_word(width: int) -> None:
    lines = printed(width)
    assert max(len(text.rstrip()) for text in lines) <= width
    table = "\n".join(lines[: lines.index("")])
    words = set(table.replace(",", " ").split())
    assert "…" not in table
    for row in describe_methods():
        assert {row.name, row.paper.removeprefix("arXiv:")} <= words
        assert {option.partition("=")[0] for option in row.options} <= words


def test_the_table_has_the_facts_of_a_row_in_its_line() -> None:
    lines = {text.split()[0]: text for text in printed(140) if text}
    for name, facts in {
        "rolora": "B, A B, A B, A – yes no yes first, b_rounds, orthogonal_a, turn, scaled "
        "2502.01755",
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
    assert row.trains == row.up == row.down == ("A", "A")


def test_travelling_parts_leave_no_trace_in_torch_s_own_generator() -> None:
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    describe_methods()
    assert torch.equal(torch.rand(1), first)
