"""Files of rows as Arrow tables: CSV, JSON and Parquet, plain or compressed.

A reader returns each row exactly as written, or raises. Flat columns are Arrow's own types. Lists,
objects and columns of several types are kept as JSON text (``KEPT``), because Arrow's types for
them change rows: every object gets the keys of all other rows' objects, at every depth, and text
that looks like a date becomes one. :func:`rolora.data.tables.cells` gives such cells as values.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from rolora.data.text_form import PLAIN, TextForm
from rolora.errors import DataError, NotHere, one_line

KEPT = pa.json_()
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# One block for most files: a row may not span two of Arrow's blocks, and row numbers in its
# messages count from the start of a block.
LARGEST_BLOCK = 1 << 30
# Bytes that any file may unpack to; a larger one, this many times its own size. Text packs to a
# twentieth, and what packs to a thousandth is made to fill somebody's memory. As values of Python's
# parser JSON takes up to thirty times its bytes.
UNPACKED = 1 << 28
UNPACKED_TEXT = 1 << 23
UNPACKED_TIMES = 100
# Cells that any JSON may have, and that a larger one may have for each byte: rows that have no keys
# in common make a table of rows times keys.
CELLS = 1 << 22
CELLS_PER_BYTE = 4
# Objects and lists in one another: Arrow's reader of JSON ends the process at some thousands.
DEEPEST = 100


def read_csv(data: bytes, delimiter: str) -> pa.Table:
    """Every value as text, exactly as written. The first row that is not empty is the header.

    Python's reader goes over the rows first: it reports where a quote is wrong, which Arrow's does
    not. A quote that is never closed would swallow the rows up to the next one.
    """
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    count = 0
    try:
        for row in rows:
            if not row:
                continue
            count += 1
            header = header or row
            if len(row) != len(header):
                other = _other_delimiter(header, delimiter)
                raise ValueError(
                    f"row {count} has {len(row)} values, but the header (row 1) has {len(header)}"
                    f"{other}: {delimiter.join(row)[:80]}"
                )
    except csv.Error as error:
        unclosed = "unexpected end of data" in str(error)
        where = f"row {count + 1} (the header is row 1)"
        raise ValueError(
            f"the quote opened in {where} is never closed"
            if unclosed
            else f"{where}: {error}; a quote inside a quoted value is written twice"
        ) from error
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(block_size=max(min(len(data), LARGEST_BLOCK), 1)),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in header}
        ),
    )
    if table.num_rows != count - 1:
        raise ValueError(f"it reads as {count - 1} rows or as {table.num_rows}: check its quotes")
    return table


def delimiters_in(name: str) -> list[str]:
    """The usual delimiters that occur in a column's name: signs of a file read with another."""
    return [mark for mark in (";", "\t", "|", ",") if mark in name]


def _other_delimiter(header: Sequence[str], delimiter: str) -> str:
    others = [mark for mark in delimiters_in(delimiter.join(header)) if mark != delimiter]
    if len(header) > 1 or not others:
        return ""
    return f"; {delimiter_hint(others[0])}"


def delimiter_hint(mark: str) -> str:
    """What to do if ``mark`` is the file's delimiter."""
    return f"if {mark!r} separates values, set data.delimiter = {json.dumps(mark)}"


def read_json(data: bytes, delimiter: str) -> pa.Table:
    """JSON lines, one array of objects, or one object whose "data" is such an array.

    ValueError for values nested deeper than ``DEEPEST``.
    """
    if nesting(data) > DEEPEST:
        raise ValueError(f"objects and lists are nested more than {DEEPEST} deep")
    text = data.decode("utf-8-sig")
    array = _array(text)
    if array is not None:
        return _table(array, len(data))
    # Arrow crashes on a line such as null, and gives each object, at any depth, the keys of all
    irregular = re.search(r"^[^\S\n]*[^{\s]", text, re.MULTILINE)
    if irregular or len(_keys(data)) * data.count(b"{") > most_cells(len(data)):
        return _table(_lines(text, object_pairs_hook=_object), len(data))
    data = text.encode()
    block = pyarrow.json.ReadOptions(block_size=max(min(len(data), LARGEST_BLOCK), 1))
    try:
        table = pyarrow.json.read_json(pa.BufferReader(data), block)
    except pa.ArrowInvalid:  # columns of several types, numbers beyond 64 bits, or a broken line
        return _table(_lines(text, object_pairs_hook=_object), len(data))
    odd = [name for name in table.column_names if not _is_as_written(table[name])]
    if odd:
        columns = _columns(_lines(text), odd)
        for name in odd:
            table = table.set_column(table.column_names.index(name), name, columns[name])
    return table


