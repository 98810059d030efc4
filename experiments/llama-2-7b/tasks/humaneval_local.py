"""HumanEval for lm-evaluation-harness out of a file: its rows, and whether a program passes.

The rows are in data/humaneval of this repository, or of the folder that the command runs in.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

ROWS = Path("data", "humaneval", "test.jsonl")
SECONDS = 10.0


def rows(**_: Any) -> dict[str, datasets.Dataset]:
    """The problems, as the harness takes data sets."""
    for root in (Path(), Path(__file__).parents[3]):
        if (file := root / ROWS).is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
    raise FileNotFoundError(f"{ROWS} is not there; get it with: rolora fetch humaneval --to data")


def programs(answers: Sequence[Sequence[str]], rows: Sequence[dict[str, str]]) -> list[list[str]]:
    """Each prompt with what the model wrote behind it."""
    return [
        [row["prompt"] + text for text in texts] for row, texts in zip(rows, answers, strict=True)
    ]


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]], **_: Any) -> float:
    """The share of a problem's programs that pass its test."""
    (test,), (written,) = references, predictions
    return sum(passes(f"{program}\n{test}") for program in written) / len(written)


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end without an error, in a process and folder of its own.

    That keeps accidents away, not attacks: it runs with the rights of whoever calls this.
    """
    end = secrets.token_hex()  # else a program that leaves early would pass
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "program.py")
        text = f"{program}\nprint({end!r})\n"
        file.write_text(text, encoding="utf-8", errors="replace", newline="")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(file)],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.decode(errors="replace").endswith(f"{end}\n")
