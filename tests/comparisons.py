"""Small comparisons on a tiny site, and what is left of them bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rolora.comparison.grid import Comparison, plan
from rolora.comparison.queue import queued_runs
from rolora.config.load import load_config
from rolora.results.export import export_results
from rolora.results.runs import load_run

METHODS = ("rolora", "fedit")
GRID = "train.lr=1e-2,1e-1"
SMALL = ("train.rounds=2", "eval.every=1")


def planned(
    site: Path,
    *overrides: str,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    tune: Sequence[str] = (GRID,),
    tune_seeds: Sequence[int] = (100,),
) -> Comparison:
    config = load_config(site, [*SMALL, *overrides])
    return plan(config, dict.fromkeys(methods, ()), seeds, tune, tune_seeds, tune_rounds=1)


def finish(comparison: Comparison, path: Path) -> Path:
    for queued in queued_runs(comparison, path):
        list(queued.run.rounds())
    return path


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def everything(path: Path) -> dict[str, object]:
    """All that a comparison left, bit for bit, but for what the clock says."""
    found: dict[str, object] = {"tuning": (path / "tuning.json").read_text()}
    for run in sorted([*path.glob("*-seed*"), *path.glob("tuning/*-seed*")]):
        adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        found[run.name] = (lines(run), hashlib.sha256(adapter).hexdigest())
    table = export_results([load_run(run) for run in sorted(path.glob("*-seed*"))])
    for row in table["methods"]:
        del row["seconds"]
    return {**found, "table": table}
