"""Claims about the experiments: their files load, and published numbers stand where they belong."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from scripts import script

from rolora.config.load import load_config
from rolora.methods import method_names

PLACE = Path(__file__).parent.parent / "experiments"
CONFIGS = sorted(path for path in PLACE.glob("*/*.toml") if path.parent.name != "linear")
PUBLISHED = sorted(PLACE.glob("*/*.published.json"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def test_the_files_are_those_that_the_script_writes() -> None:
    files = script("experiments/make_experiments.py").files()
    for path, text in files.items():
        assert path.read_text() == text, f"run python experiments/make_experiments.py ({path})"
    for folder in ("glue-roberta-large", "llama-2-7b"):
        there = {path for path in PLACE.glob(f"{folder}/*") if path.suffix in (".toml", ".json")}
        assert there == {path for path in files if path.parent.name == folder}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_experiment_is_a_configuration_that_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_published_numbers_say_whose_they_are_and_which_files_run_them(path: Path) -> None:
    found = json.loads(path.read_text())
    assert found["source"]
    assert found["setting"]
    assert found["unit"] == "percent"
    assert all(0 < value < 100 for value in found["results"].values())
    assert {name.partition("+")[0] for name in found["results"]} <= set(method_names())
    own = path.with_name(path.name.replace(".published.json", ".toml")).name
    for config in found.get("experiments", [own]):
        loaded = load_config(path.parent / config, found.get("overrides", []))
        written = loaded.eval.generate and loaded.eval.answer  # else nothing stands beside it
        assert found["metric"] == ("answer_accuracy" if written else "accuracy")


def test_the_published_average_is_the_mean_of_the_published_tasks() -> None:
    average = json.loads((PLACE / "glue-roberta-large" / "average-50.published.json").read_text())
    tasks = [
        json.loads((PLACE / "glue-roberta-large" / f"{Path(name).stem}.published.json").read_text())
        for name in average["experiments"]
    ]
    assert len(tasks) == 5
    for method, value in average["results"].items():
        assert mean(task["results"][method] for task in tasks) == pytest.approx(value, abs=0.02)


def test_all_sizes_of_an_experiment_have_as_many_samples() -> None:
    def samples(name: str) -> int:
        config = load_config(PLACE / name)
        train = config.train
        return train.rounds * (train.local_steps or 0) * train.batch_size * config.partition.clients

    for names in (
        [f"stand-ins/snippets-{clients}.toml" for clients in (3, 20, 50)],
        [f"glue-roberta-large/qnli-{clients}.toml" for clients in (3, 20, 50)],
        [f"glue-roberta-large/mnli-{how}.toml" for how in ("50", "dirichlet-10", "dirichlet-15")],
    ):
        assert len({samples(name) for name in names}) == 1


def test_an_instruction_set_becomes_prompts_with_their_input_and_completions() -> None:
    objects = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say nothing.", "input": "", "output": " "},
    ]
    first, second = script("experiments/llama-2-7b/prepare.py").rows(objects)
    assert first["prompt"].endswith(
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    assert first["completion"] == "3"
    assert "Input" not in second["prompt"]


def test_questions_become_choices_and_lines_replies_of_their_speaker() -> None:
    prepare = script("experiments/stand-ins/prepare.py")
    asked = {"text": "Who was it?", "label": "HUM"}
    (row,) = prepare.choices([asked])
    assert row["choices"][3] == row["answer"] == "person"
    lines = ["Season\tEpisode\tSeason & Episode\tTitle\tAuthor\tQuote", "d\td\td\td\td\tstring"]
    lines += ["\t\t\t\t\tinclude=True"]
    for season, who, said in (
        ("01", "Ross", "Where has my dinosaur gone?"),
        ("01", "Rachel", "It is in the other room, Ross."),
        ("01", "Waiter", "Are you ready to order something?"),
        ("10", "Joey", "I would like one of each, please."),
        ("10", "Monica", "And a glass of water for everybody."),
    ):
        lines.append(f"{season}\t01\t{season}01\tThe One\t{who}\t {said}")
    assert list(prepare.replies(lines)) == [
        (
            "train",
            {
                "prompt": "The One\nRoss: Where has my dinosaur gone?\nRachel:",
                "completion": " It is in the other room, Ross.",
                "speaker": "Rachel",
            },
        ),
        (
            "test",
            {
                "prompt": "The One\nJoey: I would like one of each, please.\nMonica:",
                "completion": " And a glass of water for everybody.",
                "speaker": "Monica",
            },
        ),
    ]


def big_bench(file: Path, task: str, examples: list[dict[str, Any]]) -> None:
    """An archive like BIG-bench's with one task."""
    content = json.dumps({"examples": examples}).encode()
    member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json")
    member.size = len(content)
    with tarfile.open(file, "w:gz") as tar:
        tar.addfile(member, io.BytesIO(content))


