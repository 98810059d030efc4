"""Claims about a finished run on other rows: several sets at once, answers written or chosen."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from scripts import script
from test_cli import rolora
from tiny import tiny_llama

from rolora.config.load import load_config, make_config
from rolora.demo.fetch import how_to_get
from rolora.errors import ConfigError, NotHere
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter, evaluate_each
from rolora.run.experiment import Experiment

pytestmark = pytest.mark.usefixtures("quick")

PATTERN = "true|false|(solution|answer|ending|option)[1-5]"
FORMATS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "siqa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    "arc-e": ["answer1", "answer2", "answer3", "answer4"],
    "arc-c": ["answer1", "answer2", "answer3", "answer4"],
    "obqa": ["answer1", "answer2", "answer3", "answer4"],
}


@pytest.fixture(autouse=True)
def _keep_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rolora.cli.main.signal.signal", lambda number, handler: None)


def objects(name: str, count: int) -> list[dict[str, str]]:
    """Invented questions in the format of LLM-Adapters."""
    draw, labels = random.Random(name), FORMATS[name]
    found = []
    for number in range(count):
        answer = draw.choice(labels)
        text = f"Question {number} of {name}?\n\nAnswer format: {'/'.join(labels)}"
        output = f"the correct answer is {answer}"
        found.append({"instruction": text, "input": "", "output": output, "answer": answer})
    return found


@pytest.fixture(scope="module")
def commonsense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows that prepare.py made of invented files, and a run."""
    place = tmp_path_factory.mktemp("commonsense")
    prepare = script("experiments/llama-2-7b/prepare.py")
    theirs = place / "LLM-Adapters"
    everything = []
    for name, folder in prepare.TESTS.items():
        rows = objects(name, 5)
        everything += rows
        test = theirs / "dataset" / folder / "test.json"
        test.parent.mkdir(parents=True)
        test.write_text(json.dumps(rows))
    train = theirs / prepare.TRAIN
    train.parent.mkdir()
    train.write_text(json.dumps(everything))
    prepare.main(theirs, place / "rows")
    tiny_llama(place / "model")
    config = make_config(values(), root=place)
    for _ in runs.start(config, place / "run").rounds():
        pass
    return place


def values() -> dict[str, Any]:
    return {
        "model": {"path": "model", "task": "causal_lm"},
        "lora": {"rank": 16, "alpha": 32, "target_modules": ["all-linear"]},
        "data": {
            "train": "rows/train.jsonl",
            "test": "rows/test/boolq.jsonl",
            "prompt": "prompt",
            "completion": "completion",
            "choices": "choices",
            "answer": "answer",
            "max_length": 96,
        },
        "partition": {"clients": 2},
        "method": {"name": "fedit"},
        "train": {"rounds": 5, "local_steps": 30, "lr": 1e-2},
        "eval": {"every": 5, "generate": 100, "answer": PATTERN},
    }


def test_questions_have_the_answers_that_they_let_one_choose_from(commonsense: Path) -> None:
    for name, labels in FORMATS.items():
        lines = (commonsense / "rows" / "test" / f"{name}.jsonl").read_text().splitlines()
        for row, one in zip(map(json.loads, lines), objects(name, 5), strict=True):
            assert row["choices"] == [f"the correct answer is {label}" for label in labels]
            assert row["answer"] == row["completion"] == one["output"]
            assert row["prompt"].endswith(f"{'/'.join(labels)}\n\n### Response:\n")
    assert len((commonsense / "rows" / "train.jsonl").read_text().splitlines()) == 40