def read_parquet(file: Path | bytes) -> pa.Table:
    """A Parquet file; classes that the ``datasets`` library wrote there by their names.

    ValueError for one that unpacks to more than ``most_unpacked``.
    """
    table = _unpacked(file)
    table.validate(full=True)  # text that is not UTF-8 would only raise where it is used
    return named_classes(usual_types(table))


def _unpacked(file: Path | bytes) -> pa.Table:
    """Its rows, read in parts for as long as these are not too large together.

    What the file says of its own size is looked at first, but a value repeated a million times
    counts once there.
    """
    size = file.stat().st_size if isinstance(file, Path) else len(file)
    most = most_unpacked(size)
    with pyarrow.parquet.ParquetFile(file if isinstance(file, Path) else io.BytesIO(file)) as parts:
        groups = [parts.metadata.row_group(i) for i in range(parts.metadata.num_row_groups)]
        sizes = [group.total_byte_size for group in groups]
        if sum(sizes) > most:
            raise _too_large(most)
        # a value is no longer than its group, and a small file may repeat it in every row
        rows = (1 << 30) // max([1, *sizes]) if size < 1 << 22 else 1 << 16
        total, read = 0, list[pa.RecordBatch]()
        for part in parts.iter_batches(batch_size=min(max(rows, 64), 1 << 16)):
            total += part.nbytes + part.num_rows  # a row of nulls has no bytes
            if total > most:
                raise _too_large(most)
            read.append(part)
        return pa.Table.from_batches(read, schema=parts.schema_arrow)


def most_unpacked(size: int, least: int = UNPACKED) -> int:
    """The bytes that a file of this size may unpack to."""
    return max(least, UNPACKED_TIMES * size)


def require_as_large(table: pa.Table, size: int) -> None:
    """ValueError for a table that is larger than what a file of this size may unpack to.

    A row counts as a byte beside its values: one of nulls has none.
    """
    if table.nbytes + table.num_rows > (most := most_unpacked(size)):
        raise _too_large(most)


def most_cells(size: int) -> int:
    """The cells that JSON of this size may have."""
    return max(CELLS, CELLS_PER_BYTE * size)


def _too_large(most: int) -> ValueError:
    return ValueError(
        f"it unpacks to more than {most / 1e6:,.0f} MB, {UNPACKED_TIMES} times its size or more: "
        "unpack it yourself, or split it, if you trust it"
    )


# One that is never closed ends with its line, so that no letter is looked at twice.
_STRINGS = re.compile(rb'"(?:[^"\\\n]++|\\.)*+"?')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"{[]}"))
_STEP = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}


_KEYS = re.compile(_STRINGS.pattern + rb"+(?!\s*:)|(" + _STRINGS.pattern + rb")")


def _keys(data: bytes) -> set[bytes]:
    """The keys of JSON, at any depth, as they are written; a part of the file at a time."""
    found: set[bytes] = set()
    for start in range(0, len(data), 1 << 24):
        found.update(_KEYS.findall(data, start, start + (1 << 24)))
    return found


def nesting(data: bytes) -> int:
    """How deep objects and lists stand in one another in JSON, which need not be valid."""
    brackets = _STRINGS.sub(b"", data).translate(None, _NOT_BRACKETS)
    return max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0)


