"""Writes the experiments on RoBERTa-Large and Llama-2-7B, which differ in a few lines each.

    python experiments/make_experiments.py

A test holds that the files are what this writes. What was published stands in ``PUBLISHED``, all of
it from a transcription of the RoLoRA paper (arXiv:2502.01755), not from the paper itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
SECOND_HAND = "arXiv:2502.01755 (RoLoRA, NeurIPS 2025), second-hand: from a transcription"

# task: the hub's configuration, its columns, the split that has labels, rows in training
GLUE = {
    "sst2": ("sentence", "validation", 67_349),
    "qnli": (["question", "sentence"], "validation", 104_743),
    "mnli": (["premise", "hypothesis"], "validation_matched", 392_702),
    "qqp": (["question1", "question2"], "validation", 363_846),
    "rte": (["sentence1", "sentence2"], "validation", 2_490),
}

ROBERTA = """\
# {title}
# {more}
[model]
path = "roberta-large"
head = "freeze"  # random, and never sent, as in the authors' code

[lora]
rank = {rank}
alpha = 32
dropout = 0.1
target_modules = ["query", "value"]
layers = {layers}

[data]
train = "nyu-mll/glue:{task}"  # {rows:,} rows
test = "nyu-mll/glue:{task}"
test_split = "{split}"  # the test split of GLUE has no labels{second}
text = {text}
max_length = 128

[partition]
scheme = "{scheme}"
clients = {clients}{alpha}

[train]
rounds = {rounds}
local_steps = {steps}
batch_size = 32
optimizer = "sgd"
lr = 5e-3  # the paper: the best of 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1
weight_decay = 2e-4

[eval]
every = 5
"""

SECOND = """
second_test = "nyu-mll/glue:mnli"
second_split = "validation_mismatched"
second_name = "mismatched"  # measured too, as accuracy/mismatched"""

LLAMA = """\
# {title}
# {more}
[model]
path = "meta-llama/Llama-2-7b-hf"  # gated: accept its licence on the hub, then: hf auth login
task = "causal_lm"
dtype = "bf16"

[lora]
rank = 8
alpha = 16
target_modules = ["q_proj", "v_proj"]

[data]
train = "../../data/{data}/train.jsonl"
test = {test}
prompt = "prompt"
completion = "completion"{choice}
max_length = 512
made_by = "{made_by}"

[partition]
clients = 50

[train]
rounds = 30
local_steps = 20
batch_size = 2
lr = 5e-4

[eval]
every = 10{answers}
"""
PREPARE = "python experiments/llama-2-7b/prepare.py"
CLONE = "git clone https://github.com/{repository} (or bring that folder over), then: " + PREPARE
COMMONSENSE_FILES = {
    "data": "commonsense",
    "made_by": CLONE.format(repository="AGI-Edgerunners/LLM-Adapters")
    + " LLM-Adapters data/commonsense",
    "choice": """
choices = "choices"  # with model.task=choice
answer = "answer\"""",
    "answers": """
generate = 500
answer = "true|false|(solution|answer|ending|option)[1-5]\"""",
}
INSTRUCTIONS = {
    "alpaca": ("Alpaca", "tatsu-lab/stanford_alpaca", "stanford_alpaca/alpaca_data.json"),
    "code-alpaca": (
        "Code Alpaca",
        "sahil280114/codealpaca",
        "codealpaca/data/code_alpaca_20k.json",
    ),
}

# 50 clients, rank 4, accuracy in percent
PUBLISHED = {
    "sst2": {"fedit": 93.00, "ffa_lora": 93.23, "flexlora": 54.08, "rolora": 94.80},
    "qnli": {"fedit": 78.13, "ffa_lora": 85.05, "flexlora": 55.40, "rolora": 90.00},
    "mnli": {"fedit": 52.64, "ffa_lora": 69.97, "flexlora": 39.14, "rolora": 82.98},
    "qqp": {"fedit": 77.60, "ffa_lora": 78.44, "flexlora": 72.00, "rolora": 85.71},
    "rte": {"fedit": 52.23, "ffa_lora": 55.72, "flexlora": 52.71, "rolora": 75.57},
}
# clients, overrides of TASK-50.toml: the mean over the five tasks
AVERAGES = {
    "average-50": ((), {"fedit": 70.72, "ffa_lora": 76.48, "flexlora": 54.67, "rolora": 85.81}),
    "average-50-rank-8": (
        ("lora.rank=8",),
        {"fedit": 64.03, "ffa_lora": 72.46, "rolora": 86.27},
    ),
    "average-20": (
        ("partition.clients=20", "train.rounds=75"),
        {"fedit": 78.90, "rolora": 87.03},
    ),
    "average-3": (
        ("partition.clients=3", "train.rounds=500"),
        {"fedit": 88.20, "ffa_lora": 87.48, "rolora": 88.28},
    ),
}
COMMONSENSE = {
    "boolq": {"fedit": 61.42, "ffa_lora": 53.43, "rolora": 61.83},
    "piqa": {"fedit": 33.19, "ffa_lora": 35.49, "rolora": 61.26},
    "siqa": {"fedit": 31.88, "ffa_lora": 10.63, "rolora": 39.76},
    "hellaswag": {"fedit": 21.23, "ffa_lora": 11.81, "rolora": 27.49},
    "winogrande": {"fedit": 31.36, "ffa_lora": 1.61, "rolora": 47.67},
    "arc-e": {"fedit": 27.36, "ffa_lora": 6.88, "rolora": 33.19},
    "arc-c": {"fedit": 32.03, "ffa_lora": 7.93, "rolora": 40.13},
    "obqa": {"fedit": 26.07, "ffa_lora": 15.00, "rolora": 31.67},
}


