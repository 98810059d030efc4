"""Accuracy by megabytes sent up, for each way of writing uploads; and int4 without feedback.

    python benchmarks/wire_accuracy.py run CONFIG.toml RECORD.json [key=value ...]
    python benchmarks/wire_accuracy.py table RECORD.json

``run`` trains every format with seeds 0 to 4, two runs at a time, and adds each finished run to the
record, so that it can be stopped and called again; ``table`` prints what docs/wire.md shows. Runs
of a seed share rows, cohorts and batches, so their differences are paired.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ARMS = ("fp32", "int8", "int4", "int4 without feedback")
SEEDS = range(5)
SETTING = (
    "train.rounds=16",
    "train.participation=0.5",
    "eval.every=2",
    "data.max_length=32",
)


@dataclass(frozen=True)
class Forgetful:
    """An engine whose clients throw away what their uploads rounded away."""

    engine: Any
    folder: Path

    def clients(self) -> Any:
        """As the engine."""
        return self.engine.clients()

    def run(self, method: Any, job: Any) -> Iterator[Any]:
        """The updates of the engine; no residual outlives the round."""
        yield from self.engine.run(method, job)
        for file in self.folder.glob("*/residual-*"):
            file.unlink()

    def evaluate(self, method: Any, clients: Any) -> Any:
        """As the engine."""
        return self.engine.evaluate(method, clients)


def measure(config: str, arm: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run: megabytes sent up so far and accuracy at every evaluated round."""
    import torch

    from rolora import load_config, start
    from rolora.config.load import read_toml

    torch.set_num_threads(1)
    up, *without = arm.split(maxsplit=1)
    settings = load_config(config, [*SETTING, *overrides, f"wire.up={up}", f"seed={seed}"])
    curve, sent, seconds = [], 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        run = start(settings, Path(folder) / "run")
        parts = run.experiment
        if without:
            forgetful = Forgetful(parts.engine, run.folder.clients)
            parts.federation = replace(parts.federation, engine=forgetful)
        for result in run.rounds():
            sent, seconds = sent + result.bytes_up, seconds + result.seconds
            if result.metrics:
                point = {"round": result.round, "bytes_up": sent}
                curve.append({**point, "accuracy": round(result.metrics["accuracy"], 6)})
        origin = read_toml(run.folder.config)["provenance"]
    machine = {key: origin[key] for key in ("versions", "git_commit", "cpu", "threads", "bank")}
    return {
        "arm": arm,
        "seed": seed,
        "curve": curve,
        "seconds": round(seconds, 1),
        "machine": machine,
    }


def record(config: str, target: Path, overrides: list[str]) -> None:
    """Run every seed and arm that the record lacks; it grows run by run."""
    found: list[dict[str, Any]] = json.loads(target.read_text())["runs"] if target.exists() else []
    done = {(one["seed"], one["arm"]) for one in found}
    wanted = [(seed, arm) for seed in SEEDS for arm in ARMS[:-1]]
    wanted += [(seed, ARMS[-1]) for seed in SEEDS]
    names = [Path(config).name, target.name]
    command = ["python", "benchmarks/wire_accuracy.py", "run", *names, *overrides]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, fresh) as pool:
        jobs = [
            pool.submit(measure, config, arm, seed, overrides)
            for seed, arm in wanted
            if (seed, arm) not in done
        ]
        for job in as_completed(jobs):
            found.append(job.result())
            found.sort(key=lambda one: (ARMS.index(one["arm"]), one["seed"]))
            content = {"command": " ".join(command), "setting": list(SETTING), "runs": found}
            target.write_text(json.dumps(content, indent=1) + "\n")
            print(len(found), "of", len(wanted), file=sys.stderr)


def within(run: dict[str, Any], budget: float) -> float:
    """The accuracy last measured before more than ``budget`` bytes had been sent up."""
    points: list[dict[str, Any]] = run["curve"]
    return float(
        max((p for p in points if p["bytes_up"] <= budget), key=lambda p: p["round"])["accuracy"]
    )


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation, in percent."""
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def table(content: dict[str, Any]) -> str:
    """The record as a Markdown table: at equal rounds, less fp32 seed by seed, at equal bytes."""
    done = [arm for arm in ARMS if sum(one["arm"] == arm for one in content["runs"]) > 1]
    runs = {arm: [one for one in content["runs"] if one["arm"] == arm] for arm in done}
    total = {arm: mean(one["curve"][-1]["bytes_up"] for one in runs[arm]) for arm in done}
    budgets = [total["int4"], total["int8"]]
    last = runs["fp32"][0]["curve"][-1]["round"]
    heads = ["seeds", f"accuracy, {last} rounds", "less fp32's, by seed", "MB up"]
    heads += [f"accuracy, {budget / 1e6:.2f} MB up" for budget in budgets]
    rows = [f"| uploads | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    plain = {one["seed"]: one["curve"][-1]["accuracy"] for one in runs["fp32"]}
    for arm in done:
        ends = {one["seed"]: one["curve"][-1]["accuracy"] for one in runs[arm]}
        cells = [
            str(len(ends)),
            spread(list(ends.values())),
            "" if arm == "fp32" else spread([ends[seed] - plain[seed] for seed in ends]),
            f"{total[arm] / 1e6:.2f}",
            *(spread([within(one, budget) for one in runs[arm]]) for budget in budgets),
        ]
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run, or print the table of a record."""
    what, *rest = sys.argv[1:]
    if what == "run":
        record(rest[0], Path(rest[1]), rest[2:])
    print(table(json.loads(Path(rest[what == "run"]).read_text())), end="")


if __name__ == "__main__":
    main()
