"""An extension of griffe: the examples in docstrings become code blocks on the page of the API."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


class Fenced(Extension):
    """Puts fences around ``>>>`` paragraphs, and takes the second colon from ``::``."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for every object that has been read."""
        if isinstance(obj.docstring, Docstring):
            fenced = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", fenced, flags=re.MULTILINE)
