"""Write docs/configuration.md from the schema: python docs/make_configuration.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rolora.config.schema import RunConfig
from rolora.errors import EXIT_CODES
from rolora.sites.site_config import SiteConfig

HEAD = """\
# Configuration

A run is one TOML file. Override any key on the command line: `rolora run c.toml train.lr=1e-3
method.name=ffa_lora`. Paths are relative to the TOML file. An unknown key is an error that
suggests the nearest one. `docs/make_configuration.py` writes this page from the schema.
"""
SITE = """\
The settings of one site ([deploy.md](deploy.md)). The file stays at the site; paths are relative to
it."""


def kind(annotation: Any) -> str:
    """A key's type in words."""
    if isinstance(annotation, type):
        return {
            "str": "text",
            "float": "number",
            "int": "whole number",
            "bool": "true or false",
        }.get(annotation.__name__, annotation.__name__)
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if any(isinstance(part, str) for part in parts):
        return ", ".join(f"`{part}`" for part in parts)
    if parts and "Annotated" in str(annotation)[:20]:
        return kind(parts[0])
    if get_origin(annotation) is list:
        return f"list of {kind(parts[0])}".replace("number", "numbers")
    if get_origin(annotation) is dict and get_origin(parts[1]) is dict:
        return "table of tables"
    if get_origin(annotation) is dict:
        return f"table of {kind(parts[1])}".replace("number", "numbers")
    return " or ".join(dict.fromkeys(kind(part) for part in parts))


def table(section: type[BaseModel]) -> list[str]:
    """A Markdown table of one section's keys."""
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name == "root" or (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            continue
        default = "required" if field.default is PydanticUndefined else json.dumps(field.default)
        default = (
            "left out"
            if default == "null"
            else f"`{default}`"
            if default != "required"
            else default
        )
        rows.append(
            f"| `{name}` | {kind(field.annotation)} | {default} | {field.description or ''} |"
        )
    return rows


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## Top level", "", *table(RunConfig)]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            note = (section.__doc__ or "").partition(": ")[2]
            lines += ["", f"## [{name}]", "", note[:1].upper() + note[1:], "", *table(section)]
    lines += ["", "## site.toml", "", SITE, "", *table(SiteConfig)]
    lines += ["", "## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page())
