"""``guided.py TARGET SECONDS FOLDER``: inputs that reach new lines of rolora are kept and changed
further (atheris, libFuzzer)."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import atheris

name, seconds, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
with atheris.instrument_imports(include=["rolora"]):
    from fuzz import LONGEST, MEMORY, SECONDS, crashes, load

    target, seeds = load(name)

for number, seed in enumerate([*seeds, *(file.read_bytes() for file in crashes(name))]):
    target(seed)
    (folder / "corpus" / f"seed-{number:03d}").write_bytes(seed)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
options = {
    "max_len": LONGEST,
    "timeout": SECONDS,
    "rss_limit_mb": used + MEMORY,
    "max_total_time": seconds,
    "seed": 1,
    "artifact_prefix": f"{folder}/",
    "print_final_stats": 1,
}
flags = [f"-{key}={value}" for key, value in options.items()]
atheris.Setup([sys.argv[0], str(folder / "corpus"), *flags], target)
atheris.Fuzz()
