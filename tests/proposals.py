"""What ``rolora init`` proposes, written as the command writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rolora.files import write_file
from rolora.proposal.template import propose
from rolora.run.experiment import Experiment


def write_template(
    source: str, out: Path, *given: Any, **options: Any
) -> tuple[list[str], Experiment]:
    """What ``propose`` has to say, and its experiment; the file is in ``out``."""
    made = propose(source, out, *given, **options)
    write_file(out, made.text)
    return list(made.notes), made.experiment