def test_one_run_is_measured_on_every_set_by_what_it_writes(
    commonsense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = str(commonsense / "rows" / "test" / "*.jsonl")
    words = ("eval", commonsense / "run", "--data", pattern)
    code, out, _ = rolora(monkeypatch, capsys, *words, "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == sorted(FORMATS)
    written = {name: metrics["answer_accuracy"] for name, metrics in found.items()}
    assert written == {name: by_hand(commonsense, name) for name in sorted(FORMATS)}
    assert len(set(written.values())) > 1
    last = json.loads((commonsense / "run" / "rounds.jsonl").read_text().splitlines()[-1])
    assert found["boolq"] == last["metrics"]
    code, out, err = rolora(monkeypatch, capsys, *words)
    assert "note: computing in fp32 (set model.dtype to change it)" in err
    mean = sum(written.values()) / len(written)
    assert re.search(rf"^ *mean .*\b{mean:.4f} *$", out, re.MULTILINE)


def by_hand(place: Path, name: str) -> float:
    """The same share by transformers and PEFT alone, with the expressions of LLM-Adapters."""
    expressions = {"true": "true|false"}
    for label, most in (("solution", 2), ("answer", 5), ("ending", 4), ("option", 2)):
        expressions[f"{label}1"] = "|".join(f"{label}{n}" for n in range(1, most + 1))
    expression = expressions[FORMATS[name][0]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    model = peft.PeftModel.from_pretrained(plain, place / "run" / "adapter").eval()
    hits = 0
    rows = [
        json.loads(line)
        for line in (place / "rows" / "test" / f"{name}.jsonl").read_text().splitlines()
    ]
    for row in rows:
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        prompt = whole[: len(tokenizer(row["prompt"])["input_ids"])]
        kept = prompt[len(whole) + 1 - 96 :]  # with its end, the row keeps its last 96 tokens
        ids = torch.tensor([kept])
        with torch.inference_mode():
            answer = model.generate(input_ids=ids, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(answer[0, len(kept) :], skip_special_tokens=True)
        found = re.findall(expression, text)
        hits += bool(found) and found[0] == row["completion"].split()[-1]
    return hits / len(rows)


def test_the_same_run_is_measured_by_the_likeliest_answer_too(commonsense: Path) -> None:
    sets = {name: str(commonsense / "rows" / "test" / f"{name}.jsonl") for name in FORMATS}
    found = dict(evaluate_each(commonsense / "run", sets, overrides=["model.task=choice"]))
    assert found.keys() == FORMATS.keys()
    metrics = {name: one.metrics for name, one in found.items()}
    for name, own in metrics.items():
        alone = evaluate_adapter(commonsense / "run", sets[name], overrides=["model.task=choice"])
        assert own == alone
        assert 0 <= own["choice_accuracy"] <= 1
    assert len({own["choice_accuracy"] for own in metrics.values()}) > 1


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    settings = values()
    settings["eval"]["answer"] = "true|("
    with pytest.raises(ConfigError, match=r"eval\.answer.*'true\|\(' is not a regular expression"):
        make_config(settings)


def test_a_pattern_that_matches_no_file_is_one_line(
    commonsense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = rolora(monkeypatch, capsys, "eval", commonsense / "run", "--data", "none-*.csv")
    assert (code, err.count("\n")) == (3, 1)
    assert "none-*.csv: no file matches" in err


EXPERIMENTS = sorted(
    path
    for path in (Path(__file__).parent.parent / "experiments").glob("*/*.toml")
    if path.parent.name != "linear"
)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_experiment_without_its_rows_says_which_command_makes_them(
    path: Path, tmp_path: Path
) -> None:
    there = tmp_path / "experiments" / path.parent.name / path.name
    there.parent.mkdir(parents=True)
    there.write_text(path.read_text())
    with pytest.raises(NotHere) as error:
        _ = Experiment(load_config(there, ["offline=true"])).rows
    hint = how_to_get(error.value.path) if error.value.path else ""
    said = f"{error.value}{hint}"
    assert "\n" not in said
    made = re.search(r"python (experiments/\S+/prepare\.py) (.+)", said)
    fetched = re.search(rf"rolora fetch \S+ --to {tmp_path / 'data'}$", said)
    hub = "run datasets.load_dataset(" in said
    assert bool(made) + bool(fetched) + hub == 1
    if made:  # the script is there, and writes the very files that are missing
        assert (path.parent.parent.parent / made[1]).is_file()
        target = Path(made[2].split()[-1])
        train = Path(str(load_config(there).data.train).removeprefix("../../"))
        assert target in (train, train.parent)
