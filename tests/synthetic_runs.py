"""Run folders that look as real ones do, made of a formula and no training.

``python tests/synthetic_runs.py FOLDER`` writes some there, and a page for each kind of reader:
three methods with three seeds, one run, eight methods with 200 clients and unkind names, and twenty
methods of which some are unfinished.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from rolora.attacks.attack import bad_clients

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
FULL = 36_864  # bytes one client sends in a round when both factors travel

METHODS: dict[str, dict[str, Any]] = {  # final accuracy, aggregation error, share of FULL sent up
    "rolora": {"reaches": 0.84, "error": 2e-8, "sends": 0.5},
    "ffa_lora": {"reaches": 0.79, "error": 0.0, "sends": 0.5},
    "fedit": {"reaches": 0.81, "error": 0.4, "sends": 1.0},
    "local": {"reaches": 0.66, "error": None, "sends": 0.0},
    "centralized": {"reaches": 0.88, "error": 0.0, "sends": 0.0},
}


def write_run(
    path: Path,
    method: str = "rolora",
    *,
    seed: int = 0,
    name: str = "questions",
    metric: str = "accuracy",
    clients: int = 20,
    rounds: int = 40,
    every: int = 5,
    labels: Sequence[str] = LABELS,
    per_client: bool = True,
    options: dict[str, Any] | None = None,
    rejected: dict[str, str] | None = None,
    reaches: float | None = None,
    error: float | None = 0.2,
    sends: float = 0.5,
    lr: float = 5e-3,
    attack: str | None = None,
) -> Path:
    """One run folder; for a method of ``METHODS``, ``error`` and ``sends`` are those it says."""
    rng = random.Random(f"{method} {seed}")
    known = METHODS.get(method, {"reaches": 0.8, "error": error, "sends": sends})
    goal = reaches if reaches is not None else known["reaches"] + rng.uniform(-0.012, 0.012)
    path.mkdir(parents=True)
    ids = [f"client-{number:03d}" for number in range(clients)]
    config = {
        "name": name,
        "seed": seed,
        "model": {"path": "models/minilm", "task": "classification", "dtype": "auto"},
        "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["query", "value"]},
        "data": {"train": "train.csv", "test": 0.2},
        "partition": {"scheme": "dirichlet", "clients": clients, "alpha": 0.5},
        "method": {"name": method, **(options or {})},
        "train": {
            "rounds": rounds,
            "participation": 0.5,
            "local_steps": 5,
            "batch_size": 8,
            "lr": lr,
        },
        "eval": {"every": every},
        "provenance": {
            "versions": {"python": "3.11.7", "rolora": "0.1.0", "torch": "2.13.0"},
            "git_commit": "5905833d2625bf100bb45393746601b37fe729c4",
            "root": "/home/someone/secret-project",
            "cpu": "x86_64 AVX512",
            "threads": 2,
            "bank": 10,
            "data": f"0cfc065873cb0bece35638a85a6b-{seed}",
        },
    }
    bad = frozenset[str]()
    if attack is not None:
        config |= {"attack": {"name": attack, "clients": 3}}
        config |= {"aggregate": {"reducer": ["nnm", "trimmed_mean"], "byzantine": 3}}
        bad = bad_clients(ids, 3, seed)
    (path / "config.toml").write_text(tomli_w.dumps(config))
    (path / "partition.json").write_text(json.dumps(_partition(ids, labels, seed)))
    lines = [
        _line(number, rng, ids, known, goal, metric, every, rounds, per_client, rejected or {})
        for number in range(rounds + 1)
    ]
    rows = {label: 3 + 7 * place for place, label in enumerate(labels)}
    layers = [f"base_model.model.encoder.layer.{n}.attention.self.query" for n in range(6)]
    (path / "axes.json").write_text(json.dumps({"labels": rows, "layers": layers}))
    for number, line in enumerate(lines):
        if bad:
            shares = {c: 0.9 if c in bad else rng.choice([0.0, 0.1]) for c in line["clients"]}
            line["cut"] = {client: share for client, share in shares.items() if share}
            if line["metrics"]:
                line["metrics"]["attack_success"] = round(0.6 * math.exp(-number / 20), 3)
        if line["metrics"] and method != "local":
            line["layers"] = {
                "norm_A": [round(1 + 0.1 * n + 0.05 * number, 3) for n in range(6)],
                "norm_B": [round(0.04 * number * (1 + n), 3) for n in range(6)],
                "effective_rank": [
                    None if number == 0 or n == 5 else round(1 + 0.4 * n + rng.random(), 3)
                    for n in range(6)
                ],
            }
            if method == "centralized":
                del line["layers"]["effective_rank"]
        if rows and line["metrics"]:
            line["recall"] = [round(rng.uniform(0, goal), 4) for _ in rows]
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def cut_short(run: Path, rounds: int) -> Path:
    """The same folder, as it was after so many rounds."""
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text("".join(lines[: rounds + 1]))
    return run


def _partition(ids: Sequence[str], labels: Sequence[str], seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    clients = []
    for client in ids:
        counts = {label: int(40 * rng.random() ** 4) for label in labels}
        held = {label: count for label, count in counts.items() if count}
        rows = sum(held.values()) if labels else rng.randint(10, 80)
        clients.append({"id": client, "num_examples": max(rows, 1), "labels": held})
    return {"clients": clients, "dropped": 3, "note": "2 clients topped up to 1 row"}


def _line(
    number: int,
    rng: random.Random,
    ids: Sequence[str],
    known: dict[str, Any],
    goal: float,
    metric: str,
    every: int,
    rounds: int,
    per_client: bool,
    rejected: dict[str, str],
) -> dict[str, Any]:
    cohort = sorted(rng.sample(ids, max(1, len(ids) // 2))) if number else []
    quality = 0.2 + (goal - 0.2) * (1 - math.exp(-number / 9)) + rng.gauss(0, 0.006) * (number > 0)
    loss = -math.log(min(quality, 0.99))
    evaluated = number % every == 0 or number == rounds
    values = {"accuracy": quality, "perplexity": math.exp(3 * loss), "loss": loss}
    wanted = {"accuracy": ["accuracy", "loss"], "perplexity": ["loss", "perplexity"]}[metric]

    def shown(shift: float) -> dict[str, float]:
        worse = {"accuracy": round(12 * max(0.0, min(1.0, quality + shift))) / 12}
        return {key: {**values, **worse}[key] for key in wanted}

    error = known["error"] if number else None
    return {
        "round": number,
        "attempt": 0,
        "factors": ["B" if number % 2 else "A", "head"] if number else [],
        "cohort": cohort,
        "loss": loss + rng.gauss(0, 0.03) if number else None,
        "lr": 0.005 if number else 0.0,
        "clients": {client: {"num_examples": 40, "steps": 5, "loss": loss} for client in cohort},
        "metrics": {key: values[key] for key in wanted} if evaluated else {},
        "validation": {},
        "client_metrics": {client: shown(rng.gauss(0, 0.12)) for client in ids}
        if evaluated and per_client
        else {},
        "aggregation_error": error and error * rng.uniform(0.6, 1.6),
        "bytes_up": int(FULL * known["sends"]) * len(cohort),
        "bytes_down": int(FULL * known["sends"] * 1.3) * len(cohort),
        "seconds": round(rng.uniform(0.8, 1.4), 3) if number else 0.4,
        "rejected": rejected if number == 7 else {},
    }


TUNING = {
    "metric": "accuracy",
    "rows": "validation rows: 10% of the training rows (data.validation = 0.1); no run trains "
    "on them",
    "seeds": [100, 101],
    "rounds": 20,
    "methods": [
        {
            "method": method,
            "trials": [
                {"values": {"train.lr": rate}, "scores": scores, "mean": mean}
                for rate, scores, mean in (
                    ("1e-3", [0.41, 0.45], 0.43),
                    ("5e-3", [0.79, 0.77], 0.78),
                    ("2e-1", [None, 0.31], None),
                )
            ],
            "best": {"train.lr": "5e-3"},
            "at_edge": {"train.lr": "smallest"} if method == "fedit" else {},
        }
        for method in ("rolora", "ffa_lora", "fedit")
    ],
}
PUBLISHED = {
    "source": "arXiv:2502.01755, table 1",
    "setting": "RoBERTa-Large, SST-2, 50 clients, rank 4, 20 local steps",
    "metric": "accuracy",
    "unit": "percent",
    "results": {"rolora": 94.8, "fedit": 93.0, "flexlora": 54.08},
}


SAMPLES = [
    {
        "prompt": f"{start}\nWhat is the capital of France? Answer:",
        "expected": " Paris",
        "before": before,
        "after": " باريس،\nبالطبع." if before else "Paris, of course: " + "x" * 300,
    }
    for start, before in (("Read <b>this</b>.", ""), ("اقرأ هذا.", "A capital is a kind of city"))
]


def gallery(folder: Path) -> list[Path]:
    """Run folders under ``folder`` and four pages about them; the pages' paths."""
    from rolora.report.page import write_report
    from rolora.results.published import Published
    from rolora.results.tuned import Tuning

    tuning, published = Tuning.model_validate(TUNING), Published.model_validate(PUBLISHED)

    three = [
        write_run(folder / "three" / f"{method}-seed{seed}", method, seed=seed)
        for method in ("rolora", "ffa_lora", "fedit")
        for seed in (0, 1, 2)
    ]
    one = write_run(folder / "one", metric="perplexity", labels=(), per_client=False)
    (one / "samples.json").write_text(json.dumps(SAMPLES))
    long = "_a_method_with_a_name_of_more_than_sixty_characters_as_papers_have_them"
    eight: dict[str, dict[str, Any]] = {
        **{method: {} for method in METHODS},
        "<script>alert(1)</script> & $x_1$": {"reaches": 0.7},
        long: {"sends": 2.0},
        "flora": {"options": {"rank": 8}},
    }
    many = [
        write_run(
            folder / "eight" / f"run-{number}",
            method,
            clients=200,
            labels=[f"{n} is a long label" for n in range(40)],
            rejected={"client-007": "lora_B has a value that is not finite"},
            lr=1e-3 if method == "local" else 5e-3,
            attack="backdoor" if method in ("rolora", "fedit") else None,
            **extra,
        )
        for number, (method, extra) in enumerate(eight.items())
    ]
    twenty = [
        write_run(folder / "twenty" / name, name) for name in (f"method_{n}" for n in range(20))
    ]
    for run in twenty[::7]:
        cut_short(run, 12)
    return [
        write_report(three, folder / "three.html", tuning, published),
        write_report([one], folder / "one.html"),
        write_report(many, folder / "eight.html"),
        write_report(twenty, folder / "twenty.html"),
    ]


if __name__ == "__main__":
    print(*gallery(Path(sys.argv[1])), sep="\n")
