"""``rolora init``: what it writes can be read, discards nothing unsaid, and holds odd names."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from proposals import write_template

from rolora.config.load import load_config
from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.demo.sources import SOURCES
from rolora.errors import ConfigError, DataError, printable
from rolora.proposal.template import _DECODER, _ENCODER
from rolora.run.experiment import Experiment

HOSTILE = (
    "two\nlines",
    "a\ttab",
    "a \"quote\" and 'another'",
    "\\ and \\n and \\u0041",
    "[red]bold[/red] [link=x]",
    "<script>alert(1)</script> &amp;",
    "\x1b[31mred\x1b[0m\x07",
    "\x00 \x7f \x85 \u2028 \u202e",
    "# no comment",
    "'''\"\"\"",
    "",
    "= ]] [[data]]",
)


def write_csv(path: Path, head: list[str], rows: list[list[str]], **form: Any) -> str:
    encoding = form.pop("encoding", "utf-8")
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **form).writerows([head, *rows])
    return str(path)


def made(source: str, tmp_path: Path, **options: Any) -> tuple[RunConfig, list[str], str]:
    """The configuration that init writes, what it says, and the file's text."""
    out = tmp_path / "made.toml"
    options.setdefault("model", "model")
    notes, _ = write_template(source, out, **options)
    return load_config(out), notes, out.read_text()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_may_hold_anything_and_the_configuration_reads_it_back(
    tmp_path: Path, name: str
) -> None:
    head = [f"long{name}", f"label{name}", f"id{name}"]
    rows = [[f"a text that is long {row} {name}", f"{name}{row % 2}", str(row)] for row in range(8)]
    config, notes, text = made(write_csv(tmp_path / "a.csv", head, rows), tmp_path)
    assert (config.data.text, config.data.label) == (head[0], head[1])
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert notes == [f"unused columns: {printable(head[2])}"]
    assert f"# {notes[0]}\n" in text
    table = tables.read_table(config.data.train, root=config.root, form=config.data.form)
    assert tables.labels(table, str(config.data.label), "")[:2] == [f"{name}0", f"{name}1"]


@pytest.mark.parametrize("name", ['it\'s [v1] "x"', "a\nb\x1b[31m", "- .x."])
def test_a_file_s_name_may_hold_anything(tmp_path: Path, name: str) -> None:
    rows = [[f"a text that is long {row}", str(row % 2)] for row in range(8)]
    source = write_csv(tmp_path / f"{name}.csv", ["text", "label"], rows)
    (tmp_path / "rolora").mkdir()
    out = tmp_path / "rolora" / "rolora.toml"
    write_template(source, out)
    config = load_config(out)
    assert tables.read_table(config.data.train, root=config.root).num_rows == 8
    assert config.name.strip("-._").isprintable()
    assert all(letter.isprintable() or letter == "\n" for letter in out.read_text())


