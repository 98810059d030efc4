"""Whatever a file holds: its rows come back as they were written, or one line says why not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rolora.data.tables import cells, read_table
from rolora.data.text_form import PLAIN, TextForm
from rolora.errors import DataError
from rolora.tasks.chats import read_chats

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TRICKY = st.text(st.sampled_from('a1,;\t"\n\r\\ \ufeff\u2028\x00é'), max_size=8)
VALUES = st.one_of(
    TEXT, TRICKY, st.sampled_from(["NA", "null", "2020-01-01", "1.0", "007", "True"])
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    VALUES,
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(VALUES, inner, max_size=3)
)
MARKS = st.sampled_from([None, ";", "\t", "|"])
FORMS = st.builds(TextForm, MARKS, st.sampled_from(["utf-8", "utf-16"]))
ROWS = st.lists(st.dictionaries(VALUES, JSON, min_size=1, max_size=4), min_size=1, max_size=4)
PIECES = ('{"a": 1}', '{"a": ', "[", "]", "{", "}", "\n", "\r\n", '"', ",", "1", "NaN", " ")
BROKEN = st.lists(st.sampled_from(PIECES), max_size=8).map("".join).map(str.encode)


def rows(table: pa.Table) -> list[dict[str, Any]]:
    columns = {name: cells(table, name) for name in table.column_names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def read(name: str, content: bytes, form: TextForm = PLAIN) -> list[dict[str, Any]] | str:
    """The rows of a file with this content, or the line that refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        try:
            return rows(read_table(name, root=Path(folder), form=form))
        except DataError as error:
            refused = str(error)
    assert "\n" not in refused
    return refused


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    head = draw(st.lists(VALUES, min_size=1, max_size=4, unique=True))
    line = st.lists(VALUES, min_size=len(head), max_size=len(head))
    return head, draw(st.lists(line, min_size=1, max_size=4))


@given(grids(), FORMS, st.sampled_from(["\n", "\r\n"]), st.booleans())
@settings(max_examples=150)
def test_a_csv_s_values_come_back_as_written(
    grid: tuple[list[str], list[list[str]]], form: TextForm, ending: str, quoted: bool
) -> None:
    head, body = grid
    file = io.StringIO(newline="")
    assume(not head[0].startswith("\ufeff"))  # a byte order mark
    # Python's writer leaves a lone carriage return without quotes where lines end in a newline
    how: Any = csv.QUOTE_ALL if quoted or ending == "\n" else csv.QUOTE_MINIMAL
    mark = form.delimiter or ","
    writer = csv.writer(file, delimiter=mark, lineterminator=ending, quoting=how)
    writer.writerows([head, *body])
    found = read("a.csv", file.getvalue().encode(form.encoding), form)
    assert found == [dict(zip(head, row, strict=True)) for row in body]


@given(st.binary(max_size=60) | TRICKY.map(str.encode), st.sampled_from(["a.csv", "a.tsv"]))
@example(b'"\n"\r', "a.csv")  # a column whose name is a line break, and no rows
@settings(max_examples=300)
def test_any_bytes_are_a_csv_s_rows_or_refused(content: bytes, name: str) -> None:
    """The oracle is Python's own reader, where it is strict."""
    found = read(name, content)
    if isinstance(found, str):
        return
    text = io.StringIO(content.decode("utf-8-sig"), newline="")
    mark = "\t" if name == "a.tsv" else ","
    head, *body = [row for row in csv.reader(text, delimiter=mark, strict=True) if row]
    assert found == [dict(zip(head, row, strict=True)) for row in body]


@given(ROWS, st.sampled_from(["lines", "array", "data"]))
@settings(max_examples=150)
def test_json_rows_come_back_as_written(written: list[dict[str, Any]], form: str) -> None:
    """A row that lacks a column has None in it: a table has the same columns in every row."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    whole = {"array": json.dumps(written), "data": json.dumps({"data": written})}
    found = read("a.jsonl", whole.get(form, lines).encode())
    if form == "lines" and len(written) == 1 and isinstance(written[0].get("data"), list):
        return
    assert not isinstance(found, str), found
    assert len(found) == len(written)
    for got, row in zip(found, written, strict=True):
        assert same({name: value for name, value in got.items() if name in row}, row)
        assert not any(value is not None for name, value in got.items() if name not in row)


def same(a: object, b: object) -> bool:
    """Equality to the last bit; whole numbers among a column's fractions are written as floats."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return a == b and isinstance(a, str) == isinstance(b, str)


@given(BROKEN | st.binary(max_size=40))
@settings(max_examples=300)
def test_any_bytes_are_rows_of_json_or_refused(content: bytes) -> None:
    found = read("a.jsonl", content)
    assert isinstance(found, str) or all(isinstance(row, dict) for row in found)
    found = read("a.parquet", content)
    assert isinstance(found, str)


def test_a_chat_s_tool_calls_reach_its_template_as_their_file_has_them(tmp_path: Path) -> None:
    """One row's arguments are not the other's, and a date among them is the text it was."""
    chats = [
        [
            {"role": "user", "content": "Now?"},
            {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]},
        ]
        for name, arguments in (("weather", {"day": "2020-01-01"}), ("add", {"a": 1, "b": None}))
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read_chats(read_table("a.jsonl", root=tmp_path), "messages", None, "a.jsonl")
    assert [list(chat.turns) for chat in found] == chats


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_a_compressed_file_of_nothing_is_empty(name: str) -> None:
    assert read(name, gzip.compress(b"")) == f"{name} is empty"
