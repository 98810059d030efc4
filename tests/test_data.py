"""Files as people have them are read as they are; what cannot be used is refused in one line."""

from __future__ import annotations

import json
import shutil
import time
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from rolora.data import hub
from rolora.data.columns import describe
from rolora.data.labels import class_labels, in_order
from rolora.data.readers import guess_form
from rolora.data.tables import (
    cells,
    is_glob,
    labels,
    read_clients,
    read_table,
    require_columns,
    texts,
)
from rolora.data.text_form import TextForm
from rolora.errors import ConfigError, DataError

REVIEWS = """text,label
"A ""masterpiece"", they said.
I left after ten minutes.",neg
Funny; warm; never dull,pos
"Müller's best, by far",pos
"""
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "What is the capital of Peru?"},
            {"role": "assistant", "content": "Lima."},
        ],
        "source": "quiz",
    },
    {"messages": [{"role": "user", "content": "Say\n\u2028hi"}], "source": "chat"},
]


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path.name


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows with the values that the program works with."""
    columns = {name: cells(table, name) for name in table.column_names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def refusal(root: Path, source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_table(source, root=root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_csv_keeps_quotes_commas_and_newlines_inside_values(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "reviews.csv", REVIEWS), root=tmp_path)
    assert texts(table, "text", "reviews.csv") == [
        'A "masterpiece", they said.\nI left after ten minutes.',
        "Funny; warm; never dull",
        "Müller's best, by far",
    ]
    assert labels(table, "label", "reviews.csv") == ["neg", "pos", "pos"]


def test_a_csv_may_end_in_a_value_of_several_lines(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", 'label,text\n1,"x\ny"\n')
    assert rows(read_table("a.csv", root=tmp_path)) == [{"label": "1", "text": "x\ny"}]


def test_a_byte_order_mark_is_no_part_of_the_first_column_name(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "id,text\n007,x\n", "utf-8-sig")
    write(tmp_path / "b.jsonl", json_lines(CHATS), "utf-8-sig")
    write(tmp_path / "c.json", json.dumps(CHATS), "utf-8-sig")
    assert rows(read_table("a.csv", root=tmp_path)) == [{"id": "007", "text": "x"}]
    assert rows(read_table("b.jsonl", root=tmp_path)) == CHATS
    assert rows(read_table("c.json", root=tmp_path)) == CHATS


def test_csv_text_that_looks_like_a_number_date_or_null_stays_as_written(tmp_path: Path) -> None:
    written = {"a": "007", "b": "0.50", "c": "2020-01-01", "d": "True", "e": "NA", "f": ""}
    write(tmp_path / "a.csv", ",".join(written) + "\n" + ",".join(written.values()) + "\n")
    table = read_table("a.csv", root=tmp_path)
    assert {name: texts(table, name, "a.csv")[0] for name in written} == written


def test_a_row_of_many_megabytes_is_read_whole(tmp_path: Path) -> None:
    long = "x" * (5 << 20)
    write(tmp_path / "a.csv", f"text,label\n{long},0\n{long},1\n")
    write(tmp_path / "a.jsonl", json_lines([{"text": long}, {"text": long}]))
    assert texts(read_table("a.csv", root=tmp_path), "text", "") == [long, long]
    assert texts(read_table("a.jsonl", root=tmp_path), "text", "") == [long, long]


def test_a_value_of_several_lines_may_stand_where_a_large_file_is_cut_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rolora.data.readers.LARGEST_BLOCK", 64)
    values = [f"line one of {row}\nline, two" for row in range(50)]
    write(tmp_path / "a.csv", "text\n" + "".join(f'"{value}"\n' for value in values))
    assert texts(read_table("a.csv", root=tmp_path), "text", "") == values


def test_a_tsv_is_split_at_tabs_only(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", "text\tlabel\nyes, no\t1\n")
    assert rows(read_table("a.tsv", root=tmp_path)) == [{"text": "yes, no", "label": "1"}]


def test_json_lines_and_a_json_array_give_the_same_messages(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", json_lines(CHATS))
    write(tmp_path / "a.json", json.dumps(CHATS, indent=2))
    assert rows(read_table("a.jsonl", root=tmp_path)) == CHATS
    assert rows(read_table("a.json", root=tmp_path)) == CHATS


TOOL_CALLS = [
    {"calls": [{"name": "weather", "arguments": {"city": "Paris"}}], "meta": {"day": "2020-01-01"}},
    {"calls": [{"name": "add", "arguments": {"a": 1, "b": 2.5}}, {"name": "x"}], "meta": {}},
    {"calls": [], "meta": {"n": None, "big": 10**30, "e": {"f": {"g": None}}}},
]
ODD_COLUMNS = [
    {"mixed": 1, "big": 10**20, "exact": 2**53 + 1, "flag": True},
    {"mixed": "x", "big": 1, "exact": 0.5, "flag": None},
    {"mixed": ["2020-01-01"], "big": -1, "exact": 1, "flag": False},
]


@pytest.mark.parametrize(
    "written", [TOOL_CALLS, ODD_COLUMNS, CHATS], ids=["nested", "odd", "chats"]
)
@pytest.mark.parametrize("form", ["lines", "array", "data"])
def test_json_rows_keep_exactly_their_own_keys_and_values_at_every_depth(
    tmp_path: Path, written: list[Any], form: str
) -> None:
    whole = {"array": json.dumps(written), "data": json.dumps({"v": 1, "data": written}, indent=1)}
    write(tmp_path / "a.json", whole.get(form, json_lines(written)))
    table = read_table("a.json", root=tmp_path)
    assert rows(table) == written
    # a lone row is what Arrow gives other rows' keys to
    assert rows(table.take([1])) == written[1:2]


def test_parquet_rows_are_not_given_the_keys_of_other_rows(tmp_path: Path) -> None:
    """Parquet itself cannot tell a key that is missing from one that is null."""
    pyarrow.parquet.write_table(pa.Table.from_pylist(TOOL_CALLS[:2]), tmp_path / "a.parquet")
    datasets.Dataset.from_list(TOOL_CALLS[:2]).save_to_disk(tmp_path / "d")
    pairs = pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64()))
    pyarrow.parquet.write_table(pa.table({"pairs": pairs}), tmp_path / "map.parquet")
    for source in ("a.parquet", "d"):
        assert rows(read_table(source, root=tmp_path)) == TOOL_CALLS[:2]
    assert rows(read_table("map.parquet", root=tmp_path)) == [
        {"pairs": {"a": 1}},
        {"pairs": {"b": 2}},
    ]


@pytest.mark.parametrize(
    "kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_of_any_arrow_layout_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["a", "b"], kind), "label": pa.array(["x", "y"], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text,label\nc,z\n")
    for found in (read_table("a.parquet", root=tmp_path), read_clients("*", root=tmp_path)[0]):
        assert texts(found, "text", "")[:2] == ["a", "b"]
        assert labels(found, "label", "")[:2] == ["x", "y"]
        assert [column.kind for column in describe(found)] == ["text", "text"]


def test_parquet_with_text_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    broken = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert refusal(tmp_path, "a.parquet").startswith("a.parquet cannot be read: ")


def test_parquet_classes_that_datasets_wrote_are_read_by_their_names(tmp_path: Path) -> None:
    classes = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    saved = datasets.Dataset.from_dict({"label": [1, 0, -1]}, classes)
    saved.to_parquet(tmp_path / "a.parquet")
    table = read_table("a.parquet", root=tmp_path)
    assert labels(table.slice(0, 2), "label", "") == ["yes", "no"]
    with pytest.raises(DataError, match="is missing in row 3"):
        labels(table, "label", "")


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_packed_files_are_read_like_plain_ones(tmp_path: Path, packed: str) -> None:
    ending = {"gzip": ".gz", "zstd": ".zst"}[packed]
    wanted = [{"text": "Müller's; best", "label": "1"}]
    parquet = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(wanted), parquet)
    files = {
        "a.csv": b"text,label\nM\xc3\xbcller's; best,1\n",
        "a.tsv": b"text\tlabel\nM\xc3\xbcller's; best\t1\n",
        "a.jsonl": json_lines(wanted).encode(),
        "a.parquet": parquet.getvalue().to_pybytes(),
    }
    for name, content in files.items():
        with pa.output_stream(str(tmp_path / (name + ending)), compression=packed) as stream:
            stream.write(content)
        assert rows(read_table(name + ending, root=tmp_path)) == wanted
    cut = (tmp_path / f"a.csv{ending}").read_bytes()[:-6]
    (tmp_path / f"cut.csv{ending}").write_bytes(cut)
    assert refusal(tmp_path, f"cut.csv{ending}").startswith(f"cut.csv{ending} cannot be read: ")
    (tmp_path / f"no.csv{ending}").write_text("text,label\n")
    assert refusal(tmp_path, f"no.csv{ending}").startswith(f"no.csv{ending} cannot be read: ")


def test_delimiter_and_encoding_are_those_that_are_said(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text;label\nMüller, 5 €;gut\n", "cp1252")
    write(tmp_path / "b.csv", "text\tlabel\nMüller, 5 €\tgut\n", "utf-16")
    write(tmp_path / "c.jsonl", json_lines([{"text": "Müller, 5 €", "label": "gut"}]), "utf-16")
    forms = {
        "a.csv": TextForm(";", "cp1252"),
        "b.csv": TextForm("\t", "utf-16"),
        "c.jsonl": TextForm(None, "utf-16"),
    }
    for name, form in forms.items():
        table = read_table(name, root=tmp_path, form=form)
        assert rows(table) == [{"text": "Müller, 5 €", "label": "gut"}]
        assert guess_form(tmp_path / name) == form
    assert 'set data.encoding, for example "utf-16"' in refusal(tmp_path, "b.csv")
    with pytest.raises(ConfigError, match="is not one ASCII character"):
        TextForm(";;")
    with pytest.raises(ConfigError, match="encoding 'utf-9' is not known"):
        TextForm(encoding="utf-9")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_file_read_with_the_wrong_delimiter_says_which_one_it_may_be(
    tmp_path: Path, mark: str
) -> None:
    said = f"; if {mark!r} separates values, set data.delimiter = {json.dumps(mark)}"
    write(tmp_path / "a.csv", f"text{mark}label\nx{mark}1\n")
    with pytest.raises(DataError) as caught:
        texts(read_table("a.csv", root=tmp_path), "text", "a.csv")
    assert str(caught.value).endswith(said)
    write(tmp_path / "b.csv", f"text{mark}label\nx, y{mark}1\n")
    assert said in refusal(tmp_path, "b.csv")


def test_a_quote_that_goes_wrong_in_the_middle_swallows_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", 'label,text\n1,"He said\n0,ok\n1,"fine"\n')
    assert refusal(tmp_path, "a.csv") == (
        "a.csv cannot be read: row 2 (the header is row 1): ',' expected after '\"'; a quote "
        "inside a quoted value is written twice"
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": "x", "a": "y"}\n', "line 1: the key 'a' appears twice in one object"),
        ("a.jsonl", '{"a": 1}\n{"a": {"b": 1, "b": 2}}\n', "line 2: the key 'b' appears twice"),
        ("a.jsonl", '{"a": "\\ud83d"}\n', "half of a surrogate pair"),
        ("a.json", '[{"a": ["\\udc00"]}]', "half of a surrogate pair"),
        ("a.json", '{"data": []}', "it holds no rows"),
        ("a.json", '{"data": [1]}', "row 1 is not an object {...}"),
        ("a.json", '[{"a": 1}, 2]', "row 2 is not an object {...}"),
    ],
)
def test_json_that_is_no_rows_of_text_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    assert said in refusal(tmp_path, write(tmp_path / name, content))


def test_dates_in_json_stay_text(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", json_lines([{"day": "2020-01-01", "n": 1}]))
    assert rows(read_table("a.jsonl", root=tmp_path)) == [{"day": "2020-01-01", "n": 1}]


def test_parquet_is_read_without_columns_from_its_folder_names(tmp_path: Path) -> None:
    (tmp_path / "site=3").mkdir()
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "site=3" / "a.parquet")
    assert read_table("site=3/a.parquet", root=tmp_path).equals(table)


def test_a_saved_dataset_is_read_in_its_shuffled_order(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 4}).shuffle(0)
    saved.save_to_disk(tmp_path / "d")
    table = read_table("d", root=tmp_path)
    assert isinstance(table, pa.Table)
    assert texts(table, "text", "d") == saved["text"][:]
    assert texts(table, "text", "d") != list("abcdefgh")


def test_a_saved_dataset_dict_gives_the_split_asked_for(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert texts(read_table("d", root=tmp_path), "text", "d") == ["train"]
    assert texts(read_table("d", root=tmp_path, split="test"), "text", "d") == ["test"]
    assert refusal(tmp_path, "d", split="tets") == "d has no split 'tets': did you mean 'test'?"


def test_a_saved_dataset_s_classes_are_read_by_their_names(tmp_path: Path) -> None:
    classes = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"label": [1, 0, 1]}, classes).save_to_disk(tmp_path / "d")
    assert labels(read_table("d", root=tmp_path), "label", "d") == ["yes", "no", "yes"]
    datasets.Dataset.from_dict({"label": [1, -1]}, classes).save_to_disk(tmp_path / "hidden")
    with pytest.raises(DataError, match="row 2"):
        labels(read_table("hidden", root=tmp_path), "label", "hidden")


def test_an_absolute_path_does_not_depend_on_root(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", REVIEWS)
    assert read_table(str(tmp_path / "a.csv"), root=Path("/nowhere")).num_rows == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.parquet", "", "a.parquet is empty"),
        ("a.csv", "text,label\n", "a.csv has no rows (columns: text, label)"),
        ("a.json", "[]", "a.json cannot be read: it holds no rows"),
        (
            "a.csv",
            'label,text\n1,x\n0,"y\n1,z\n0,w\n',
            "a.csv cannot be read: the quote opened in row 3 (the header is row 1) is never closed",
        ),
        ("a.csv", "text,text\nx,y\n", "a.csv: two columns are called 'text': rename one"),
        (
            "a.csv",
            "text,label\nx,1\ny,2,3\n",
            "a.csv cannot be read: row 3 has 3 values, but the header (row 1) has 2: y,2,3",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a": 2\n{"a": 3}\n',
            "a.jsonl cannot be read: line 3, character 8: Expecting ',' delimiter",
        ),
        (
            "a.jsonl",
            '{"a": "line\u2028separator"}\n{"a": \n',
            "a.jsonl cannot be read: line 2, character 7: Expecting value",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n[2]\n',
            "a.jsonl cannot be read: line 2 is not an object {...}",
        ),
        (
            "a.json",
            '[{"a": 1},\n {"a" 2}]',
            "a.json cannot be read: Expecting ':' delimiter: line 2 column 7 (char 17)",
        ),
        (
            "a.txt",
            "hello",
            "a.txt: unknown file type; use one of .csv, .tsv, .json, .jsonl, .parquet, plain or "
            "with .gz or .zst behind it",
        ),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    assert refusal(tmp_path, write(tmp_path / name, content)) == message


@pytest.mark.parametrize("lines", [3, 9000])
@pytest.mark.parametrize(("name", "line"), [("a.csv", "text\n"), ("a.jsonl", '{"text": "x"}\n')])
def test_text_that_is_not_utf8_is_refused_with_its_line(
    tmp_path: Path, name: str, line: str, lines: int
) -> None:
    (tmp_path / name).write_bytes(line.encode() * lines + '{"text": "é"}\n'.encode("latin-1"))
    assert refusal(tmp_path, name) == (
        f"{name} is not UTF-8 (line {lines + 1}): save it as UTF-8, or set data.encoding, for "
        'example "cp1252"'
    )


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, write(tmp_path / "a.parquet", "text,label\n"))
    assert message.startswith("a.parquet cannot be read: ")


def test_a_missing_file_is_refused_with_the_folder_looked_in(tmp_path: Path) -> None:
    assert refusal(tmp_path, "data/a.csv") == (
        f"data/a.csv: no such file (looked in {tmp_path / 'data'}, a folder that does not exist)"
    )
    write(tmp_path / "rows.csv", REVIEWS)
    assert refusal(tmp_path, "row.csv").endswith(f"{tmp_path}; did you mean 'rows.csv'?)")
    assert refusal(tmp_path, "./data with spaces").startswith("./data with spaces: no such file")


def test_a_folder_without_rows_is_refused_with_what_it_may_hold(tmp_path: Path) -> None:
    write(tmp_path / "docs" / "a.txt", "hello")
    assert refusal(tmp_path, "docs") == (
        "docs is a folder without rows: it holds neither .csv, .tsv, .json, .jsonl, .parquet "
        "files, nor what datasets' save_to_disk writes"
    )


def test_a_damaged_folder_of_datasets_is_refused_in_one_line(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    for name in ("state.json", "data-00000-of-00001.arrow", "dataset_info.json"):
        shutil.copytree(tmp_path / "d", tmp_path / name)
        (tmp_path / name / name).write_text("{")
        assert refusal(tmp_path, name).startswith(f"{name} looks like a folder written by datasets")


def test_a_folder_or_a_pattern_of_files_is_one_set_of_rows(tmp_path: Path) -> None:
    for part in (1, 0):
        name = f"train-0000{part}-of-00002.parquet"
        (tmp_path / "d").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pa.table({"text": [f"row {part}"]}), tmp_path / "d" / name)
    pyarrow.parquet.write_table(pa.table({"text": ["test"]}), tmp_path / "d" / "test.parquet")
    write(tmp_path / "d" / "README.md", "a data set")
    for source in ("d", "d/train-*.parquet"):
        table = read_table(source, root=tmp_path)
        assert table["text"].to_pylist() == ["row 0", "row 1"]
    assert read_table("d", root=tmp_path, split="test")["text"].to_pylist() == ["test"]
    assert refusal(tmp_path, "d", split="validation") == (
        "d has no files of split 'validation': known: test, train"
    )
    write(tmp_path / "e" / "a.csv", "text\nx\n")
    write(tmp_path / "e" / "b.jsonl", json_lines([{"text": "y"}]))
    assert refusal(tmp_path, "e") == "e holds files of several kinds (.csv, .jsonl): name one"


def test_a_folder_leaves_out_no_file_without_a_word(tmp_path: Path) -> None:
    """A site called "test-lab" does not make the other sites' files disappear."""
    for name in ("north", "test-lab"):
        write(tmp_path / "d" / f"{name}.csv", "text\nx\n")
    assert refusal(tmp_path, "d", split="test") == (
        "d holds test-lab.csv, named after a split, and north.csv, which is not: name the "
        "files, for example d/*.csv"
    )
    assert read_table("d/*.csv", root=tmp_path).num_rows == 2


