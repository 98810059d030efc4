"""The pages, and the blocks of code on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").rglob("*.md")]
)
SHELLS = ("sh", "bash", "shell", "console")
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    """A fenced block, and why it is not run if it is marked ``<!-- not run: REASON -->``."""

    language: str
    text: str
    reason: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of these languages; without languages: of all."""
    found = [
        Block(match["language"], match["text"], match["reason"])
        for match in BLOCK.finditer(page.read_text())
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return BLOCK.sub("", page.read_text())


def lines(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without what it sets in the environment."""
    for text in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(text.removeprefix("$ "), comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every shell command: lines of shell blocks, and code in the text.

    A command that the text only names, without an argument, is asked for its help.
    """
    for block in blocks(page, *SHELLS):
        yield from lines(block)
    for text in re.findall(r"`((?:rolora|make) [^`]+)`", prose(page)):
        words = shlex.split(text)
        yield words if len(words) > 2 or words[0] == "make" else [*words, "--help"]


def section(page: Path, title: str) -> str:
    """The text under a heading."""
    return page.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
