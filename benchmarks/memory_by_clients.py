"""Anonymous memory of a run with 10 and with 200 clients, at the same rows and bank size.

    python benchmarks/memory_by_clients.py CONFIG.toml [METHOD]

Each run is a process of its own: two rounds in which every client takes part, with as many local
steps that both make the same number of passes through the model. Two figures, both ``Anonymous`` in
/proc/self/smaps_rollup (Linux): the peak over rounds, which has the allocator's slack in it (some
50 MB either way), and what is held at the end of a round once freed memory has been given back.
"""

from __future__ import annotations

import ctypes
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
    peak = held = 0
    for _ in run.rounds():
        gc.collect()
        peak = max(peak, anonymous_kilobytes())
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        held = anonymous_kilobytes()
    return {"clients": clients, "peak_kib": peak, "held_kib": held}


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
    for what in ("peak_kib", "held_kib"):
        print(f"{method}: {what} grows by {(found[1][what] - found[0][what]) / 190:.1f} per client")


if __name__ == "__main__":
    main()
