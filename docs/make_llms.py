"""Write llms.txt, the pages for language models, from mkdocs.yml: python docs/make_llms.py"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rolora.files import write_file

ROOT = Path(__file__).parent.parent
FILE = ROOT / "llms.txt"
ENOUGH = 60  # letters
HEAD = """\
# {site_name}

> {site_description}: a Python library and a command line.
"""


def pages(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each page, and a heading for each part of the navigation."""
    for entry in entries:
        for title, inside in entry.items():
            if isinstance(inside, str):
                yield f"- [{title}]({inside}): {opening(ROOT / inside)}"
            else:
                yield f"\n## {title}\n"
                yield from pages(inside)


def opening(page: Path) -> str:
    """The first sentence of a page, without marks; a short one with those that follow."""
    paragraphs = page.read_text(encoding="utf-8").split("\n\n")
    (first, *_) = (one for one in paragraphs if re.match(r"(?!```)[\w*`\[]", one))
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(first.split())).replace("*", "")
    told = ""
    for sentence in re.split(r"(?<=[.:])\s(?=[A-Z`])", plain):
        told = f"{told} {sentence}".strip()
        if len(told) > ENOUGH:
            break
    return told.rstrip(".:") + "."


def text() -> str:
    """The whole file."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return HEAD.format_map(site) + "\n" + "\n".join(pages(site["nav"])) + "\n"


if __name__ == "__main__":
    write_file(FILE, text())
