"""``python -m tests.fuzz TARGET --seconds N``: give a target as many inputs as fit in the time.

With atheris (``tests/fuzz/requirements.txt``, Linux) inputs that reach new lines of rolora are kept
and changed further; without it, seeds are changed at random. An input that raises, takes over 10
seconds or 512 MB ends it, and is left in ``build/fuzz/TARGET``: exit code 1. ``--record`` adds the
count to ``docs/reliability/fuzzing.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest does

from figures import record

from fuzz import TARGETS

COLUMNS = ("target", "guided by", "inputs", "seconds", "crashes", "most memory, MB")


def main() -> int:
    parser = argparse.ArgumentParser(description="Give a target many inputs.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--record", action="store_true")
    chosen = parser.parse_args()
    found = Path("build") / "fuzz" / chosen.target
    (found / "corpus").mkdir(parents=True, exist_ok=True)
    guided = importlib.util.find_spec("atheris") is not None
    command = [sys.executable, str(Path(__file__).with_name("guided.py" if guided else "blind.py"))]
    path = ["src", ".", "tests", os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [*command, chosen.target, str(chosen.seconds), str(found)],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        told += line
    code = process.wait()
    done = re.search(r"^Done (\d+) runs? in (\d+) second", told, re.MULTILINE)
    inputs = re.findall(r"^#(\d+)", told, re.MULTILINE)
    memory = max((int(mb) for mb in re.findall(r"rss: (\d+)Mb", told)), default=0)
    count, seconds = map(int, done.groups()) if done else (int((inputs or ["0"])[-1]), 0)
    print(f"{chosen.target}: {count:,} inputs, {'a crash' if code else 'no crash'}; see {found}")
    if chosen.record:
        row = [
            chosen.target,
            "coverage" if guided else "chance",
            count,
            seconds,
            int(code != 0),
            memory,
        ]
        record("fuzzing", "make fuzz TARGET=... SECONDS=...", COLUMNS, [row])
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