def glue(task: str, title: str, more: str, **changed: object) -> str:
    """The configuration of one GLUE experiment; ``changed`` differs from 50 clients at rank 4."""
    text, split, rows = GLUE[task]
    values = {
        "rank": 4,
        "layers": '"all"',
        "scheme": "iid",
        "clients": 50,
        "alpha": "",
        "second": SECOND if task == "mnli" else "",
        "rounds": 30,
        "steps": 20,
        **changed,
    }
    if isinstance(values["alpha"], float):
        values |= {"scheme": "dirichlet", "alpha": f"\nalpha = {values['alpha']}"}
    return ROBERTA.format(
        title=title, more=more, task=task, split=split, rows=rows, text=json.dumps(text), **values
    )


def glue_files() -> Iterator[tuple[str, str]]:
    """Name and content of every file in ``glue-roberta-large``."""
    vary = "Others by overrides: partition.clients, lora.rank, lora.layers, method.name"
    for task, results in PUBLISHED.items():
        rounds = vary if task == "qnli" else f"Rounds as for QNLI. {vary}"
        yield f"{task}-50.toml", glue(task, f"{task.upper()}, 50 clients, rank 4", rounds)
        yield (
            f"{task}-50.published.json",
            published(f"{task.upper()}, RoBERTa-Large, 50 clients, rank 4", results),
        )
    for clients, rounds in ((20, 75), (3, 500)):
        more = "As many rounds as leave the samples about those of 50 clients. No numbers by task"
        title = f"QNLI, {clients} clients, rank 4"
        yield f"qnli-{clients}.toml", glue("qnli", title, more, clients=clients, rounds=rounds)
    authors = 'What the authors\' code sets; its 20 "local epochs" are 20 batches'
    yield "qnli-authors-code.toml", glue("qnli", "QNLI, 50 clients, rank 8", authors, rank=8)
    top = 'The authors\' code has it as a variant; "top:5" is another'
    yield (
        "qnli-top-6.toml",
        glue(
            "qnli", "QNLI, 50 clients, adapters in the top 6 layers", top, rank=8, layers='"top:6"'
        ),
    )
    ours = "The rounds were not found: these leave the samples those of 50 clients"
    for alpha, clients, results in (
        (0.5, 10, {"fedit": 81.19, "rolora": 82.60}),
        (1.0, 15, {"fedit": 74.54, "rolora": 81.55}),
    ):
        title = f"MNLI, {clients} clients, Dirichlet {alpha}"
        name = f"mnli-dirichlet-{clients}"
        yield (
            f"{name}.toml",
            glue("mnli", title, ours, alpha=alpha, clients=clients, rounds=1500 // clients),
        )
        yield f"{name}.published.json", published(title + ", RoBERTa-Large, rank 4", results)
    title = "MNLI, 50 clients, one local step instead of 20"
    yield "mnli-local-steps-1.toml", glue("mnli", title, ours, steps=1, rounds=600)
    yield (
        "mnli-local-steps-1.published.json",
        published(title + ", RoBERTa-Large", {"ffa_lora": 72.52, "rolora": 84.39}),
    )
    for name, (overrides, results) in AVERAGES.items():
        more = {"experiments": [f"{task}-50.toml" for task in GLUE], "overrides": [*overrides]}
        where = "the mean over SST-2, QNLI, MNLI, QQP and RTE, RoBERTa-Large"
        yield f"{name}.published.json", published(where, results, **more)


def llama_files() -> Iterator[tuple[str, str]]:
    """Name and content of every file in ``llama-2-7b``."""
    known = "Beside clients and rank the setting was not found; it is ours"
    for task, results in COMMONSENSE.items():
        test = json.dumps(f"../../data/commonsense/test/{task}.jsonl")
        title = f"Commonsense questions, answers written out: {task}"
        yield f"{task}.toml", LLAMA.format(title=title, more=known, test=test, **COMMONSENSE_FILES)
        yield (
            f"{task}.published.json",
            published(
                f"{task}, Llama-2-7B, 50 clients, rank 8, answers generated and matched",
                results,
                "answer_accuracy",
            ),
        )
    title = "Commonsense questions: train once, then rolora eval on all eight sets"
    share = "0.005  # of the rows to train on"
    yield (
        "commonsense.toml",
        LLAMA.format(title=title, more=known, test=share, **COMMONSENSE_FILES),
    )
    for name, (title, repository, file) in INSTRUCTIONS.items():
        yield (
            f"{name}.toml",
            LLAMA.format(
                title=f"{title}, an instruction set",
                more=f"{known}. No numbers were found",
                data=name,
                test=0.02,
                choice="",
                answers="",
                made_by=f"{CLONE.format(repository=repository)} {file} data/{name}/train.jsonl",
            ),
        )


def published(
    setting: str, results: Mapping[str, float], metric: str = "accuracy", **more: object
) -> str:
    """Numbers from the paper as a file; ``metric`` is ours."""
    values = {
        "source": SECOND_HAND,
        "setting": setting,
        "metric": metric,
        "unit": "percent",
        "results": dict(results),
        **more,
    }
    return json.dumps(values, indent=2) + "\n"


def files() -> dict[Path, str]:
    """Every file that this writes, and its content."""
    found = {HERE / "glue-roberta-large" / name: text for name, text in glue_files()}
    return found | {HERE / "llama-2-7b" / name: text for name, text in llama_files()}


def main() -> None:
    """Write the files."""
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
