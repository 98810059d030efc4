"""Makes rows with a prompt and a completion of an instruction set in Alpaca's format.

    python experiments/llama-2-7b/prepare.py alpaca_data.json data/alpaca/train.jsonl
    python experiments/llama-2-7b/prepare.py code_alpaca_20k.json data/code-alpaca/train.jsonl
    python experiments/llama-2-7b/prepare.py commonsense_170k.json data/commonsense/train.jsonl
    python experiments/llama-2-7b/prepare.py boolq/test.json data/commonsense/boolq.jsonl

The files are those of the GitHub repositories tatsu-lab/stanford_alpaca, sahil280114/codealpaca and
AGI-Edgerunners/LLM-Adapters: a list of objects with instruction, input and output. The text around
them is Alpaca's.
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


def rows(objects: Iterable[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """Each object with an output as a prompt and its completion."""
    for one in objects:
        if one["output"].strip():
            template = WITH_INPUT if one.get("input", "").strip() else PLAIN
            yield {"prompt": template.format_map(one), "completion": one["output"]}


def main(source: Path, to: Path) -> None:
    """Write JSON lines."""
    to.parent.mkdir(parents=True, exist_ok=True)
    found = rows(json.loads(source.read_text(encoding="utf-8")))
    to.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
