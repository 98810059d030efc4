"""Writes the printed plan on ``docs/plan.md``: python docs/make_plan.py"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("plan.md")
BLOCK = re.compile(r"<!-- printed -->\n.*?<!-- end -->", re.DOTALL)


def printed(text: str) -> str:
    """The output of the first command on the page."""
    command = re.findall(r"^rolora .*$", text, re.MULTILINE)[0]
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, cwd=PAGE.parent.parent, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


def page() -> str:
    """The page with its command's current output."""
    text = PAGE.read_text()
    block = f"<!-- printed -->\n\n```\n{printed(text)}\n```\n\n<!-- end -->"
    return BLOCK.sub(lambda _: block, text)


if __name__ == "__main__":
    PAGE.write_text(page())
