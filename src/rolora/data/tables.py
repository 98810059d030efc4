"""Where rows come from: files, saved ``datasets`` folders and hub names, all as Arrow tables.

Values of a CSV stay text exactly as written ("007", "0.50", "True"). Files are read without a
cache.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from rolora.data.labels import label_name, not_a_class
from rolora.data.partition import client_ids
from rolora.errors import DataError, NotHere, nearest, one_line
from rolora.files import write_file

# One block for most files: a row may not span two of Arrow's blocks, and row numbers in its
# messages count from the start of a block.
LARGEST_BLOCK = 1 << 30


def read_table(source: str, *, root: Path, split: str = "train", offline: bool = False) -> pa.Table:
    """The rows of one source.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet file, a folder written by ``save_to_disk``,
            or a hub name with an optional configuration ("nyu-mll/glue:sst2").
        root: the folder that relative paths start from.
        split: which split to take of a ``DatasetDict`` folder or a hub data set.
        offline: refuse hub names.

    Raises DataError, in one line, if the source is missing, malformed, or has no rows.
    """
    path = root / Path(source).expanduser()
    if path.is_dir():
        from rolora.data.hub import read_folder  # importing datasets takes seconds

        table = read_folder(path, source, split)
    elif path.suffix.lower() in READERS:
        table = _read_file(path, source)
    elif path.is_file():
        raise DataError(f"{source}: unknown file type; use one of {', '.join(READERS)}")
    else:
        from rolora.data.hub import read_hub

        table = read_hub(source, root, split, offline)
    repeated = [name for name, times in Counter(table.column_names).items() if times > 1]
    if repeated:
        raise DataError(f"{source}: two columns are called {repeated[0]!r}: rename one")
    if table.num_rows == 0:
        columns = ", ".join(table.column_names) or "none"
        raise DataError(f"{source} has no rows (columns: {columns})")
    return table


def write_table(table: pa.Table, path: Path) -> None:
    """The rows as a Parquet file, with their types, whole or not at all."""
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(table, buffer)
    write_file(path, buffer.getvalue().to_pybytes())


def read_clients(pattern: str, *, root: Path) -> dict[str, pa.Table]:
    """One table per file that matches ``pattern``, by client id (the file's stem, sorted).

    Every table has the same columns in the same order. Raises DataError if nothing matches, a file
    cannot be read or is empty, two files share a stem, or one has other columns.
    """
    stems = files_of(pattern, root=root)
    tables = {name: read_table(name, root=root) for name in stems}
    columns = {name: sorted(table.column_names) for name, table in tables.items()}
    usual = Counter(map(tuple, columns.values())).most_common(1)[0][0]
    for name, own in columns.items():
        if tuple(own) != usual:
            raise DataError(
                f"{name} has columns {', '.join(own)}, but most clients have "
                f"{', '.join(usual)}: all clients need the same columns"
            )
    ids = client_ids(stems.values())
    clients = {ids[stem]: tables[name] for name, stem in stems.items()}
    order = clients[min(clients)].column_names
    return {client: clients[client].select(order) for client in sorted(clients)}


def joined(clients: Mapping[str, pa.Table]) -> tuple[pa.Table, list[str]]:
    """The tables of :func:`read_clients` as one, and the client of each of its rows."""
    owners = [client for client, table in clients.items() for _ in range(table.num_rows)]
    return pa.concat_tables(clients.values(), promote_options="permissive"), owners


def files_of(pattern: str, *, root: Path) -> dict[str, str]:
    """The files that match ``pattern``, sorted, and the stem of each.

    Raises NotHere if none does, DataError if two share a stem.
    """
    found = sorted(glob.glob(str(Path(pattern).expanduser()), root_dir=root, recursive=True))
    stems = {name: Path(name).stem for name in found if (root / name).is_file()}
    if not stems:
        raise NotHere(f"{pattern}: no file matches (looked in {root.resolve()})", pattern)
    stem, times = Counter(stems.values()).most_common(1)[0]
    if times > 1:
        raise DataError(f"{pattern}: {times} files are called {stem!r}: each needs its own name")
    return stems


def is_glob(source: str, *, root: Path) -> bool:
    """Whether ``source`` is a pattern of per-client files rather than one source.

    A name of an existing file or folder is not a pattern, even with brackets.
    """
    return glob.has_magic(source) and not (root / Path(source).expanduser()).exists()


def require_columns(table: pa.Table, columns: Sequence[str], source: str) -> None:
    """Raise DataError naming the first of ``columns`` that the table lacks."""
    for column in columns:
        if column not in table.column_names:
            hint = nearest(column, table.column_names)
            known = "" if hint.startswith("known") else f" known: {', '.join(table.column_names)}"
            raise DataError(f"{source} has no column {column!r}: {hint}{known}")


def texts(table: pa.Table, column: str, source: str) -> list[str]:
    """A column as text, numbers written out; empty text is allowed.

    Raises DataError for a missing value (rows count from 1, a header not counted) and for columns
    of lists or structs.
    """
    require_columns(table, [column], source)
    values = decoded(table[column])
    _require_all(values.is_null(nan_is_null=True), column, source)
    try:
        return list(values.cast(pa.string()).to_pylist())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DataError(f"{source}: column {column!r} holds {values.type}, not text") from error


def labels(table: pa.Table, column: str, source: str) -> list[str]:
    """A column of class labels as text.

    Text is taken exactly as written, so "001" is not "1". Of a typed column, 2 and 2.0 are both
    "2", and booleans "True" and "False". Raises DataError for a missing or empty label, a number
    that is not whole, and any other type.
    """
    require_columns(table, [column], source)
    values = decoded(table[column])
    kind = values.type
    missing = pc.equal(values, "") if is_text(kind) else values.is_null(nan_is_null=True)
    _require_all(pc.fill_null(missing, True), column, source)
    if not (is_text(kind) or is_number(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{source}: column {column!r} holds {kind}, not labels")
    found = []
    for row, value in enumerate(values.to_pylist(), start=1):
        name = label_name(value)
        if name is None:
            raise not_a_class(source, f"label {column!r} is {value} in row {row}")
        found.append(name)
    return found


def decoded(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """A dictionary-encoded column (a pandas category) as its values; anything else as it is."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def as_numbers(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text of which every value is a number, as numbers; anything else as it is."""
    if not is_text(values.type) or values.null_count == len(values):
        return values
    for kind in (pa.int64(), pa.float64()):
        try:
            return values.cast(kind)
        except pa.ArrowInvalid:
            continue
    return values


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values of this type are integers, floats or decimals."""
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _require_all(missing: pa.ChunkedArray, column: str, source: str) -> None:
    row = pc.index(missing, True).as_py()
    if row >= 0:
        raise DataError(
            f"{source}: column {column!r} is missing in row {row + 1} "
            f"({pc.sum(missing).as_py()} of {len(missing)} rows): fill or remove it"
        )


def _read_csv(path: Path, delimiter: str = ",") -> pa.Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next((row for row in csv.reader(file, delimiter=delimiter) if row), [])
    block = min(path.stat().st_size, LARGEST_BLOCK)
    try:
        table = pyarrow.csv.read_csv(
            path,
            # Arrow counts rows for its messages only with one thread.
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=block),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in header}
            ),
        )
    except pa.ArrowInvalid as error:
        path.read_bytes().decode()  # where the encoding is at fault, this says at which byte
        raise ValueError(str(error).replace("Row #", "row ") + " (the header is row 1)") from error
    # Arrow takes an open quote as closed by the end of the file, and all rows up to there as text.
    last = table.column(-1)[-1].as_py() if table.num_rows else ""
    if "\n" in last and not path.read_bytes().rstrip().endswith(b'"'):
        raise ValueError(f"the quote opened in row {table.num_rows + 1} is never closed")
    return table


def _read_json(path: Path) -> pa.Table:
    """JSON lines, or one array of objects; dates stay text."""
    text = path.read_text("utf-8-sig")
    if text.lstrip().startswith("["):
        text = "\n".join(json.dumps(row) for row in json.loads(text))
    data = text.encode()
    block = pyarrow.json.ReadOptions(block_size=min(len(data), LARGEST_BLOCK))

    def parse(schema: pa.Schema | None) -> pa.Table:
        options = pyarrow.json.ParseOptions(explicit_schema=schema)
        return pyarrow.json.read_json(pa.BufferReader(data), block, options)

    try:
        table = parse(None)
        dates = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
        return parse(pa.schema([(name, pa.string()) for name in dates])) if dates else table
    except pa.ArrowInvalid as error:
        counted = re.sub(r"in row (\d+)", lambda row: f"in row {int(row[1]) + 1}", str(error))
        raise ValueError(_json_fault(text) or counted) from error


def _json_fault(text: str) -> str:
    """Which line is not a JSON object, and why; empty if all are."""
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            value = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"line {number}, character {error.colno}: {error.msg}"
        if not isinstance(value, dict):
            return f"line {number} is not an object {{...}}"
    return ""


READERS: Mapping[str, Callable[[Path], pa.Table]] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": lambda path: pyarrow.parquet.read_table(path, partitioning=None),
}


def _read_file(path: Path, source: str) -> pa.Table:
    if not path.is_file():
        looked = f"{source}: no such file (looked in {path.parent.resolve()})"
        raise NotHere(looked, source, path)
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty")
    try:
        return READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{source} is not UTF-8 (line {line}): save it as UTF-8") from error
    except (pa.ArrowException, csv.Error, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source} cannot be read: {one_line(error)}") from error
