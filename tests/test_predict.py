"""Claims about predictions of a finished run: those of transformers and PEFT on its adapter."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_chats import PLAIN
from test_cli import rolora
from tiny import tiny_llama
from tiny_site import make_site

from rolora.config.load import load_config, make_config
from rolora.errors import ConfigError
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter
from rolora.run.prediction import predict

pytestmark = pytest.mark.usefixtures("quick")

TEXTS = ["a good film, and a warm one", "the mat", "a bad film with a thin plot", "dog"]
QUESTIONS = [
    {"prompt": "the cat sat on", "completion": " the mat", "choices": [" the mat", " a dog"]},
    {"prompt": "a good film with", "completion": " a heart", "choices": [" plot", " a heart", "?"]},
    {"prompt": "what is the capital of France?", "completion": " Paris", "choices": ["a", "Paris"]},
]


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("classified")
    config = load_config(make_site(place), ["train.rounds=2", "train.lr=0.05"])
    list(runs.start(config, place / "run").rounds())
    (place / "new.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return place


def written(place: Path, **data: str) -> Path:
    """A run of a language model on QUESTIONS or chats, and rows without answers."""
    tiny_llama(place / "model")
    rows = [{**one, "answer": 0, "chat": PLAIN} for one in QUESTIONS] * 4
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [
        {"prompt": one["prompt"], "choices": one["choices"], "chat": PLAIN[:ends]}
        for one, ends in zip(QUESTIONS, (1, 3, 4), strict=True)
    ]
    (place / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    tables: dict[str, Any] = {
        "model": {"path": "model", "task": "causal_lm", "dtype": "fp32"},
        "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": "train.jsonl", "test": 0.25, **data},
        "partition": {"clients": 2},
        "train": {"rounds": 2, "local_steps": 2, "lr": 0.05},
    }
    list(runs.start(make_config(tables, root=place), place / "run").rounds())
    return place


def by_peft(place: Path, auto: Any, **more: Any) -> Any:
    plain = auto.from_pretrained(place / "model", **more)
    return peft.PeftModel.from_pretrained(plain, place / "run" / "adapter").eval()


def test_labels_have_the_probabilities_that_peft_computes(classified: Path) -> None:
    found = predict(classified / "run", str(classified / "new.jsonl"))
    names = json.loads((classified / "run" / "adapter" / "rolora.json").read_text())["labels"]
    auto = transformers.AutoModelForSequenceClassification
    model = by_peft(classified, auto, num_labels=len(names))
    tokenizer = transformers.AutoTokenizer.from_pretrained(classified / "model")
    with torch.inference_mode():
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    for one, expected in zip(found, logits.softmax(dim=1).tolist(), strict=True):
        assert list(one["probabilities"]) == names
        assert list(one["probabilities"].values()) == pytest.approx(expected, rel=1e-4)
        assert one["label"] == names[expected.index(max(expected))]
    assert len({one["label"] for one in found}) > 1


def test_the_dtype_that_predictions_are_computed_in_is_said(
    classified: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype in ("fp32", "bf16"):
        words = ("predict", classified / "run", f"model.dtype={dtype}", "--data")
        code, _, err = rolora(monkeypatch, capsys, *words, classified / "new.jsonl")
        assert code == 0
        assert f"note: computing in {dtype} (set model.dtype to change it)" in err


def test_predictions_are_written_as_csv_or_json_lines(
    classified: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("predict", classified / "run", "--data", classified / "new.jsonl")
    code, out, _ = rolora(monkeypatch, capsys, *words)
    printed = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert printed == predict(classified / "run", str(classified / "new.jsonl"))
    for name in ("found.csv", "found.jsonl"):
        assert rolora(monkeypatch, capsys, *words, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "found.jsonl").read_text() == out
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [one["label"] for one in printed]
    assert [row["probabilities.good"] for row in rows] == [
        f"{one['probabilities']['good']:.7g}" for one in printed
    ]
    code, _, err = rolora(monkeypatch, capsys, *words, "--out", tmp_path / "found.xlsx")
    assert (code, err.count("\n")) == (2, 1)
    assert "found.xlsx: predictions are written as .csv or .jsonl" in err


@pytest.mark.parametrize(
    "data", [{"prompt": "prompt", "completion": "completion"}, {"messages": "chat"}], ids=str
)
def test_completions_are_those_that_peft_generates(tmp_path: Path, data: dict[str, str]) -> None:
    place = written(tmp_path, **data)
    found = predict(place / "run", str(place / "new.jsonl"), max_new_tokens=9)
    model = by_peft(place, transformers.AutoModelForCausalLM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    prompts = [tokenizer(one["prompt"])["input_ids"] for one in QUESTIONS]
    if "messages" in data:  # an answer at the end is what is asked for
        prompts = [
            tokenizer.apply_chat_template(
                PLAIN[:ends], add_generation_prompt=True, return_dict=False
            )
            for ends in (1, 3, 3)
        ]
    for prompt, one in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            answer = model.generate(input_ids=ids, max_new_tokens=9, do_sample=False)
        text = tokenizer.decode(answer[0, len(prompt) :], skip_special_tokens=True)
        assert one == {"completion": text}


def test_the_chosen_answers_are_those_that_the_accuracy_counts(tmp_path: Path) -> None:
    data = {"prompt": "prompt", "choices": "choices", "answer": "answer"}
    place = written(tmp_path, completion="completion", **data)
    as_choice = ["model.task=choice"]
    found = predict(place / "run", str(place / "new.jsonl"), overrides=as_choice)
    for one, row in zip(found, QUESTIONS, strict=True):
        assert one["choice"] == row["choices"][one["answer"]]
    right = [{**row, "answer": one["answer"]} for row, one in zip(QUESTIONS, found, strict=True)]
    (place / "right.jsonl").write_text("".join(json.dumps(row) + "\n" for row in right))
    metrics = evaluate_adapter(place / "run", str(place / "right.jsonl"), overrides=as_choice)
    assert metrics["choice_accuracy"] == 1.0


def test_a_prompt_without_a_token_is_named_by_row(tmp_path: Path) -> None:
    place = written(tmp_path, prompt="prompt", completion="completion")
    (place / "empty.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(Exception, match=r"empty\.jsonl, row 2: 'prompt' is empty"):
        predict(place / "run", str(place / "empty.jsonl"))


def test_a_task_that_makes_no_predictions_says_so(
    classified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from rolora.run.experiment import Experiment

    task_on = Experiment.task_on
    monkeypatch.setattr(
        Experiment, "task_on", lambda self, base: replace(task_on(self, base), predict=None)
    )
    with pytest.raises(ConfigError, match="task 'classification' makes no predictions"):
        predict(classified / "run", str(classified / "new.jsonl"))
