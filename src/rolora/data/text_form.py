"""How text files are written; apart from their readers, which load pyarrow."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rolora.errors import ConfigError


@dataclass(frozen=True)
class TextForm:
    """How text files are written. ConfigError for what no file is written with.

    ``delimiter`` stands between the values of a CSV; None for a comma in .csv and a tab in .tsv.
    ``encoding`` is one of Python's names.
    """

    delimiter: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        mark = self.delimiter
        if mark is not None and not re.fullmatch(r"[\t !#-~]", mark):
            raise ConfigError(
                f'delimiter {mark!r} is not one ASCII character, such as ";", or is a quote'
            )
        try:
            " ".encode(self.encoding)
        except (LookupError, ValueError):
            raise ConfigError(
                f"encoding {self.encoding!r} is not known to Python: use for example utf-8, "
                "utf-16, cp1252"
            ) from None


PLAIN = TextForm()
