"""Runs the studies behind docs/robustness.md and writes a record of each.

    python experiments/run_attacks.py               # all of attacks.toml, one after another
    python experiments/run_attacks.py mnist         # this one
    python docs/make_robustness.py                  # the page's tables, from the records

A study is what ``rolora attack`` does. Runs that are in ``runs/attacks`` are not repeated, so a
stopped study continues. The records were made with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from rolora.cli.progress import follow_all
from rolora.comparison.attacks import attacked_cells, plan_attacks
from rolora.comparison.queue import queue_all
from rolora.config.load import load_config
from rolora.files import write_file
from rolora.report.robustness import write_robustness
from rolora.results.robustness import export

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "attacks"
FOLDER = Path("runs") / "attacks"


def studies() -> dict[str, dict[str, Any]]:
    """All of ``attacks.toml`` by name."""
    found: dict[str, dict[str, Any]] = tomllib.loads((HERE / "attacks.toml").read_text("utf-8"))
    return found


def run(name: str, study: dict[str, Any]) -> None:
    """Run what is missing on disk, then write the page and the record."""
    config = load_config(HERE / study["config"], study.get("overrides", []))
    out, bad = FOLDER / name, study["bad"]
    comparisons = plan_attacks(
        config,
        out,
        methods=dict.fromkeys(study["methods"], ()),
        attacks=study["attacks"],
        rules=study["rules"],
        bad=bad,
        seeds=study["seeds"],
    )
    follow_all(queue_all({one.path: one.comparison for one in comparisons}))
    cells, metric, runs = attacked_cells(comparisons)
    write_robustness(cells, metric, bad, config.name, out / "report.html")
    seconds = sum(line["seconds"] for one in runs for line in one.rounds)
    made = {key: runs[0].provenance[key] for key in ("versions", "cpu", "threads", "git_commit")}
    hours = round(seconds * made["threads"] / 3600, 2)
    record = {"study": name, **study, "core_hours": hours, "made": made}
    text = json.dumps({**record, **export(cells, metric, bad)}, indent=1)
    RECORDS.mkdir(parents=True, exist_ok=True)
    write_file(RECORDS / f"{name}.json", text + "\n")


def main(names: list[str]) -> None:
    """Run the named studies, or all."""
    known = studies()
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown study {unknown[0]!r}; known: {', '.join(known)}")
    for name in names or known:
        run(name, known[name])


if __name__ == "__main__":
    main(sys.argv[1:])