def rows_of(folder: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for part in ("train", "test"):
        with (folder / f"{part}.csv").open(newline="") as file:
            found += csv.DictReader(file)
    return found


def test_claims_come_once_each_with_their_sentence_and_all_of_an_article_on_one_side(
    tmp_path: Path,
) -> None:
    articles = [f"Article {number}" for number in range(40)]
    examples = [
        {"input": f"{title}: So it is.\nClaim: {claim}", "target_scores": {"True": 0, "False": 1}}
        for title in articles
        for claim in ("It is not .", "It never was .", "It is not .")
    ]
    big_bench(tmp_path / "a.tar.gz", "vitaminc_fact_verification", examples)
    prepare = script("experiments/stand-ins/prepare.py")
    prepare.main("claims", tmp_path / "a.tar.gz", tmp_path / "claims")
    train = rows_of(tmp_path / "claims")
    assert {"sentence": "Article 7: So it is.", "claim": "It is not .", "label": "false"} in train
    counts = Counter(row["sentence"].partition(":")[0] for row in train)
    assert counts == dict.fromkeys(articles, 2)


def test_about_a_thousand_rows_are_left_to_test_on(tmp_path: Path) -> None:
    examples = [
        {"input": f"{number}: So.\nClaim: So.", "target_scores": {"True": 1, "False": 0}}
        for number in range(11_000)
    ]
    big_bench(tmp_path / "a.tar.gz", "vitaminc_fact_verification", examples)
    prepare = script("experiments/stand-ins/prepare.py")
    prepare.main("claims", tmp_path / "a.tar.gz", tmp_path / "claims")
    assert 1000 <= len((tmp_path / "claims" / "test.csv").read_text().splitlines()) < 1300


def test_premises_about_one_fact_are_on_one_side(tmp_path: Path) -> None:
    examples = [
        {
            "input": f"Premise: Ann {verb} that it is {n}. Hypothesis: Bob hopes that it is {n}.",
            "target_scores": {"entailment": 0, "non-entailment": 1},
        }
        for n in range(40)
        for verb in ("knows", "thinks")
    ]
    big_bench(tmp_path / "a.tar.gz", "epistemic_reasoning", examples)
    prepare = script("experiments/stand-ins/prepare.py")
    prepare.main("premises", tmp_path / "a.tar.gz", tmp_path / "premises")
    rows = rows_of(tmp_path / "premises")
    first = {"premise": "Ann knows that it is 7.", "hypothesis": "Bob hopes that it is 7."}
    assert {**first, "label": "non-entailment"} in rows
    sides = [(tmp_path / "premises" / f"{part}.csv").read_text() for part in ("train", "test")]
    for n in range(40):
        assert [side.count(f"knows that it is {n}.") for side in sides] == [
            side.count(f"thinks that it is {n}.") for side in sides
        ]


def test_lines_are_the_two_that_are_asked_about(tmp_path: Path) -> None:
    asked = 'In the preceding conversation, were the sentences "Is it?" and "It "is"." '
    examples = [
        {"input": f"Is it? It is. {n} ----- {asked}", "target_scores": {"same": 0, "different": 1}}
        for n in range(20)
    ]
    big_bench(tmp_path / "a.tar.gz", "movie_dialog_same_or_different", examples)
    prepare = script("experiments/stand-ins/prepare.py")
    prepare.main("lines", tmp_path / "a.tar.gz", tmp_path / "lines")
    found = rows_of(tmp_path / "lines")
    assert found
    assert all(
        row == {"first": "Is it?", "second": 'It "is".', "label": "different"} for row in found
    )


@pytest.mark.parametrize(
    ("written", "passed"),
    [
        ("    return a + b", True),
        ("    return a - b", False),
        ("    return a +", False),
        ("    return a + b\nraise SystemExit(0)", False),
        ("    return a + b\x00", False),
        ("    while True: pass", False),
    ],
)
def test_a_generated_program_passes_if_its_test_runs_to_the_end_in_time(
    written: str, passed: bool
) -> None:
    passes = script("experiments/llama-2-7b/tasks/humaneval_local.py").passes
    test = "assert add(1, 2) == 3"
    assert passes(f"def add(a, b):\n{written}\n{test}", seconds=5.0) == passed
