"""``rolora init`` on rows as people have them: the right task and labels, or one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from proposals import write_template

from rolora.data import tables
from rolora.errors import RoloraError

LINES = [f"a text that is long {n},{'yes' if n % 2 else 'no'}" for n in range(40)]
RIGHT_TO_LEFT = [f"שלום עולם {n} 👩‍👩‍👧 مرحبا,{'نعم' if n % 2 else 'לא'}" for n in range(40)]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TURN = {"from": "human", "value": "hi"}
YES_NO, NUMBERS, THREE = ["no", "yes"], ["0", "1"], ["0", "1", "2"]


def sheet(lines: list[str], head: str = "text,label", end: str = "\n") -> str:
    return end.join([head, *lines]) + end


def objects(answer: Callable[[int], Any], key: str = "label") -> list[dict[str, Any]]:
    return [{"text": f"a text {n}", key: answer(n)} for n in range(40)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def sixth(other: object, usual: Callable[[int], Any] = lambda n: n % 2) -> Callable[[int], Any]:
    """A column of which only row 6 has ``other``."""
    return lambda n: other if n == 5 else usual(n)


ALONE = [f"a text {n}" for n in range(40)]
LETTERED = {"question": "q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
SEMICOLONS = [line.replace(",", ";") for line in LINES]
QUOTED = [f'"two\nlines, {n}",{"yes" if n % 2 else "no"}' for n in range(40)]
NO_LABEL = [*LINES[:5], "a text,", *LINES[6:]]
BLANK = [line for each in LINES for line in (each, "")]

READ: dict[str, tuple[str, bytes, str, list[str]]] = {
    "UTF-16": ("a.csv", sheet(LINES).encode("utf-16"), "classification", YES_NO),
    "UTF-16 unmarked": ("a.csv", sheet(LINES).encode("utf-16-le"), "classification", YES_NO),
    "UTF-16 the other way": ("a.csv", sheet(LINES).encode("utf-16-be"), "classification", YES_NO),
    "latin-1": ("a.csv", sheet(LINES, "tëxt,label").encode("latin-1"), "classification", YES_NO),
    "byte order mark": ("a.csv", sheet(LINES).encode("utf-8-sig"), "classification", YES_NO),
    "semicolons": ("a.csv", sheet(SEMICOLONS, "text;label").encode(), "classification", YES_NO),
    "quoted line breaks": ("a.csv", sheet(QUOTED).encode(), "classification", YES_NO),
    "Windows's lines": ("a.csv", sheet(LINES, end="\r\n").encode(), "classification", YES_NO),
    "old Mac's lines": ("a.csv", sheet(LINES, end="\r").encode(), "classification", YES_NO),
    "empty lines": ("a.csv", sheet(BLANK).encode(), "classification", YES_NO),
    "right to left": ("a.csv", sheet(RIGHT_TO_LEFT).encode(), "classification", ["לא", "نعم"]),
    "gz": ("a.csv.gz", gzip.compress(sheet(LINES).encode()), "classification", YES_NO),
    "zst": (
        "a.csv.zst",
        pa.compress(sheet(LINES).encode(), codec="zstd", asbytes=True),
        "classification",
        YES_NO,
    ),
    "array": ("a.json", json.dumps(objects(lambda n: n % 2)).encode(), "classification", NUMBERS),
    "array in lines": (
        "a.json",
        json.dumps(objects(lambda n: n % 2), indent=1).encode(),
        "classification",
        NUMBERS,
    ),
    "whole numbers": ("a.jsonl", lines(objects(lambda n: n % 3)), "classification", THREE),
    "floats": ("a.jsonl", lines(objects(lambda n: float(n % 3))), "classification", THREE),
    "booleans": (
        "a.jsonl",
        lines(objects(lambda n: n % 2 == 0)),
        "classification",
        ["False", "True"],
    ),
    "of several types": (
        "a.jsonl",
        lines(objects(lambda n: n % 2 if n % 3 else "x")),
        "classification",
        ["0", "1", "x"],
    ),
    "text alone": (
        "a.csv",
        sheet([f"a text {n}" for n in range(40)], "text").encode(),
        "causal_lm",
        [],
    ),
    "ShareGPT": (
        "a.json",
        json.dumps([{"conversations": [TURN, {"from": "gpt", "value": "yo"}]}] * 40).encode(),
        "causal_lm",
        [],
    ),
    "chats of TRL in two columns": (
        "a.jsonl",
        lines([{"prompt": TALK[:1], "completion": TALK[1:]}] * 40),
        "causal_lm",
        [],
    ),
    "choices with letters": (
        "a.jsonl",
        lines([{**LETTERED, "answerKey": "AB"[n % 2]} for n in range(40)]),
        "choice",
        [],
    ),
}

REFUSED: dict[str, tuple[str, bytes, str]] = {
    "no label in a row": (
        "a.csv",
        sheet(NO_LABEL).encode(),
        "'label' is missing in row 6 (1",
    ),
    "null": ("a.jsonl", lines(objects(sixth(None))), "'label' is missing in row 6 (1"),
    "NaN": ("a.jsonl", lines(objects(sixth(float("nan")))), "'label' is missing in row 6 (1"),
    "a list for a label": ("a.jsonl", lines(objects(sixth([1]))), "label (other)"),
    "one label": ("a.csv", sheet(LINES[:1] * 40).encode(), "has only one label ('no')"),
    "columns alike": (
        "a.csv",
        sheet([f"{line},1" for line in LINES], "text,label,label").encode(),
        "two columns are called 'label'",
    ),
    "keys alike": (
        "a.jsonl",
        b'{"label": 1, "label": 2}\n' * 9,
        "'label' appears twice",
    ),
    "nested text": (
        "a.jsonl",
        lines([{"text": {"en": f"a {n}"}, "label": n % 2} for n in range(40)]),
        "the columns are neither",
    ),
    "no roles": ("a.jsonl", lines([{"messages": [{"content": "hi"}]}] * 40), "messages (list)"),
    "a line that is cut": ("a.jsonl", lines(objects(int)) + b'\n{"text": "a', "line 41"),
    "a row that is too long": ("a.csv", sheet([*LINES, "a,b,c"]).encode(), "row 42 has 3 values"),
    "names alone": ("a.csv", b"text,label\n", "has no rows (columns: text, label)"),
    "one row": ("a.csv", sheet(LINES[:1]).encode(), "leaves no rows on one side"),
    "nothing": ("a.csv", b"", "is empty"),
    "a picture": ("a.png", b"\x89PNG", "unknown file type"),
}


@pytest.mark.parametrize("case", READ)
def test_rows_are_read_for_what_they_are(tmp_path: Path, case: str) -> None:
    name, content, task, labels = READ[case]
    (tmp_path / name).write_bytes(content)
    _, made = write_template(str(tmp_path / name), tmp_path / "a.toml", "hub:owner/name")
    assert made.kind.name == task
    assert made.rows.train.num_rows == 40
    assert made.kind.labels(made.rows.train, made.columns, name) == labels


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_read_are_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, case: str
) -> None:
    name, content, said = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RoloraError) as caught:
        write_template(str(tmp_path / name), tmp_path / "a.toml", "hub:owner/name")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.toml").exists()


def test_texts_of_any_script_come_back_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(sheet(RIGHT_TO_LEFT))
    _, made = write_template(str(tmp_path / "a.csv"), tmp_path / "a.toml", "hub:owner/name")
    found = tables.texts(made.rows.train, "text", "a.csv")
    assert found == [line.rpartition(",")[0] for line in RIGHT_TO_LEFT]


def test_a_file_without_a_line_of_names_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(LINES) + "\n")
    notes, _ = write_template(str(tmp_path / "a.csv"), tmp_path / "a.toml", "hub:owner/name")
    assert (
        "no is both a column's name and a value in it: if the file has no header row, add one"
        in notes
    )