def usual_types(table: pa.Table) -> pa.Table:
    """The same rows, with text in the one layout that all of Arrow's functions take."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):
            table = table.set_column(place, field.name, table[place].cast(pa.large_string()))
    return table


def named_classes(table: pa.Table) -> pa.Table:
    """Numbers of ``datasets``' classes as their names; -1, an unknown class, is missing."""
    try:
        about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = dict(about.get("info", {}).get("features", {}))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return table  # another program's, under the same key
    for name, feature in features.items():
        names = feature.get("names") if isinstance(feature, dict) else None
        whole = name in table.column_names and pa.types.is_integer(table.schema.field(name).type)
        if isinstance(names, list) and feature.get("_type") == "ClassLabel" and whole:
            known = {number: str(word) for number, word in enumerate(names)}
            values = [known.get(number) for number in table[name].to_pylist()]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values, pa.string()))
    return table


def kept(values: Iterable[Any]) -> pa.Array:
    """Values of any type as a column of JSON text; dates and the like as text."""
    return _kept([None if v is None else _Text(_written(v)) for v in values])


def _is_as_written(column: pa.ChunkedArray) -> bool:
    """Whether Arrow's reader of JSON has left this column's values as the file has them."""
    kind = column.type
    if pa.types.is_floating(kind):  # whole numbers among them above 2^53 have lost digits
        return not pc.any(pc.greater_equal(pc.abs(column), 2.0**53)).as_py()
    return not (pa.types.is_nested(kind) or pa.types.is_temporal(kind))


def _array(text: str) -> list[Any] | None:
    """The rows of one array, or of the array under "data" of one object; None for JSON lines."""
    start = text.lstrip()
    if start.startswith("["):
        rows = json.loads(text, object_pairs_hook=_object)
    elif start.startswith("{"):
        try:
            first, end = json.JSONDecoder(object_pairs_hook=_object).raw_decode(start)
        except ValueError:  # a broken line, which is named where lines are read
            return None
        rows = first.get("data")
        alone = re.compile(r"\s*\Z").match(start, end)
        if not alone or not isinstance(rows, list):
            return None
    else:
        return None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object {{...}}")
    if not rows:
        raise ValueError("it holds no rows")
    return list(rows)


