"""Anonymous memory of a run with 10 and with 200 clients, at the same rows and bank size.

    python benchmarks/memory_by_clients.py CONFIG.toml [METHOD]

Each run is a process of its own: two rounds in which every client takes part, with as many local
steps that both make the same number of passes through the model. The figure is the peak over rounds
of ``Anonymous`` in /proc/self/smaps_rollup (Linux).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def anonymous_kilobytes() -> int:
    """This process's anonymous memory, in KiB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1])
    raise OSError("no Anonymous line in /proc/self/smaps_rollup")


def measure(config: str, clients: int, method: str, folder: str) -> dict[str, int]:
    """Peak KiB over two rounds with this many clients."""
    from rolora import load_config, start

    changes = [
        f"partition.clients={clients}",
        "partition.scheme=iid",
        f"method.name={method}",
        "train.rounds=2",
        "train.participation=1.0",
        f"train.local_steps={200 // clients}",
        "train.bank=10",
        "eval.every=100",
    ]
    run = start(load_config(config, changes), Path(folder) / "run")
    peak = 0
    for _ in run.rounds():
        gc.collect()
        peak = max(peak, anonymous_kilobytes())
    return {"clients": clients, "anonymous_kib": peak}


def main() -> None:
    """Measure both sizes and print the growth per client."""
    config, *rest = sys.argv[1:]
    method = rest[0] if rest else "rolora"
    if len(rest) == 2:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(config, int(rest[1]), method, folder)))
        return
    found = []
    for clients in (10, 200):
        command = [sys.executable, __file__, config, method, str(clients)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1])
    grown = found[1]["anonymous_kib"] - found[0]["anonymous_kib"]
    print(f"{method}: {grown / 190:.1f} KiB more per client")


if __name__ == "__main__":
    main()
