"""Files that are made to do harm, that were left half written, or that others may write to."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from comparisons import lines

from rolora.config.load import load_config
from rolora.data.readers import DEEPEST, UNPACKED, UNPACKED_TEXT, nesting, read_json
from rolora.data.tables import read_table
from rolora.errors import ConfigError, DataError, RoloraError
from rolora.files import new_folder, sweep, sweep_beside, write_file
from rolora.flower.message import MessageError, expand_names
from rolora.run import runs
from rolora.training.client_store import ClientStore

pytestmark = pytest.mark.usefixtures("quick")


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


# files of rows


@pytest.mark.parametrize(
    "text",
    [
        nested(100_000) + "\n",
        '{"a": 1}\n' * 9 + '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        '{"a":\n' * 100_000 + "1" + "}\n" * 100_000,
        '{"]":\n' * 100_000 + "1" + "}\n" * 100_000,
        '[{"a": ' + "[" * 100_000 + "]" * 100_000 + "}]",
    ],
    ids=["objects", "lists", "lines", "brackets in keys", "one array"],
)
def test_json_nested_too_deep_is_refused_in_one_line_and_the_process_lives(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "deep.jsonl").write_text(text)
    program = (
        "from pathlib import Path; from rolora.errors import DataError\n"
        "from rolora.data.tables import read_table\n"
        "try: read_table('deep.jsonl', root=Path())\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = f"deep.jsonl cannot be read: objects and lists are nested more than {DEEPEST} deep"
    assert done.stdout.splitlines() == [said]


def test_brackets_in_text_are_no_nesting_and_rows_as_deep_as_allowed_are_read(
    tmp_path: Path,
) -> None:
    rows = [{"a": "{[" * 500}, {"a": '\\"[' * 500}, {"a": 'x" : [' * 200}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "flat.jsonl").write_text(text)
    assert read_table("flat.jsonl", root=tmp_path)["a"].to_pylist() == [r["a"] for r in rows]
    (tmp_path / "deep.jsonl").write_text(nested(DEEPEST) + "\n")
    assert read_table("deep.jsonl", root=tmp_path).num_rows == 1


def test_quotes_and_keys_in_great_number_take_no_time() -> None:
    began = time.perf_counter()
    nesting(b'"' + b'\\"' * (1 << 19))
    nesting(b'"\\' * (1 << 19))
    keys = ", ".join(f'"k{n}": 1' for n in [*range(100_000), 99_999])
    with pytest.raises(ValueError, match="the key 'k99999' appears twice"):
        read_json(f"[{{{keys}}}]".encode(), ",")
    with pytest.raises(MessageError):
        expand_names(json.dumps([f"n{n}" for n in range(30_000)]), [str(n) for n in range(3000)])
    assert time.perf_counter() - began < 3


def test_objects_deeper_than_allowed_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        read_json(nested(DEEPEST + 1).encode(), ",")


@pytest.mark.parametrize("names", [5, "bad", {"0": "bad"}, True])
def test_names_of_classes_that_are_no_list_are_another_program_s(
    names: object, tmp_path: Path
) -> None:
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"label": [0, 1]})
    for text in (json.dumps(about), "[" * 100_000, '{"info": [[[], 1]]}'):
        marked = table.replace_schema_metadata({"huggingface": text})
        pyarrow.parquet.write_table(marked, tmp_path / "a.parquet")
        assert read_table("a.parquet", root=tmp_path)["label"].to_pylist() == [0, 1]


def gz(file: Path) -> None:
    with gzip.open(file, "wb") as stream:
        stream.write(b"a\n")
        for _ in range(UNPACKED_TEXT // (1 << 20) + 1):
            stream.write(b"0\n" * (1 << 19))


def zst(file: Path) -> None:
    with pa.output_stream(str(file), compression="zstd") as stream:
        stream.write(b"a\n")
        for _ in range(UNPACKED_TEXT // (1 << 20) + 1):
            stream.write(b"0\n" * (1 << 19))


def repeated(file: Path) -> None:
    """One value of a megabyte in every row: once in the file, as often as rows in memory."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 600, pa.int32()), ["x" * (1 << 20)])
    pyarrow.parquet.write_table(pa.table({"a": column}), file, store_schema=False)


