"""Where rows come from: files, saved ``datasets`` folders and hub names, all as Arrow tables.

Values of a CSV stay text exactly as written ("007", "0.50", "True"). Files are read without a
cache.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from rolora.data.labels import label_name, not_a_class
from rolora.data.partition import client_ids
from rolora.data.readers import (
    COMPRESSED,
    KEPT,
    READERS,
    delimiter_hint,
    delimiters_in,
    kept,
    kind_of,
    read_file,
)
from rolora.data.text_form import PLAIN, TextForm
from rolora.errors import DataError, NotHere, nearest
from rolora.files import from_home, write_file
from rolora.network import HUB


def read_table(
    source: str,
    *,
    root: Path,
    split: str = "train",
    offline: bool = False,
    form: TextForm = PLAIN,
) -> pa.Table:
    """The rows of one source.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet file, also with .gz or .zst behind it; a
            folder or a pattern of such files, which are one set of rows; a folder written by
            ``save_to_disk``; or a hub name with a configuration and a revision, if it has them
            ("hub:nyu-mll/glue:sst2@main").
        root: the folder that relative paths start from.
        split: which split to take of a folder of several, or of a hub data set.
        offline: refuse hub names.
        form: how text files are written.

    Raises DataError, in one line, if the source is missing, malformed, or has no rows.
    """
    path = root / from_home(source)
    if source.startswith(HUB):
        from rolora.data.hub import read_hub  # importing datasets takes seconds

        table = read_hub(source, root, split, offline)
    elif is_glob(source, root=root):
        table = _joined_files(list(files_of(source, root=root)), root, form)
    elif path.is_dir() and any((path / name).is_file() for name in _SAVED):
        from rolora.data.hub import read_folder

        table = read_folder(path, source, split)
    elif path.is_dir():
        names = [str(Path(source) / name) for name in _parts(path, source, split)]
        table = _joined_files(names, root, form)
    elif kind_of(path.name):
        table = read_file(path, source, form)
    elif path.is_file():
        raise DataError(
            f"{source}: unknown file type; use one of {', '.join(READERS)}, plain or with "
            f"{' or '.join(COMPRESSED)} behind it"
        )
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


SWITCH = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
SHARD = re.compile(r"-\d{3,}-of-\d{3,}\.")  # the usual names of the parts of one set of rows
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


def _parts(folder: Path, source: str, split: str) -> list[str]:
    """The files in a folder that are one set of rows, sorted.

    Where names have a split's in them, as the hub's do ("train-00000-of-00002.parquet"), those of
    ``split``: test rows must not be trained on.
    """
    names = sorted(one.name for one in folder.iterdir() if one.is_file() and kind_of(one.name))
    splits = {name: found[1].lower() for name in names if (found := _SPLIT.search(name))}
    if splits:
        if split not in splits.values():
            hint = nearest(split, set(splits.values()))
            raise DataError(f"{source} has no files of split {split!r}: {hint}")
        if other := [name for name in names if name not in splits]:
            raise DataError(
                f"{source} holds {next(iter(splits))}, named after a split, and {other[0]}, which "
                f"is not: name the files, for example {source}/*{kind_of(other[0])}"
            )
        names = [name for name in names if splits[name] == split]
    kinds = sorted({kind_of(name) for name in names})
    if len(kinds) == 1:
        return names
    if kinds:
        raise DataError(f"{source} holds files of several kinds ({', '.join(kinds)}): name one")
    raise NotHere(
        f"{source} is a folder without rows: it holds neither {', '.join(READERS)} files, nor what "
        "datasets' save_to_disk writes",
        source,
        folder,
    )


def splits_of(source: str, *, root: Path) -> list[str]:
    """The splits that a source has; none if it is one set of rows, or does not tell."""
    path = root / from_home(source)
    if (path / _SAVED[0]).is_file():
        return list(map(str, json.loads((path / _SAVED[0]).read_text()).get("splits", [])))
    if path.is_dir():
        names = [one.name for one in path.iterdir() if one.is_file() and kind_of(one.name)]
        found = [_SPLIT.search(name) for name in names]
        return sorted({match[1].lower() for match in found if match})
    if path.exists() or is_glob(source, root=root):
        return []
    from rolora.data.hub import hub_splits

    return hub_splits(source)


def per_client(folder: str, *, root: Path) -> str | None:
    """The pattern of a folder's files, or folders, if each seems to be of one client.

    Files are, if there are several of one kind and neither split nor numbered part is in a name;
    without files, folders of rows are.
    """
    path = root / from_home(folder)
    if not path.is_dir() or any((path / name).is_file() for name in _SAVED):
        return None
    inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
    names = [one.name for one in inside if one.is_file() and kind_of(one.name)]
    ends = {name.removeprefix(_stem(name)) for name in names}
    if not names:
        own = [one for one in inside if one.is_dir()]
        held = [[file for file in one.iterdir() if kind_of(file.name)] for one in own]
        return f"{glob.escape(folder.rstrip('/'))}/*/" if len(own) > 1 and all(held) else None
    if len(names) < 2 or len(ends) > 1 or any(_SPLIT.search(n) or SHARD.search(n) for n in names):
        return None
    return f"{glob.escape(folder.rstrip('/'))}/*{ends.pop()}"


def _joined_files(names: Sequence[str], root: Path, form: TextForm) -> pa.Table:
    return stacked({name: read_table(name, root=root, form=form) for name in names})


def stacked(parts: Mapping[str, pa.Table], needed: Sequence[str] = ()) -> pa.Table:
    """The rows of several tables, one below the other, in the columns that all of them have.

    A column of different types keeps each row's own value. ``parts`` are named as in messages.
    Raises DataError naming the table that lacks one of the columns ``needed``; without any, all
    tables need the same columns.
    """
    if needed:
        for name, table in parts.items():
            require_columns(table, needed, name)
    else:
        columns = {name: sorted(table.column_names) for name, table in parts.items()}
        usual = Counter(map(tuple, columns.values())).most_common(1)[0][0]
        for name, own in columns.items():
            if tuple(own) != usual:
                raise DataError(
                    f"{name} has columns {', '.join(own)}, but most files have "
                    f"{', '.join(usual)}: all need the same columns"
                )
    first, *others = parts.values()
    common = [name for name in first.column_names if all(name in t.column_names for t in others)]
    return pa.table({name: _one_below_the_other(parts, name) for name in common})


def _one_below_the_other(parts: Mapping[str, pa.Table], column: str) -> pa.ChunkedArray:
    each = [pa.table({column: decoded(table[column])}) for table in parts.values()]
    kinds = {part.schema.field(0).type for part in each} - {pa.null()}
    if len(kinds) < 2 or all(map(is_number, kinds)) or all(map(is_text, kinds)):
        try:
            return pa.concat_tables(each, promote_options="permissive")[column]
        except pa.ArrowException:  # numbers of no common type
            pass
    values = (value for table in parts.values() for value in cells(table, column))
    return pa.chunked_array([kept(values)])


def with_texts(table: pa.Table, columns: Mapping[str, Sequence[str]]) -> pa.Table:
    """The table with these columns of text in place of its own of the same names."""
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, pa.string()))
    return table


def write_table(table: pa.Table, path: Path) -> None:
    """The rows as a Parquet file, with their types, whole or not at all."""
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(table, buffer)
    write_file(path, buffer.getvalue().to_pybytes())


def read_clients(
    pattern: str,
    *,
    root: Path,
    needed: Sequence[str] = (),
    form: TextForm = PLAIN,
) -> tuple[pa.Table, list[str]]:
    """The rows of all files or folders that match ``pattern``, and the client of each row.

    A client's id is its file's stem or its folder's name; clients are sorted by id. For the columns
    see :func:`stacked`. Raises DataError if nothing matches, a file cannot be read or is empty, or
    two share a name.
    """
    stems = files_of(pattern, root=root)
    ids = client_ids(stems.values())
    names = sorted(stems, key=lambda name: ids[stems[name]])
    parts = {name: read_table(name, root=root, form=form) for name in names}
    owners = [ids[stems[name]] for name in names for _ in range(parts[name].num_rows)]
    return stacked(parts, needed), owners


def files_of(pattern: str, *, root: Path) -> dict[str, str]:
    """What matches ``pattern``, sorted: each file and its stem; without any file, each folder.

    Raises NotHere if nothing does, DataError if two share a stem.
    """
    found = sorted(glob.glob(str(from_home(pattern)), root_dir=root, recursive=True))
    stems = {name: _stem(name) for name in found if (root / name).is_file()}
    stems = stems or {name: Path(name).name for name in found if (root / name).is_dir()}
    if not stems:
        raise NotHere(f"{pattern}: no file matches ({_looked(pattern, root)})", pattern)
    stem, times = Counter(stems.values()).most_common(1)[0]
    if times > 1:
        raise DataError(f"{pattern}: {times} files are called {stem!r}: each needs its own name")
    return stems


def _stem(name: str) -> str:
    path = Path(name)
    return path.with_suffix("").stem if path.suffix.lower() in COMPRESSED else path.stem


def _looked(pattern: str, root: Path) -> str:
    """Where a pattern was looked for, and what is there instead."""
    parts = from_home(pattern).parts
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    folder = (root / Path(*parts[:fixed])).resolve()
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    brackets = ""
    if "[" in pattern and not set("*?") & set(pattern):
        brackets = "; brackets stand for one of the characters in them"
    return f"{folder} holds {listed or 'nothing'}{brackets}"


def is_glob(source: str, *, root: Path) -> bool:
    """Whether ``source`` is a pattern of files rather than one source.

    A name of an existing file or folder is not a pattern, even with brackets.
    """
    return glob.has_magic(source) and not (root / from_home(source)).exists()


def require_columns(table: pa.Table, columns: Sequence[str], source: str) -> None:
    """Raise DataError naming the first of ``columns`` that the table lacks."""
    for column in columns:
        if column not in table.column_names:
            hint = nearest(column, table.column_names)
            known = "" if hint.startswith("known") else f" known: {', '.join(table.column_names)}"
            marks = delimiters_in(table.column_names[0]) if len(table.column_names) == 1 else []
            if marks:
                known += f"; {delimiter_hint(marks[0])}"
            raise DataError(f"{source} has no column {column!r}: {hint}{known}")


def cells(table: pa.Table, column: str) -> list[Any]:
    """A column's values, each exactly as its row has it, with lists and dicts for nested ones.

    A Parquet file or ``datasets`` cannot tell a key that a row lacks from one that is null, since
    all rows' objects share their keys there: null is taken for lacking, at every depth.
    """
    values = table[column]
    if values.type == KEPT:
        return [None if text is None else json.loads(text) for text in values.to_pylist()]
    found = list(decoded(values).to_pylist(maps_as_pydicts="lossy"))
    return [_without_nulls(value) for value in found] if pa.types.is_nested(values.type) else found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(own) for key, own in value.items() if own is not None}
    if isinstance(value, list):
        return [_without_nulls(own) for own in value]
    return value


def texts(table: pa.Table, column: str, source: str) -> list[str]:
    """A column as text, numbers written out; empty text is allowed.

    Raises DataError for a missing value (rows count from 1, a header not counted) and for lists or
    objects.
    """
    require_columns(table, [column], source)
    values = decoded(table[column])
    _require_all(values.is_null(nan_is_null=True), column, source)
    if values.type == KEPT:
        return [
            _text(value, f"{source}: column {column!r} holds {{}} in row {row}, not text")
            for row, value in enumerate(cells(table, column), start=1)
        ]
    try:
        return list(values.cast(pa.string()).to_pylist())
    except pa.ArrowException as error:
        raise DataError(f"{source}: column {column!r} holds {values.type}, not text") from error


def blank_rows(table: pa.Table, columns: str | Sequence[str], source: str) -> int:
    """How many rows have no text in any of these columns; 0 without columns."""
    names = [columns] if isinstance(columns, str) else columns
    rows = zip(*(texts(table, name, source) for name in names), strict=True)
    return sum(not "".join(row).strip() for row in rows)


def prompts(
    table: pa.Table, columns: str | Sequence[str], separator: str | None, source: str
) -> list[str]:
    """The text in front of an answer: one column, or two with ``separator`` between them.

    If it is left out, two columns are separated by a line break, and the prompt and the answer by
    nothing; if it is given, it separates both. A part that is empty in a row, such as
    Alpaca's ``input``, is left out with its separator.
    """
    columns = [columns] if isinstance(columns, str) else columns
    between, behind = ("\n", "") if separator is None else (separator, separator)
    each = [texts(table, column, source) for column in columns]
    joined = (between.join(filter(None, parts)) for parts in zip(*each, strict=True))
    return [text + behind if text else "" for text in joined]


def _text(value: object, otherwise: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        raise DataError(otherwise.format("a list" if isinstance(value, list) else "an object"))
    return label_name(value) or json.dumps(value)


def labels(table: pa.Table, column: str, source: str) -> list[str]:
    """A column of class labels as text.

    Text is taken exactly as written, so "001" is not "1". Of a typed column, 2 and 2.0 are both
    "2", and booleans "True" and "False". Raises DataError for a missing or empty label, a number
    that is not whole, and any other type.
    """
    require_columns(table, [column], source)
    values = decoded(table[column])
    kind = values.type
    if not (is_text(kind) or is_number(kind) or pa.types.is_boolean(kind) or kind == KEPT):
        raise DataError(f"{source}: column {column!r} holds {kind}, not labels")
    missing = pc.equal(values, "") if is_text(kind) else values.is_null(nan_is_null=True)
    _require_all(pc.fill_null(missing, True), column, source)
    found = []
    for row, value in enumerate(cells(table, column), start=1):
        name = label_name(value)
        if name is None:
            if isinstance(value, list | dict):
                raise DataError(
                    f"{source}: label {column!r} is a list or an object in row {row}: a label is "
                    "one name"
                )
            raise not_a_class(source, f"label {column!r} is {value} in row {row}")
        found.append(name)
    return found


def label_sets(
    table: pa.Table, column: str | Sequence[str], separator: str | None, source: str
) -> list[list[str]]:
    """The classes of each row, each once; a row may have any number of them.

    ``column`` holds lists of names, also as JSON text, or text with ``separator`` between names; or
    it lists columns of 0 and 1, which are called like their classes. Raises DataError for anything
    else, and for a missing value; an empty list or text is a row without a class.
    """
    if not isinstance(column, str):
        return _switched_on(table, column, source)
    require_columns(table, [column], source)
    _require_all(decoded(table[column]).is_null(), column, source)
    found = []
    for row, value in enumerate(cells(table, column), start=1):
        names = _split(value, separator) if isinstance(value, str) else value
        each = [label_name(name) for name in names] if isinstance(names, list) else [None]
        if None in each:
            raise DataError(
                f"{source}: label {column!r} is not a list of names in row {row}; for names in a "
                "text, set data.separator to what separates them; for columns of 0 and 1, "
                "list them in data.label"
            )
        found.append(list(dict.fromkeys(name for name in each if name is not None)))
    return found


def _split(text: str, separator: str | None) -> Any:
    """The names in a text; None if there is no separator and the text is not JSON."""
    if separator is not None:
        return [name.strip() for name in text.split(separator) if name.strip()]
    try:
        return json.loads(text) if text else []
    except (ValueError, RecursionError):
        return None


def _switched_on(table: pa.Table, columns: Sequence[str], source: str) -> list[list[str]]:
    """Those of ``columns`` that are 1, or true, in each row; DataError unless all are 0 or 1."""
    found: list[list[str]] = [[] for _ in range(table.num_rows)]
    for column in columns:
        for row, on in enumerate(switches(table, column, source)):
            if on:
                found[row].append(column)
    return found


def switches(table: pa.Table, column: str, source: str) -> list[bool]:
    """A column of 0 and 1, or false and true, in whatever form. DataError for anything else."""
    found = []
    for row, text in enumerate(texts(table, column, source), start=1):
        value = SWITCH.get(text.lower())
        if value is None:
            raise DataError(
                f"{source}: column {column!r} is {text!r} in row {row}; this column of data.label "
                "holds 0 or 1, or false or true"
            )
        found.append(value)
    return found


def numbers(table: pa.Table, column: str, source: str) -> list[float]:
    """A column of finite numbers, also as text. Raises DataError for anything else."""
    found = []
    for row, text in enumerate(texts(table, column, source), start=1):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{source}: column {column!r} is {text!r} in row {row}, not a number")
        found.append(value)
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
