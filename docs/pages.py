"""Shared by the page scripts: tables between marks, and small pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from rolora.files import write_file
from rolora.report.figures import rendered


def put(text: str, mark: str, lines: Sequence[str]) -> str:
    """The page with ``lines`` between ``<!-- mark -->`` and the next ``<!-- end -->``.

    ValueError if the page has no such mark.
    """
    before, found, rest = text.partition(f"<!-- {mark} -->\n")
    if not found:
        raise ValueError(f"the page has no mark {mark!r}")
    return "\n".join([before + found, *lines, "", rest[rest.index("<!-- end -->") :]])


def save_picture(figure: Figure, file: Path) -> None:
    """As a PNG of 64 colours."""
    drawn = Image.open(io.BytesIO(rendered(figure, "png")))
    small = io.BytesIO()
    drawn.convert("RGB").quantize(64).save(small, "png", optimize=True)
    write_file(file, small.getvalue())
