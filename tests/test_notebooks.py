"""The notebooks run from the first cell to the last, and are kept without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
every_notebook = pytest.mark.parametrize(
    "file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem
)


def code(file: Path) -> list[dict[str, Any]]:
    """The cells with code."""
    cells = json.loads(file.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@every_notebook
def test_the_cells_of_a_notebook_run_in_their_order(file: Path, here: Path) -> None:
    program = "\n\n".join("".join(cell["source"]) for cell in code(file))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss" in done.stdout


@every_notebook
def test_a_notebook_runs_in_a_kernel(file: Path, here: Path) -> None:
    reason = "nbclient and a kernel are in the extra docs"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    book = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": here}}).execute()


@every_notebook
def test_a_notebook_is_kept_without_outputs(file: Path) -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code(file))
