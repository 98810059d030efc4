"""Makes rows with a prompt and a completion of instruction sets in Alpaca's format.

    python experiments/llama-2-7b/prepare.py alpaca_data.json data/alpaca/train.jsonl
    python experiments/llama-2-7b/prepare.py code_alpaca_20k.json data/code-alpaca/train.jsonl
    python experiments/llama-2-7b/prepare.py LLM-Adapters data/commonsense

The files are those of the GitHub repositories tatsu-lab/stanford_alpaca and
sahil280114/codealpaca: a list of objects with instruction, input and output. LLM-Adapters is the
folder of the repository AGI-Edgerunners/LLM-Adapters, with eight sets of commonsense questions:
``train.jsonl`` comes of its 170,000 rows to train on, ``test/NAME.jsonl`` of the test rows of each
set. The text around them is Alpaca's.

A commonsense question ends with "Answer format: true/false", or the like. So its rows also have the
answers that it lets one choose from, and serve both ways: the answer written out, or the likeliest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
PLAIN = f"{TASK}. {REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
WITH_INPUT = (
    f"{TASK}, paired with an input that provides further context. {REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
TRAIN = "ft-training_set/commonsense_170k.json"
TESTS = {  # our name: their folder
    "boolq": "boolq",
    "piqa": "piqa",
    "siqa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc-e": "ARC-Easy",
    "arc-c": "ARC-Challenge",
    "obqa": "openbookqa",
}
FORMAT = "Answer format:"


def rows(objects: Iterable[Mapping[str, str]]) -> Iterator[dict[str, object]]:
    """Each object with an output as a prompt and its completion."""
    for one in objects:
        if one["output"].strip():
            template = WITH_INPUT if one.get("input", "").strip() else PLAIN
            yield {"prompt": template.format_map(one), "completion": one["output"]}


def questions(objects: Iterable[Mapping[str, str]]) -> Iterator[dict[str, object]]:
    """The same of commonsense questions, with the completions to choose from."""
    for one in objects:
        labels = one["instruction"].rpartition(FORMAT)[2].strip().split("/")
        before = one["output"].removesuffix(one["answer"])  # "the correct answer is "
        for row in rows([one]):
            yield {**row, "choices": [before + label for label in labels], "answer": one["output"]}


def read(file: Path) -> list[dict[str, str]]:
    """The objects of one file."""
    found: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write(file: Path, found: Iterable[Mapping[str, object]]) -> None:
    """JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def main(source: Path, to: Path) -> None:
    """One file of one file; of the folder, the training rows and those of each test."""
    if not source.is_dir():
        write(to, rows(read(source)))
        return
    write(to / "train.jsonl", questions(read(source / TRAIN)))
    for name, folder in TESTS.items():
        found = read(source / "dataset" / folder / "test.json")
        write(to / "test" / f"{name}.jsonl", questions(found))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
