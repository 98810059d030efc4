"""Claims about lm-evaluation-harness on a run: its numbers are ours, no program runs unasked."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from scripts import script
from test_cli import rolora
from tiny import tiny_llama
from tiny_site import make_site

from rolora.config.load import make_config
from rolora.run import runs
from rolora.run.evaluation import evaluate_adapter

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'rolora[harness]'",
)
HUMANEVAL = Path(__file__).parent.parent / "experiments" / "llama-2-7b" / "tasks"

QUESTIONS: list[dict[str, Any]] = [
    {
        "prompt": f"{text} {number} times:",
        "choices": ["good", "a bad film", "Paris"],
        "answer": right,
    }
    for number in range(8)
    for text, right in (("the cat sat", 0), ("a film with a plot", 1), ("the capital", 2))
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(autouse=True)
def _keep_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rolora.cli.main.signal.signal", lambda number, handler: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, a task of the harness for them, and a run."""
    place = tmp_path_factory.mktemp("harness")
    tiny_llama(place / "model")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (place / "tasks").mkdir()
    (place / "tasks" / "small.yaml").write_text(TASK.format(name="small", rows=rows))
    config = {
        "model": {"path": "model", "task": "choice"},
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "data": {
            "train": "rows.jsonl",
            "test": "rows.jsonl",
            "prompt": "prompt",
            "choices": "choices",
            "answer": "answer",
        },
        "partition": {"clients": 2},
        "train": {"rounds": 2, "local_steps": 2, "lr": 2e-2},
    }
    for _ in runs.start(make_config(config, root=place), place / "run").rounds():
        pass
    return place


def by_hand(place: Path) -> float:
    """How often the right choice is the likeliest, by transformers and PEFT alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    model = peft.PeftModel.from_pretrained(plain, place / "run" / "adapter").eval()
    hits = 0
    for row in QUESTIONS:
        start = len(tokenizer(row["prompt"])["input_ids"])
        sums = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['prompt']} {choice}")["input_ids"]])
            with torch.inference_mode():
                logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            sums.append(float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        hits += sums.index(max(sums)) == row["answer"]
    return hits / len(QUESTIONS)


@needs_harness
def test_the_harness_finds_what_a_direct_computation_finds(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", place / "run", "--tasks", "small", "--task-folder", place / "tasks")
    code, out, _ = rolora(monkeypatch, capsys, *words, "--json")
    (score,) = json.loads(out)
    ours = evaluate_adapter(place / "run", str(place / "rows.jsonl"))["choice_accuracy"]
    assert code == 0
    assert (score["task"], score["metric"], score["rows"]) == ("small", "acc", 24)
    assert score["value"] == pytest.approx(by_hand(place)) == pytest.approx(ours)
    assert 0 < score["value"] < 1
    code, out, _ = rolora(monkeypatch, capsys, *words, "--limit", "3")
    assert (code, out.split()[-1]) == (0, "3")


@needs_harness
@pytest.mark.parametrize(
    ("tasks", "code", "said"),
    [
        ("smal", 2, "the harness has no task 'smal': did you mean"),
        ("cais_rows", 3, "the rows of task 'cais_rows' are not on this machine, and the hub does"),
        ("damaged", 3, "task 'damaged' cannot be loaded (the hub does not answer): "),
        ("remote_metric", 2, "'brier' is a program that is fetched from the hub and run here"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tasks: str,
    code: int,
    said: str,
) -> None:
    folder = place / "faulty"
    folder.mkdir(exist_ok=True)
    text = TASK.format(name=tasks, rows=place / "rows.jsonl")
    if tasks == "cais_rows":
        text = text.replace("dataset_path: json\n", "dataset_path: cais/mmlu\n")
        text = "".join(line for line in text.splitlines(True) if "dataset_kwargs" not in line)
    if tasks == "damaged":
        text = text.replace("rows.jsonl", "none.jsonl")
    if tasks == "remote_metric":
        text = text.replace("metric: acc,", "metric: brier, hf_evaluate: true,")
    if tasks != "smal":
        (folder / f"{tasks}.yaml").write_text(text)
    monkeypatch.setattr("rolora.data.hub.answers", lambda address: False)
    words = ("eval", place / "run", "--tasks", tasks, "--task-folder", folder)
    found, out, err = rolora(monkeypatch, capsys, *words)
    assert (found, out) == (code, "")
    assert said in err.splitlines()[-1]


@needs_harness
def test_a_program_that_a_model_wrote_runs_only_where_that_is_allowed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = Path(shutil.copytree(HUMANEVAL, tmp_path / "tasks"))
    mark = tmp_path / "ran"
    problem = {
        "task_id": "0",
        "prompt": f"open({str(mark)!r}, 'w').close()  #",  # whatever is written behind it
        "entry_point": "str",
        "canonical_solution": "",
        "test": "def check(function):\n    assert function(1) == '1'\n",
    }
    rows = tmp_path / "data" / "humaneval" / "test.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text(json.dumps(problem) + "\n")
    asked = tasks / "humaneval_local.yaml"
    text = asked.read_text().replace("max_gen_toks: 1024", "max_gen_toks: 16")
    asked.write_text(re.sub("until: .*", r'until: ["\\n", "\\r"]', text))
    monkeypatch.chdir(tmp_path)
    words = ("eval", place / "run", "--tasks", "humaneval_local", "--task-folder", tasks)
    code, out, err = rolora(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert "humaneval_local runs programs that the model writes" in err
    assert "--allow-code" in err
    assert not mark.exists()
    code, out, err = rolora(monkeypatch, capsys, *words, "--allow-code")
    assert code == 0, err
    assert re.search(r"humaneval_local +pass_at_1 \(completed\) +1\.0000", out)
    assert mark.exists()


def test_without_the_harness_the_line_says_what_to_install(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rolora.run.harness.importlib.util.find_spec", lambda name: None)
    code, _, err = rolora(monkeypatch, capsys, "eval", place / "run", "--tasks", "mmlu")
    assert (code, err.splitlines()[-1]) == (
        2,
        "rolora: --tasks needs lm-evaluation-harness: pip install 'rolora[harness]'",
    )


@needs_harness
def test_a_classifier_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rolora.config.load import load_config

    config = load_config(make_site(tmp_path), ["train.rounds=1"])
    for _ in runs.start(config, tmp_path / "run").rounds():
        pass
    code, _, err = rolora(monkeypatch, capsys, "eval", tmp_path / "run", "--tasks", "mmlu")
    assert code == 2
    assert "the harness asks language models" in err.splitlines()[-1]


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
def test_a_program_passes_where_it_runs_through_its_test_in_time(
    written: str, passed: bool
) -> None:
    passes = script("experiments/llama-2-7b/tasks/humaneval_local.py").passes
    test = "assert add(1, 2) == 3"
    assert passes(f"def add(a, b):\n{written}\n{test}", seconds=5.0) == passed