def zeros(file: Path) -> None:
    column = pa.array([0] * (UNPACKED // 8 + 1), pa.int64())
    pyarrow.parquet.write_table(pa.table({"a": column}), file, compression="zstd")


def nulls(file: Path) -> None:
    """Rows that take no byte."""
    column = pa.nulls(UNPACKED + 1)
    pyarrow.parquet.write_table(pa.table({"a": column}), file)


@pytest.mark.parametrize(
    ("name", "write", "most"),
    [
        ("a.csv.gz", gz, 8),
        ("a.jsonl.zst", zst, 8),
        ("a.parquet", repeated, 268),
        ("a.parquet", zeros, 268),
        ("a.parquet", nulls, 268),
    ],
)
def test_a_small_file_that_unpacks_to_very_much_is_refused(
    name: str, write: Callable[[Path], None], most: int, tmp_path: Path
) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < UNPACKED / 200
    said = rf"a\..* cannot be read: it unpacks to more than {most} MB"
    with pytest.raises(DataError, match=said):
        read_table(name, root=tmp_path)


@pytest.mark.parametrize("value", ["1", '"a"', "[1]", '{"b": 1}'])
@pytest.mark.parametrize("key", ["k{}", "\\u0061{}"], ids=["plain", "escaped"])
@pytest.mark.parametrize("form", ["lines", "array", "nested"])
def test_rows_that_have_no_keys_in_common_are_refused_before_a_table_is_made_of_them(
    form: str, key: str, value: str, tmp_path: Path
) -> None:
    rows = ['{"' + key.format(n) + '": ' + value + "}" for n in range(4000)]
    text = "[" + ", ".join(rows) + "]" if form != "lines" else "\n".join(rows)
    (tmp_path / "a.jsonl").write_text('{"all": ' + text + "}" if form == "nested" else text)
    began = time.perf_counter()
    if form == "nested":  # such an object is one value
        assert read_table("a.jsonl", root=tmp_path).column_names == ["all"]
    else:
        with pytest.raises(DataError, match="4,000 rows have 4,000 different keys, most of them"):
            read_table("a.jsonl", root=tmp_path)
    assert time.perf_counter() - began < 3


def test_a_folder_of_datasets_may_not_have_more_rows_than_its_files_could_hold(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a good film"], "label": ["good"]}).save_to_disk(folder)
    assert read_table("saved", root=tmp_path).num_rows == 1
    (file,) = folder.glob("*.arrow")
    rows = UNPACKED + 1  # of nulls, which take no bytes
    batch = pa.record_batch({"text": pa.nulls(rows), "label": pa.nulls(rows)})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    info = json.loads((folder / "dataset_info.json").read_text())
    null = {"dtype": "null", "_type": "Value"}
    info["features"] = {"text": null, "label": null}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"saved looks like .* it unpacks to more than 268 MB"):
        read_table("saved", root=tmp_path)


# leftovers


def test_what_a_killed_run_left_half_written_is_gone_once_it_is_resumed(
    site: Path, tmp_path: Path
) -> None:
    run = runs.start(load_config(site), tmp_path / "run")
    list(itertools.islice(run.rounds(), 2))
    left = [
        run.folder.path / ".part-report.html-99",
        run.folder.path / "checkpoints" / ".part-round-000003-99" / "state.safetensors",
        run.folder.path / "checkpoints" / ".old-round-000000" / "manifest.json",
        run.folder.path / "clients" / "ann" / ".part-round-000003.safetensors-99",
    ]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    resumed = runs.resume(run.folder.path)
    assert not [path for path in run.folder.path.rglob(".*") if path.name != ".lock"]
    list(resumed.rounds())
    assert lines(run.folder.path)[-1]["round"] == 4


def test_what_a_killed_process_left_of_a_new_folder_goes_once_there_is_one_of_this_name(
    site: Path, tmp_path: Path
) -> None:
    def leave() -> None:
        for name in (".part-run-99", ".part-run-99-old"):
            (tmp_path / name / "checkpoints").mkdir(parents=True)
            (tmp_path / name / "config.toml").write_text("half")

    (tmp_path / "elsewhere").mkdir()
    others = [".part-run-2-99", ".part-run-report", ".part-other-99", ".part-run-7", ".part-run-8"]
    for name in others[:3]:
        (tmp_path / name).mkdir()
    (tmp_path / others[3]).write_text("a file that somebody writes")
    (tmp_path / others[4]).symlink_to(tmp_path / "elsewhere")
    others += ["elsewhere", "run"]
    leave()
    run = runs.start(load_config(site), tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    list(itertools.islice(run.rounds(), 1))
    leave()
    runs.resume(run.folder.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


MAKES = """
import sys
from pathlib import Path
from rolora.files import new_folder
with new_folder(Path(sys.argv[1])) as part:
    (part / "file").touch()
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_new_folder_that_another_process_fills_is_spared_until_that_is_killed(
    tmp_path: Path,
) -> None:
    path, words = tmp_path / "run", [sys.executable, "-c", MAKES, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        part = tmp_path / f".part-run-{other.pid}"
        for _ in range(2):  # made, and made again
            with new_folder(path, replace=True) as own:
                (own / "file").touch()
            assert (part / "file").exists()
        other.kill()
    assert part.exists()
    sweep_beside(path)
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_a_sweep_spares_what_is_being_written_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".part-link").symlink_to(tmp_path / "elsewhere")
    with new_folder(tmp_path / "folder" / "new") as part:
        (part / "file").touch()
        sweep(tmp_path / "folder", seconds=60)
    sweep(tmp_path / "folder")
    assert (tmp_path / "folder" / "new" / "file").exists()
    assert (tmp_path / "elsewhere" / "kept").exists()
    assert not (tmp_path / "folder" / ".part-link").is_symlink()


# two at once


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_of_two_resumed_runs_of_a_folder_only_one_goes_on(
    site: Path, tmp_path: Path, rounds: int
) -> None:
    path = tmp_path / "run"
    first = runs.start(load_config(site), path)
    second, third = runs.resume(path), runs.resume(path)
    going = first.rounds()
    next(going)
    with pytest.raises(ConfigError, match="is in use by another"):
        next(second.rounds())
    list(itertools.islice(going, rounds - 1))
    going.close()
    for stale in (second, third, first):
        with pytest.raises(ConfigError, match="has advanced since this run was opened"):
            next(stale.rounds())
    list(runs.resume(path).rounds())
    assert [entry["round"] for entry in lines(path)] == [0, 1, 2, 3, 4]


# a terminal that closes


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_ends_a_command_as_ctrl_c_does_unless_that_is_ignored(
    site: Path, tmp_path: Path, ignored: bool
) -> None:
    rounds = f"train.rounds={4 if ignored else 1000}"  # it must still be at work when it is told
    run = [sys.executable, "-m", "rolora", "run", str(site), rounds, "--out", str(tmp_path / "run")]
    handled = "SIG_IGN" if ignored else "SIG_DFL"  # as a shell, or nohup, would set it
    first = f"import os, signal; signal.signal(signal.SIGHUP, signal.{handled}); os.execv"
    command = [sys.executable, "-c", f"{first}({run[0]!r}, {run!r})"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "rounds.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    err = process.communicate(timeout=120)[1]
    if ignored:
        assert process.returncode == 0
    else:
        assert process.returncode == 130
        assert err.splitlines()[-1].startswith("rolora: interrupted; finished rounds are saved")


# what clients keep


@pytest.mark.parametrize("kind", ["received", "sent", "round", "residual"])
@pytest.mark.parametrize("left", [0, 5, 40])
def test_a_truncated_file_of_a_client_heals_if_it_is_sent_again_and_is_else_named(
    kind: str, left: int, tmp_path: Path
) -> None:
    store = ClientStore(tmp_path, kind)
    store.write("ann", 1, {"x": torch.ones(9)})
    store.write("ann", 2, {"x": torch.ones(9) * 2})
    file = tmp_path / "ann" / f"{kind}-000002.safetensors"
    os.truncate(file, left)
    if kind in ("received", "sent"):
        assert store.read("ann", before=3) == {}
        store.write("ann", 3, {"x": torch.ones(9)})
        assert store.read("ann", before=4).keys() == {"x"}
    else:
        with pytest.raises(RoloraError, match=r"000002\.safetensors is damaged") as caught:
            store.read("ann", before=3)
        assert "\n" not in str(caught.value)
        file.unlink()
        assert torch.equal(store.read("ann", before=3)["x"], torch.ones(9))


def test_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
