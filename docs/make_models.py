"""Write the table of docs/models.md: what becomes of each architecture, on tiny random models.

    python docs/make_models.py

It takes about a minute. A test trains each architecture and compares its line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pages import put

from rolora.files import write_file

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT / "tests"))

from architectures import CASES, Outcome, outcome  # noqa: E402


def line(model_type: str, task: str, found: Outcome) -> str:
    """The architecture's line of the table."""
    cells = ["no" if why else "yes" for why in (found.default, found.all_linear)]
    return f"| `{model_type}` | {task} | {' | '.join(cells)} | {'yes' if found.packed else 'no'} |"


def refusals(model_type: str, task: str, found: Outcome) -> list[str]:
    """What is said where the architecture is refused; once where both choices are alike."""
    return [
        f"- `{model_type}`, {task}: {why}"
        for why in dict.fromkeys((found.default, found.all_linear))
        if why
    ]


def main() -> None:
    """Write the page."""
    lines, said = [], []
    for model_type, task in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = outcome(model_type, task, Path(folder))
        lines.append(line(model_type, task, found))
        said += refusals(model_type, task, found)
    page = put(put(PAGE.read_text(), "models", [HEAD, RULE, *lines]), "refusals", said)
    write_file(PAGE, page)


HEAD = "| `model_type` | task | PEFT's default | all-linear | packed |"
RULE = "|---|---|---|---|---|"

if __name__ == "__main__":
    main()