def _lines(text: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines. ValueError naming the first line that is not one."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, **options)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, character {error.colno}: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"line {number} is not an object {{...}}")
        yield value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict. ValueError for a key that appears twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return found


def _table(rows: Iterable[dict[str, Any]], size: int) -> pa.Table:
    """The rows, from JSON of so many bytes. ValueError for too many cells."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if len(rows) * len(names) > most_cells(size):
        raise ValueError(
            f"its {len(rows):,} rows have {len(names):,} different keys, most of them in few rows: "
            "put what differs from row to row into one object"
        )
    return pa.table(_columns(rows, names))


def _columns(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, pa.Array]:
    """Columns of the rows with these names; only what is of one flat type gets that type."""
    cells: dict[str, list[Any]] = {name: [] for name in names}
    kinds: dict[str, set[type]] = {name: set() for name in names}
    for row in rows:
        for name in names:
            value = row.get(name)
            kind = type(value)
            if value is not None:
                kinds[name].add(kind)
            # containers become text at once: the objects of all rows would be many times as large
            cells[name].append(_Text(_written(value)) if kind in (list, dict) else value)
    return {name: _column(cells[name], kinds[name]) for name in names}


class _Text(str):
    """JSON text, told apart from a value that is a string."""

    __slots__ = ()


def _column(cells: Sequence[Any], kinds: set[type]) -> pa.Array:
    if kinds <= {str} or kinds <= {bool} or kinds <= {int}:
        try:
            return pa.array(cells)
        except (OverflowError, pa.ArrowInvalid):  # beyond 64 bits
            pass
    if kinds <= {int, float} and not any(abs(cell) >= 2**53 for cell in cells if cell is not None):
        return pa.array(cells, pa.float64())
    return _kept(
        [cell if cell is None or isinstance(cell, _Text) else _written(cell) for cell in cells]
    )


_written = json.JSONEncoder(ensure_ascii=False, default=str).encode


def _kept(text: Sequence[str | None]) -> pa.Array:
    return pa.ExtensionArray.from_storage(KEPT, pa.array(text, pa.string()))


Reader = Callable[[bytes, str], pa.Table]
READERS: Mapping[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": lambda data, _: read_parquet(data),
}


def kind_of(name: str) -> str:
    """A file's kind, a key of ``READERS``, by its name; empty if it has none of them."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else ""


def read_file(path: Path, source: str, form: TextForm) -> pa.Table:
    """The rows of one file, which messages call ``source``. DataError if it is broken."""
    if not path.is_file():
        looked = f"{source}: no such file (looked in {path.parent.resolve()}{neighbour(path)})"
        raise NotHere(looked, source, path)
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty")
    kind, encoding = kind_of(path.name), form.encoding
    data = b""
    try:
        if kind == ".parquet" and path.suffix.lower() == kind:
            return read_parquet(path)
        data = _contents(path)
        if not data:
            raise DataError(f"{source} is empty")
        if kind != ".parquet" and codecs.lookup(encoding).name != "utf-8":
            data, encoding = data.decode(encoding).encode(), "utf-8"
        return READERS[kind](data, form.delimiter or ("\t" if kind == ".tsv" else ","))
    except UnicodeDecodeError:
        raise DataError(f"{source} {_not_encoded(data, encoding)}") from None
    except UnicodeEncodeError:
        raise DataError(
            f"{source} has half of a surrogate pair, such as \\ud83d, which is no character"
        ) from None
    except (pa.ArrowException, csv.Error, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source} cannot be read: {one_line(error)}") from error


def _contents(path: Path) -> bytes:
    if path.suffix.lower() not in COMPRESSED:
        return path.read_bytes()
    most = most_unpacked(path.stat().st_size, UNPACKED_TEXT)
    with pa.input_stream(str(path), compression=COMPRESSED[path.suffix.lower()]) as stream:
        data = bytes(stream.read(most + 1))
    if len(data) > most:
        raise _too_large(most)
    return data


def _not_encoded(data: bytes, encoding: str) -> str:
    """Where these bytes are not text of this encoding, and what to do."""
    line = 1
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
    named = "UTF-8" if encoding == "utf-8" else encoding
    guess = guess_encoding(data)
    if guess == encoding:
        return f"is not {named} (line {line}), and no other encoding was recognised"
    return (
        f"is not {named} (line {line}): save it as UTF-8, or set data.encoding, "
        f'for example "{guess}"'
    )


def guess_encoding(data: bytes) -> str:
    """The encoding of text: UTF-8 and UTF-16 are certain, else it is what Windows calls ANSI.

    UTF-16 without a mark at its beginning is known by letters of which each second byte is 0.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    head = data[:64]
    for first, name in enumerate(("utf-16-be", "utf-16-le")):
        if len(head) > 1 and not any(head[first::2]):
            return name
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def neighbour(path: Path) -> str:
    """A hint for a path that does not exist: the nearest name there, or the missing folder."""
    folder = path.parent
    if not folder.is_dir():
        return ", a folder that does not exist"
    names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def guess_form(path: Path) -> TextForm:
    """How a text file is written.

    The delimiter is the one that cuts the first rows into equally many values, the more the better.
    """
    kind = kind_of(path.name)
    if not path.is_file() or kind in ("", ".parquet"):
        return PLAIN
    try:
        data = _contents(path)
    except (OSError, ValueError):  # said where the file is read
        return PLAIN
    encoding = guess_encoding(data)
    if kind not in (".csv", ".tsv"):
        return TextForm(None, encoding)
    head = data[: 1 << 16].decode(encoding, errors="replace").removeprefix("\ufeff")
    usual, widths = "\t" if kind == ".tsv" else ",", {}
    for mark in (usual, ",", ";", "\t", "|"):
        lines = csv.reader(io.StringIO(head, newline=""), delimiter=mark)
        rows = [len(row) for row in lines if row]
        rows = rows if len(data) <= 1 << 16 else rows[:-1]  # the last may be cut off
        widths[mark] = rows[0] if len(set(rows)) == 1 else 0
    best = max(widths, key=lambda mark: widths[mark])
    return TextForm(None if best == usual or widths[best] < 2 else best, encoding)
