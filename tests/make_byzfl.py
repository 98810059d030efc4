"""Write byzfl.json, the values of byzfl's rules that tests compare ours with.

Needs byzfl (0.0.11 wrote the file), which is no dependency of ours: python tests/make_byzfl.py
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

KEPT = Path(__file__).with_name("byzfl.json")


def vectors(seed: int, far: float) -> np.ndarray:
    """Eleven updates of seven coordinates; the last two are ``far`` times as long."""
    drawn = np.random.default_rng(seed).normal(size=(11, 7))
    drawn[-2:] *= far
    return np.round(drawn, 6)


def main() -> None:
    """Each rule on near and on far updates, with f = 2."""
    byzfl: Any = import_module("byzfl")
    rules = {
        "median": byzfl.Median(),
        "trimmed_mean": byzfl.TrMean(f=2),
        "krum": byzfl.Krum(f=2),
        "multi_krum": byzfl.MultiKrum(f=2),
        "geometric_median": byzfl.GeometricMedian(nu=1e-9, T=2000),
        "centered_clip": byzfl.CenteredClipping(L=5, tau=1.5),
    }
    cases = []
    for seed, far in ((0, 1.0), (1, 1.0), (2, 50.0), (3, 50.0)):
        given = vectors(seed, far)
        mixed = np.asarray(byzfl.NNM(f=2)(given))
        found = {name: np.asarray(rule(given)).tolist() for name, rule in rules.items()}
        rules["centered_clip"].m = None  # byzfl would go on from its last result
        found["nnm"] = mixed.tolist()
        found["nnm+trimmed_mean"] = np.asarray(rules["trimmed_mean"](mixed)).tolist()
        found["nnm+krum"] = np.asarray(rules["krum"](mixed)).tolist()
        cases.append({"vectors": given.tolist(), "found": found})
    KEPT.write_text(json.dumps({"byzfl": version("byzfl"), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