@pytest.mark.parametrize(
    "names", [("instruction", "input", "output"), ("instruction", "context", "response")]
)
def test_a_prompt_in_two_columns_is_taken_whole(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Alpaca and Dolly: half of the question stands in the second column, where it has one."""
    first, second, answer = names
    rows = [
        {
            first: f"Add {row}",
            second: "1 and 2" if row % 2 else "",
            answer: f"The sum is {row}.",
            "id": row,
        }
        for row in range(6)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    config, notes, _ = made(str(tmp_path / "a.json"), tmp_path)
    assert config.model.task == "causal_lm"
    assert config.data.prompt == [first, second]
    assert "unused columns: id" in notes
    table = tables.read_table(config.data.train, root=config.root)
    asked = tables.prompts(table, config.data.prompt, config.data.separator, "a.json")
    assert asked[:2] == ["Add 0\n", "Add 1\n1 and 2\n"]


def test_a_client_column_that_some_rows_leave_blank_is_named(tmp_path: Path) -> None:
    hospitals = ["Altona", "Barmbek", "  "] * 20
    rows = [f"text {n},{'good' if n % 2 else 'bad'},{h}" for n, h in enumerate(hospitals)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label,hospital", *rows]) + "\n")
    config, notes, _ = made(str(tmp_path / "a.csv"), tmp_path)
    assert config.partition.scheme != "by_field"
    assert any("hospital seems to name each row's client, but 20 of 60 rows" in n for n in notes)


def test_rows_whose_completion_follows_the_prompt_at_once_are_counted(tmp_path: Path) -> None:
    ends = ["?", "? ", "?", "?\n"]
    rows = [
        [f"Question {row}{ends[row % 4]}", f"{' ' * (row % 2)}Answer {row}."] for row in range(8)
    ]
    source = write_csv(tmp_path / "a.csv", ["prompt", "completion"], rows)
    config, notes, text = made(source, tmp_path)
    assert notes == [
        "4 of 8 completions follow their prompt without a space or line break: set data.separator "
        "if they need one"
    ]
    assert config.data.separator is None
    assert '\n# separator = "\\n"' in text
    tomllib.loads(text.replace("# separator", "separator"))


@pytest.mark.parametrize("start", ["", " "])
def test_of_a_pair_neither_answer_may_follow_the_prompt_at_once(tmp_path: Path, start: str) -> None:
    rows = [[f"Question {row}?", f" yes {row}", f"{start}no {row}"] for row in range(8)]
    source = write_csv(tmp_path / "a.csv", ["prompt", "chosen", "rejected"], rows)
    _, notes, _ = made(source, tmp_path)
    assert [note[:16] for note in notes] == ([] if start else ["8 of 8 completio"])


def test_delimiter_and_encoding_are_found_said_and_written(tmp_path: Path) -> None:
    rows = [[f"Ein Müller, {row} €", "gut" if row % 2 else "schlecht"] for row in range(8)]
    form: dict[str, Any] = {"delimiter": ";", "encoding": "cp1252"}
    source = write_csv(tmp_path / "a.csv", ["text", "label"], rows, **form)
    config, notes, _ = made(source, tmp_path)
    assert notes == ['found delimiter = ";"', 'found encoding = "cp1252"']
    table = tables.read_table(config.data.train, root=config.root, form=config.data.form)
    assert tables.texts(table, "text", "")[0] == "Ein Müller, 0 €"
    (tmp_path / "made.toml").unlink()
    config, *_ = made(source, tmp_path, encoding="latin-1")
    assert config.data.encoding == "latin-1"
    (tmp_path / "made.toml").unlink()
    with pytest.raises(ConfigError, match="encoding 'klingon' is not known"):
        made(source, tmp_path, encoding="klingon")


def test_parts_of_one_set_are_not_taken_for_clients(tmp_path: Path) -> None:
    for part in range(2):
        rows = {"text": [f"a text that is long {row}" for row in range(8)], "label": [0, 1] * 4}
        for name in (f"train-0000{part}-of-00002", f"site-{part}"):
            pyarrow.parquet.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    config, *_ = made(str(tmp_path / "train-*.parquet"), tmp_path)
    assert config.partition.scheme == "dirichlet"
    assert tables.read_table(config.data.train, root=config.root).num_rows == 16
    (tmp_path / "made.toml").unlink()
    config, *_ = made(str(tmp_path / "site-*.parquet"), tmp_path)
    assert config.partition.scheme == "files"


def write_rows(path: Path, count: int = 40) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[f"a text that is long {row}", str(row % 2)] for row in range(count)]
    return write_csv(path, ["text", "label"], rows)


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("in/berlin.csv", "in/rome.csv"), "in/*.csv"),
        (("in/berlin/a.csv", "in/rome/b.csv"), "in/*/"),
    ],
)
def test_a_folder_of_a_file_or_folder_for_each_site_has_a_client_for_each(
    tmp_path: Path, names: tuple[str, ...], pattern: str
) -> None:
    for name in names:
        write_rows(tmp_path / name)
    config, *_ = made(str(tmp_path / "in"), tmp_path)
    assert (config.partition.scheme, config.data.train) == ("files", pattern)
    assert set(Experiment(config).rows.shards) == {"berlin", "rome"}


@pytest.mark.parametrize("name", ["test", "validation", "dev"])
def test_test_rows_that_come_beside_the_training_rows_are_used(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "in" / "train.csv", 40)
    write_rows(tmp_path / "in" / f"{name}.csv", 7)
    write_rows(tmp_path / "other" / "films_train.csv", 40)
    write_rows(tmp_path / "other" / f"films_{name}.csv", 7)
    for source in ("in/train.csv", "in", "other/films_train.csv", "other"):
        (tmp_path / "made.toml").unlink(missing_ok=True)
        config, *_ = made(str(tmp_path / source), tmp_path)
        rows = Experiment(config).rows
        assert (rows.train.num_rows, rows.test.num_rows) == (40, 7)


def test_test_rows_that_are_the_training_rows_are_noted(tmp_path: Path) -> None:
    config, *_ = made(write_rows(tmp_path / "a.csv", 20), tmp_path)
    assert "training rows" not in Experiment(config).rows.note
    data = config.data.model_copy(update={"test": config.data.train})
    rows = Experiment(config.model_copy(update={"data": data})).rows
    assert "the test rows are the training rows" in rows.note


def test_a_file_whose_name_is_not_unicode_is_refused_in_one_line(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "caf\udce9.csv", 20)
    with pytest.raises(ConfigError, match="is not valid Unicode"):
        made(source, tmp_path)


def test_test_rows_without_answers_are_left_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "train.csv", 40)
    write_csv(tmp_path / "in" / "test.csv", ["text", "label"], [["a text", ""]] * 9)
    config, *_ = made(str(tmp_path / "in" / "train.csv"), tmp_path)
    assert config.data.test == 0.2


@pytest.mark.parametrize(
    ("row", "answers", "none"),
    [
        ({"sentence1": "a", "sentence2": "b"}, ("score", [0.5, 1.0, 2.5]), -1.0),
        ({"text": "a text"}, ("labels", [["a"], ["b"], ["a", "b"]]), []),
        ({"ctx": "a text", "endings": ["a", "b", "c"]}, ("label", ["0", "1", "2"]), ""),
    ],
)
def test_test_rows_with_one_value_for_an_answer_are_left_alone(
    tmp_path: Path, row: dict[str, Any], answers: tuple[str, list[Any]], none: Any
) -> None:
    name, values = answers
    known = [{**row, name: value} for value in values * 20]
    for split, rows in (("train", known), ("test", [{**row, name: none}] * 30)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config, *_ = made(str(tmp_path / "train.jsonl"), tmp_path)
    assert isinstance(config.data.test, float)


def test_a_column_that_names_a_site_makes_clients_and_is_said(tmp_path: Path) -> None:
    rows = [[f"site {row % 3}", f"a text that is long {row}", str(row % 2)] for row in range(60)]
    source = write_csv(tmp_path / "a.csv", ["site", "text", "label"], rows)
    config, notes, _ = made(source, tmp_path)
    assert (config.partition.scheme, config.partition.field) == ("by_field", "site")
    assert notes == ["a guess: each of the 3 values of site is a client"]


@pytest.mark.parametrize("name", ["-1", "NaN", "nan", "NA", "None"])
def test_rows_that_may_have_no_label_are_noted(tmp_path: Path, name: str) -> None:
    rows = [[f"a text that is long {row}", ("0", "1", name)[row % 3]] for row in range(60)]
    config, notes, _ = made(write_csv(tmp_path / "a.csv", ["text", "label"], rows), tmp_path)
    assert [note for note in notes if note.startswith(f"label is {name} in 20 of 60 rows")]
    assert name in Experiment(config).labels


def test_rows_without_text_are_counted_and_kept(tmp_path: Path) -> None:
    rows = [["" if row % 9 else f"a text that is long {row}", str(row % 2)] for row in range(90)]
    config, notes, _ = made(write_csv(tmp_path / "a.csv", ["text", "label"], rows), tmp_path)
    assert [note for note in notes if note.startswith("80 of 90 rows have no text")]
    assert Experiment(config).rows.train.num_rows == 90


@pytest.mark.parametrize("value", ["nan", "inf", "-Infinity"])
def test_what_is_no_number_is_refused_as_a_run_refuses_it(tmp_path: Path, value: str) -> None:
    rows = [[f"a text that is long {row}", f"{row / 8}"] for row in range(40)]
    rows[5][1] = value
    source = write_csv(tmp_path / "a.csv", ["text", "score"], rows)
    with pytest.raises(DataError) as caught:
        made(source, tmp_path)
    assert str(caught.value).endswith(f"column 'score' is {value!r} in row 6, not a number")
    assert not (tmp_path / "made.toml").exists()


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("films/train.jsonl", "films"),
        ("films/Data.csv", "films"),
        ("films/data/rows.csv", "rows"),
        ("films/*.csv", "films"),
        ("films/reviews.csv", "reviews"),
    ],
)
def test_a_run_on_a_file_of_a_common_name_is_called_after_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(file.replace("*", "one"))
    path.parent.mkdir(parents=True)
    if path.suffix == ".csv":
        write_rows(path)
    else:
        rows = [{"text": f"a text that is long {row}", "label": row % 2} for row in range(40)]
        path.write_text("\n".join(map(json.dumps, rows)))
    write_template(file, tmp_path / "rolora.toml", "model")
    assert load_config(tmp_path / "rolora.toml").name == name


def test_a_small_set_has_few_clients_and_a_large_one_few_in_a_round(tmp_path: Path) -> None:
    config, *_ = made(write_rows(tmp_path / "a.csv", 20), tmp_path)
    assert config.partition.clients == 2
    (tmp_path / "made.toml").unlink()
    rows = [[f"u{row % 50}", f"a text that is long {row}", str(row % 2)] for row in range(500)]
    source = write_csv(tmp_path / "b.csv", ["user", "text", "label"], rows)
    config, *_ = made(source, tmp_path)
    assert config.train.participation * 50 == 10


@pytest.mark.parametrize("source", [".", "../films"])
def test_a_run_on_the_current_folder_is_called_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    write_rows(tmp_path / "films" / "train.csv")
    monkeypatch.chdir(tmp_path / "films")
    write_template(source, tmp_path / "rolora.toml", "model")
    assert load_config(tmp_path / "rolora.toml").name == "films"


@pytest.mark.parametrize("second", [True, False])
def test_a_second_set_is_named_only_where_there_is_one(tmp_path: Path, second: bool) -> None:
    names = ["train", "validation_matched", *(["validation_mismatched"] if second else [])]
    texts = {name: [f"a text of {name}, row {row}" for row in range(20)] for name in names}
    rows = {
        name: datasets.Dataset.from_dict({"text": text, "label": ["a", "b"] * 10})
        for name, text in texts.items()
    }
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "in"))
    config, *_ = made(str(tmp_path / "in"), tmp_path)
    assert config.data.test_split == "validation_matched"
    assert config.data.second_split == ("validation_mismatched" if second else None)


def test_the_rate_of_small_models_is_proposed_for_small_models_only(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.csv")
    sizes = {"small": 99, "large": 101, "minilm": 101}
    for name, millions in sizes.items():
        (tmp_path / name).mkdir()
        one = {"dtype": "U8", "shape": [millions, 10**6], "data_offsets": [0, millions * 10**6]}
        header = json.dumps({"w": one}).encode()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + millions * 10**6)  # takes no room on disk
    rates = {}
    for name in (*sizes, "unknown"):
        config, _, text = made(rows, tmp_path, model=str(tmp_path / name))
        (tmp_path / "made.toml").unlink()
        rates[name] = config.train.lr
        assert ("start lower" in text) == (config.train.lr == 5e-3)
    assert rates == {"small": 2e-2, "large": 5e-3, "minilm": 2e-2, "unknown": 5e-3}


def test_the_model_that_is_proposed_is_one_that_rolora_fetch_puts_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    out = tmp_path / "runs" / "a.toml"
    notes, made = write_template(write_rows(tmp_path / "a.csv"), out)
    assert notes == [
        "no --model given: the file names data/minilm, a small model; get it with: rolora fetch "
        "minilm"
    ]
    assert (made.config.root / made.config.model.path).resolve() == tmp_path / "data" / "minilm"
    for start, name in ((_ENCODER, "minilm"), (_DECODER, "smollm2")):
        own = [str(Path("data") / name / made) for made in SOURCES[name].makes]
        assert start.name == name
        assert start.small in own


def test_a_model_that_is_at_hand_is_named_without_more_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    notes, made = write_template(write_rows(tmp_path / "a.csv"), tmp_path / "a.toml")
    assert notes == ["no --model given: the file names models/minilm, a small model"]
    assert made.config.model.path == "models/minilm"


def test_the_rate_that_is_proposed_is_rolora_s_best_in_the_study_with_that_model() -> None:
    records = Path(__file__).parent.parent / "experiments" / "records"
    for start, study in ((_ENCODER, "trec-top"), (_DECODER, "e4")):
        cell = json.loads((records / f"{study}.json").read_text())["cells"][0]
        own = next(one for one in cell["tuning"]["methods"] if one["method"] == "rolora")
        assert start.lr == float(own["best"]["train.lr"])
        assert not own["at_edge"]