def test_each_matching_folder_is_a_client_named_by_it(tmp_path: Path) -> None:
    for site in ("north", "south"):
        write(tmp_path / "data" / site / "1.csv", f"text\n{site} 1\n")
        write(tmp_path / "data" / site / "2.csv", f"text\n{site} 2\n")
    table, owners = read_clients("data/*/", root=tmp_path)
    assert table["text"].to_pylist() == ["north 1", "north 2", "south 1", "south 2"]
    assert owners == ["north", "north", "south", "south"]


@pytest.mark.parametrize("source", ["imdb", "nyu-mll/glue:sst2"])
def test_offline_refuses_hub_names(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda _: pytest.fail("asked the hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = refusal(tmp_path, source, offline=True)
    assert message.startswith(f"{source} is not a file or folder in {tmp_path}, nor in the hub's ")
    assert "and offline = true: where there is a network, run datasets.load_dataset(" in message


def test_a_hub_that_does_not_answer_is_told_at_once_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda _: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    started = time.monotonic()
    message = refusal(tmp_path, "nyu-mll/glue:sst2")
    assert time.monotonic() - started < 5
    assert "the hub does not answer" in message
    assert "load_dataset('nyu-mll/glue', 'sst2').save_to_disk('FOLDER')" in message
    assert not datasets.config.HF_HUB_OFFLINE


def test_what_the_hub_s_cache_holds_is_read_without_asking_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(hub, "is_reachable", lambda _: pytest.fail("asked the hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    place = cache / "nyu-mll___glue" / "sst2" / "0.0.0" / "abc"
    write(tmp_path / "rows.csv", "sentence,label\na film,1\n")
    files = {"train": str(tmp_path / "rows.csv")}
    made = datasets.load_dataset_builder("csv", "sst2", data_files=files, cache_dir=str(cache))
    made.download_and_prepare()
    shutil.copytree(made.cache_dir, place)
    (place / "csv-train.arrow").rename(place / "glue-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"builder_name": "glue", "dataset_name": "glue"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    table = read_table("nyu-mll/glue:sst2", root=tmp_path, offline=True)
    assert table.to_pylist() == [{"sentence": "a film", "label": 1}]


def test_a_hub_name_is_asked_for_with_its_configuration_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, config: str | None, *, split: str, revision: None) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"asked": [f"{name} {config} {split}"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "is_reachable", lambda _: True)
    table = read_table("nyu-mll/glue:sst2", root=tmp_path, split="validation")
    assert table["asked"].to_pylist() == ["nyu-mll/glue sst2 validation"]
    assert read_table("imdb", root=tmp_path)["asked"].to_pylist() == ["imdb None train"]


def test_a_failing_hub_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "is_reachable", lambda _: True)
    assert refusal(tmp_path, "imdb").endswith("from the hub failed: no route to host")


def test_each_matching_file_is_a_client_named_by_its_stem(tmp_path: Path) -> None:
    for site in ("north/b", "south/a", "south/ward 3"):
        write(tmp_path / f"{site}.csv", f"text,label\n{Path(site).name},1\n")
    table, owners = read_clients("*/*.csv", root=tmp_path)
    assert table["text"].to_pylist() == ["a", "b", "ward 3"]
    assert owners == ["a", "b", "ward_3"]


def test_client_files_may_order_their_columns_differently(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text,label\nx,1\n")
    write(tmp_path / "b.csv", "label,text\n2,y\n")
    table, _ = read_clients("*.csv", root=tmp_path)
    assert rows(table) == [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]


def test_client_files_keep_their_values_where_a_column_is_of_another_type_in_each(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.jsonl", json_lines([{"text": "x", "label": 1, "id": 7}]))
    write(tmp_path / "b.jsonl", json_lines([{"text": "y", "label": "no", "id": {"n": "B7"}}]))
    table = pa.table({"text": ["z"], "label": [2.0], "id": [date(2020, 1, 2)]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    table, owners = read_clients("*", root=tmp_path)
    assert owners == ["a", "b", "c"]
    assert labels(table, "label", "*") == ["1", "no", "2"]
    assert cells(table, "id") == [7, {"n": "B7"}, "2020-01-02"]
    with pytest.raises(DataError, match=r"^\*: column 'id' holds an object in row 2, not text$"):
        texts(table, "id", "*")


def test_columns_that_nobody_reads_may_differ_between_client_files(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "id,text,label\n1,x,0\n")
    write(tmp_path / "b.csv", "text,label,note\ny,1,n\n")
    table, _ = read_clients("*.csv", root=tmp_path, needed=["text", "label"])
    assert rows(table) == [{"text": "x", "label": "0"}, {"text": "y", "label": "1"}]
    with pytest.raises(DataError, match=r"^b\.csv has no column 'id'"):
        read_clients("*.csv", root=tmp_path, needed=["id", "text"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,lable\nx,1\n", "a.csv has columns lable, text, but most files have la"),
        ("a.csv", "", "a.csv is empty"),
        ("sub/b.csv", "text,label\nx,1\n", "**/*.csv: 2 files are called 'b': each needs its own"),
    ],
)
def test_the_client_file_that_does_not_fit_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    for site in ("b", "c", "d"):
        write(tmp_path / f"{site}.csv", "text,label\nx,1\n")
    write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_clients("**/*.csv", root=tmp_path)
    assert str(caught.value).startswith(message)


def test_a_pattern_without_a_match_is_refused_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_clients("sites/*.csv", root=tmp_path)
    assert str(caught.value) == (
        f"sites/*.csv: no file matches (there is no folder {tmp_path / 'sites'})"
    )
    write(tmp_path / "data v1.csv", REVIEWS)
    assert refusal(tmp_path, "*.jsonl") == (
        f"*.jsonl: no file matches ({tmp_path} holds data v1.csv)"
    )
    assert refusal(tmp_path, "data [v1].csv") == (
        f"data [v1].csv: no file matches ({tmp_path} holds data v1.csv; brackets stand for one of "
        "the characters in them)"
    )


def test_only_patterns_are_globs(tmp_path: Path) -> None:
    assert is_glob("sites/*.csv", root=tmp_path)
    assert is_glob("site-[ab].csv", root=tmp_path)
    assert not is_glob("sites/a.csv", root=tmp_path)
    assert not is_glob("nyu-mll/glue:sst2", root=tmp_path)


def test_a_file_with_brackets_in_its_name_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "rows [1].csv").touch()
    assert not is_glob("rows [1].csv", root=tmp_path)


def test_a_missing_column_is_named_with_the_nearest_and_all_others() -> None:
    table = pa.table({"text": ["a"], "label": [1]})
    require_columns(table, ["label", "text"], "a.csv")
    with pytest.raises(DataError) as caught:
        require_columns(table, ["text", "lable"], "a.csv")
    assert str(caught.value) == (
        "a.csv has no column 'lable': did you mean 'label'? known: text, label"
    )
    with pytest.raises(DataError, match=r"has no column 'zzz': known: label, text$"):
        labels(table, "zzz", "a.csv")


def test_numbers_are_written_out_as_text() -> None:
    table = pa.table({"n": [1, 22], "x": [0.5, 2.0], "c": pa.array(["a", "b"]).dictionary_encode()})
    assert texts(table, "n", "") == ["1", "22"]
    assert texts(table, "x", "") == ["0.5", "2"]
    assert texts(table, "c", "") == ["a", "b"]


def test_infinity_is_no_label() -> None:
    with pytest.raises(DataError, match="label 'y' is inf in row 2, but"):
        labels(pa.table({"y": [1.0, float("inf")]}), "y", "a.csv")


def test_a_missing_text_is_named_by_its_row_and_empty_text_is_allowed() -> None:
    assert texts(pa.table({"t": ["", "b"]}), "t", "a.csv") == ["", "b"]
    with pytest.raises(DataError) as caught:
        texts(pa.table({"t": [0.5, float("nan")]}), "t", "a.csv")
    assert "column 't' is missing in row 2" in str(caught.value)
    with pytest.raises(DataError) as caught:
        texts(pa.table({"t": ["a", None, "c", None]}), "t", "a.csv")
    assert str(caught.value) == (
        "a.csv: column 't' is missing in row 2 (2 of 4 rows): fill or remove it"
    )


def test_lists_are_neither_text_nor_labels() -> None:
    table = pa.table({"t": [["a"], ["b"]]})
    with pytest.raises(DataError, match="column 't' holds list"):
        texts(table, "t", "a.csv")
    with pytest.raises(DataError, match="column 't' holds list"):
        labels(table, "t", "a.csv")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["neg", "pos"], ["neg", "pos"]),
        (["10", "9"], ["10", "9"]),
        (["001", "1"], ["001", "1"]),
        (["1.0", "2.0"], ["1.0", "2.0"]),
        (["1", "x"], ["1", "x"]),
        ([3, 0], ["3", "0"]),
        ([1.0, 2.0], ["1", "2"]),
        ([Decimal("1.00"), Decimal(2)], ["1", "2"]),
        ([True, False], ["True", "False"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
    ],
)
def test_labels_are_text_as_written_and_whole_numbers_in_one_form(
    values: Any, expected: list[str]
) -> None:
    assert labels(pa.table({"y": values}), "y", "a.csv") == expected


def test_the_order_of_labels_follows_from_their_names_alone() -> None:
    names = ["unknown", "10", "9", "-1", "007", "7", "0", "2.0", "True", "1" * 5000]
    wanted = ["-1", "0", "7", "9", "10", "007", "1" * 5000, "2.0", "True", "unknown"]
    assert in_order(names) == in_order(reversed(names)) == wanted
    assert class_labels(["10", "9", "9"], "a.csv") == ["9", "10"]


@pytest.mark.parametrize("values", [["a", None], ["a", ""], [1, None], [1.0, float("nan")]])
def test_a_missing_or_empty_label_is_named_by_its_row(values: list[Any]) -> None:
    with pytest.raises(DataError, match=r"column 'y' is missing in row 2 \(1 of 2 rows\)"):
        labels(pa.table({"y": values}), "y", "a.csv")


@pytest.mark.parametrize("values", [[1.0, 1e30], [1.0, -9007199254740994.0]])
def test_a_label_too_large_for_a_whole_number_is_refused(values: list[Any]) -> None:
    with pytest.raises(DataError, match=r"label 'y' is .* in row 2, but a class is a name"):
        labels(pa.table({"y": values}), "y", "a.csv")


def test_json_nested_beyond_measure_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"deep\.jsonl cannot be read"):
        read_table("deep.jsonl", root=tmp_path)


@pytest.mark.parametrize("values", [[1.0, 2.5], [Decimal("1.0"), Decimal("2.5")]])
def test_a_label_that_is_no_whole_number_is_refused(values: list[Any]) -> None:
    with pytest.raises(DataError) as caught:
        labels(pa.table({"y": values}), "y", "a.csv")
    assert str(caught.value) == (
        "a.csv: label 'y' is 2.5 in row 2, but a class is a name or a whole number; "
        "model.task = 'regression' predicts numbers"
    )


def test_text_labels_are_numbers_only_if_all_of_a_run_are() -> None:
    with pytest.raises(DataError, match=r"^a.csv: a label is 2\.5, but a class is a name"):
        class_labels(["1.0", "2.5"], "a.csv")
    assert class_labels(["1.0", "2.5", "other"], "a.csv") == ["1.0", "2.5", "other"]
    assert class_labels(["1", "nan"], "a.csv") == ["1", "nan"]
