"""Run the commands of docs/quickstart.md and write what they print: python docs/make_quickstart.py

They run in a new folder, which gets the repository's ``data``: first rolora fetch minilm trec.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rolora.files import write_file

PAGE = Path(__file__).with_name("quickstart.md")
DATA = PAGE.parent.parent / "data"
STEPS = re.compile(
    r"^(?P<marked><!-- not run: [^\n]*\n)?```sh\n(?P<shell>.*?)^```$"
    r"|<!-- output(?:: (?P<shown>[^\n]*))? -->\n(?P<old>.*?)<!-- end -->",
    re.DOTALL | re.MULTILINE,
)
MOST = 14  # lines of an output; of a longer one the middle is left out


def printed(command: str, folder: Path) -> str:
    """What the command prints in this folder, on either stream; it must end well."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        env={**os.environ, "PATH": programs, "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}")
    return done.stdout.replace(str(Path.home()), "~")


def shortened(text: str) -> list[str]:
    """The lines without the middle, if they are many."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    if len(lines) <= MOST:
        return lines
    return [*lines[: MOST // 2], "...", *lines[-MOST // 2 :]]


def page(text: str, folder: Path) -> str:
    """The page with the output of each command, run in its order in ``folder``."""
    last = ""

    def filled(step: re.Match[str]) -> str:
        nonlocal last
        if step["shell"] is not None:
            last = "" if step["marked"] else printed(step["shell"], folder)
            return step[0]
        shown = last if step["shown"] is None else printed(step["shown"], folder)
        head = step[0].partition("\n")[0]
        return "\n".join([head, "", "```", *shortened(shown), "```", "", "<!-- end -->"])

    return STEPS.sub(filled, text)


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        if DATA.exists():
            (Path(place) / "data").symlink_to(DATA.resolve())
        write_file(PAGE, page(PAGE.read_text(encoding="utf-8"), Path(place)))
