"""Run the benches, write their records, and print the tables.

    python -m benchmarks --peers .venv-bench/bin/python [BENCH ...] [--quick] [--threads N]

``--quick`` does two repetitions of small settings and writes to benchmarks/records/quick, which no
page is made from.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks import benches, tables
from benchmarks.place import ROOT, Place

NAMES = [module.name for module in pkgutil.iter_modules(benches.__path__)]
OURS = ("rolora", "torch", "transformers", "peft", "safetensors", "numpy")
PEERS = ("flwr", "ray", "pfl", "torch", "transformers", "peft", "numpy")


def versions(peers: str) -> dict[str, str]:
    """Of both environments; the peers' names have "peers: " in front."""
    code = f"from importlib.metadata import version as v; print(*map(v, {PEERS!r}))"
    done = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=True)
    theirs = {f"peers: {n}": v for n, v in zip(PEERS, done.stdout.split(), strict=True)}
    return {**{name: version(name) for name in OURS}, **theirs}


def main() -> None:
    """Run what was asked for, everything if nothing was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("bench", nargs="*", choices=[*NAMES, []], help="left out: all of them")
    parser.add_argument("--peers", required=True, help="a Python with benchmarks/constraints.txt")
    parser.add_argument("--data", type=Path, default=ROOT / "demo", help="model and questions")
    parser.add_argument("--threads", type=int, default=1, help="torch threads in every process")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    records = ROOT / "benchmarks" / "records" / ("quick" if asked.quick else "")
    records.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(
            ours=sys.executable,
            peers=str(Path(asked.peers).absolute()),
            data=asked.data,
            scratch=Path(scratch),
            records=records,
            threads=asked.threads,
            cores=len(os.sched_getaffinity(0)),
            quick=asked.quick,
            versions=versions(asked.peers),
        )
        for name in asked.bench or NAMES:
            started = time.perf_counter()
            importlib.import_module(f"benchmarks.benches.{name}").run(place)
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(tables.page(records))


if __name__ == "__main__":
    main()
