"""``blind.py TARGET SECONDS FOLDER``: seeds changed at random, where there is no atheris."""

from __future__ import annotations

import random
import resource
import signal
import sys
import time
from pathlib import Path

from fuzz import MEMORY, SECONDS, crashes, load
from fuzz.changes import changed


def main(name: str, seconds: int, folder: Path) -> None:
    """SystemExit with 1 for the first input that goes wrong, which is left in ``folder``."""
    target, seeds = load(name)
    seeds = [*seeds, *(file.read_bytes() for file in crashes(name))]
    for seed in seeds:
        target(seed)
    draws, most, count = random.Random(0), peak() + MEMORY, 0
    began = shown = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        data = changed(seeds, draws)
        (folder / "input").write_bytes(data)  # if the process dies, this is why
        signal.alarm(SECONDS)
        target(data)
        signal.alarm(0)
        assert peak() < most, f"{peak()} MB"
        count += 1
        if now > shown + 10:
            shown = now
            print(f"#{count} rss: {peak()}Mb", file=sys.stderr, flush=True)
    spent = int(time.monotonic() - began)
    print(f"rss: {peak()}Mb\nDone {count} runs in {spent} second(s)", file=sys.stderr)


def peak() -> int:
    """The most memory this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
