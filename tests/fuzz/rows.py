"""Files of rows: CSV, JSON and Parquet, plain or compressed."""

from __future__ import annotations

import csv
import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from fuzz import folder
from rolora.data.readers import guess_form, read_file
from rolora.data.tables import cells
from rolora.data.text_form import PLAIN
from rolora.errors import DataError

NAMES = (*("a.csv", "a.jsonl", "a.parquet", "a.tsv", "a.json", "a.csv.gz", "a.jsonl.zst", "a.csv"),)
_csv = b'text,label\n"a, ""good"" film\nof 2001",good\n\xc3\xa9t\xc3\xa9,bad\n'
_json = (
    b'{"text": "a good film", "label": "good", "n": 1, "tags": ["a", {"b": null}]}\n'
    b'{"text": "\\u00e9t\\u00e9", "label": null, "n": 2.5, "tags": []}\n'
)
_array = b'{"data": [{"text": "a", "n": 12345678901234567890}, {"text": "b", "x": {"y": [1]}}]}'


def _parquet(**columns: Any) -> bytes:
    about = {"info": {"features": {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def _zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


SEEDS = [
    b"\x00" + _csv,
    b"\x01" + _json,
    b"\x02" + _parquet(text=["a", None, "b"], label=pa.array([0, 1, -1]), n=[[1], [2, 3], []]),
    b"\x02" + _parquet(text=pa.array(["a", "a", "b"]).dictionary_encode(), day=[1.5, None, 2]),
    b"\x03" + _csv.replace(b",", b"\t"),
    b"\x04" + b"[" + _json.replace(b"}\n{", b"},{") + b"]",
    b"\x04" + _array,
    b"\x05" + gzip.compress(_csv, mtime=0),
    b"\x06" + _zst(_json),
    b"\x07" + _csv.decode().encode("utf-16"),
]
_folder = folder()


def target(data: bytes) -> None:
    """The first byte says the kind of the file that the rest is."""
    if not data:
        return
    name = NAMES[data[0] % len(NAMES)]
    file = _folder / name
    file.write_bytes(data[1:])
    form = (
        guess_form(file) if data[0] & 128 or (name == "a.csv" and data[0] % len(NAMES)) else PLAIN
    )
    try:
        table = read_file(file, name, form)
    except DataError:
        return
    assert all(len(column) == table.num_rows for column in table.columns)
    table.validate(full=True)
    if name == "a.csv" and form == PLAIN:
        _as_csv(data[1:], table)
    if name == "a.jsonl" and form == PLAIN:
        _as_json(data[1:], table)


def _as_csv(data: bytes, table: pa.Table) -> None:
    """Every value is the text that Python's reader has."""
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    header, *rows = [row for row in csv.reader(text, strict=True) if row]
    assert table.column_names == header
    assert [list(row) for row in zip(*(c.to_pylist() for c in table.columns), strict=True)] == rows


def _as_json(data: bytes, table: pa.Table) -> None:
    """Every cell is the value that Python's parser has, where each line is a row."""
    text = data.decode("utf-8-sig")
    try:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError:  # one array, over several lines
        return
    if len(rows) == 1 and (isinstance(rows[0], list) or isinstance(rows[0].get("data"), list)):
        return
    assert len(rows) == table.num_rows
    for name in table.column_names:
        for row, cell in zip(rows, cells(table, name), strict=True):
            value = row.get(name)
            assert cell == value or json.dumps(cell) == json.dumps(value), (name, value, cell)
