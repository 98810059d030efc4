"""A run's configuration from one TOML file and dotted overrides, checked against the schema."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, validate_call

from rolora.config.schema import MethodConfig, RunConfig
from rolora.errors import ConfigError, nearest
from rolora.methods import METHODS


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, apply ``key.path=value`` overrides, and check everything.

    The resolved ``config.toml`` of a run folder is read as the run was started: paths from where
    they were. Raises ConfigError, one line, naming the key and the nearest known one.
    """
    values = read_toml(path)
    file = Path(path).expanduser()
    origin = values.pop("provenance", {})
    root = origin.get("root", file.parent) if isinstance(origin, dict) else file.parent
    return make_config({"name": file.stem, **values}, overrides, root=Path(root))


def read_toml(path: str | Path, hint: str = "rolora init writes one") -> dict[str, Any]:
    """The tables of a TOML file. ``hint`` says where one comes from.

    Raises ConfigError, one line, if it cannot be read.
    """
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist ({hint})") from None
    except IsADirectoryError:
        raise ConfigError(f"config {path} is a folder; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def make_config(
    values: dict[str, Any], overrides: Sequence[str] = (), *, root: Path = Path()
) -> RunConfig:
    """A configuration from nested dicts; see ``load_config``."""
    for override in overrides:
        values = _override(values, override)
    if "root" in values:
        raise ConfigError(f"unknown key 'root': {nearest('root', RunConfig.model_fields)}")
    try:
        config = RunConfig.model_validate({**values, "root": root.resolve()})
    except ValidationError as error:
        raise ConfigError(first_fault(error, RunConfig)) from None
    _check_method(config.method)
    return config


def dump_config(config: RunConfig, provenance: dict[str, Any]) -> str:
    """The resolved configuration as TOML, with a ``[provenance]`` table (None is left out)."""
    values = config.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps({**values, "provenance": provenance})


def config_hash(config: RunConfig) -> str:
    """Of what defines a run: all settings but where it runs, what "auto" came to, and the number of
    rounds, which may grow."""
    values = config.model_dump_json(
        exclude={"train": {"rounds", "bank"}, "model": {"dtype"}, "federation": True}
    )
    return hashlib.sha256(values.encode()).hexdigest()[:32]


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word, as in method.name=ffa_lora
    return _with(values, key.strip().split("."), value)


def _with(values: Any, path: list[str], value: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{path[0]!r} is not inside a table")
    head, *rest = path
    return {**values, head: _with(values.get(head, {}), rest, value) if rest else value}


def first_fault(error: ValidationError, schema: type[BaseModel]) -> str:
    """What is wrong with values for this schema, in one line."""
    faults = error.errors()
    # An unknown key usually explains the rest, a required key spelled wrong for example.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    where = _key(fault, schema)
    others = [f for f in faults if _key(f, schema) != where]
    more = f" (and {len(others)} more)" if others else ""
    if fault["type"] == "extra_forbidden":
        hint = nearest(where[-1], _keys(schema, where[:-1]))
        return f"unknown key {'.'.join(where)!r}: {hint}{more}"
    if fault["type"] == "missing":
        return f"{'.'.join(where)} is missing{more}"
    if fault["type"] == "model_type":
        return f"{where[0]} is a table, not {fault['input']!r}: give {where[0]}.KEY=VALUE{more}"
    # a key of several types has a fault for each
    messages = [f["msg"].removeprefix("Value error, ") for f in faults if _key(f, schema) == where]
    message = "; or ".join(messages)
    if fault["type"] == "value_error":
        at = ".".join(where)
        if at in schema.model_fields and _is_table(schema.model_fields[at].annotation):
            at = f"[{at}]"
        return ": ".join([*([at] if at else []), message]) + more
    return f"{'.'.join(where)}: {message}, got {fault['input']!r}{more}"


def _key(fault: Mapping[str, Any], section: Any) -> list[str]:
    """Where a fault is, as far as tables go: what pydantic puts behind a key is none of ours."""
    parts: list[str] = []
    for part in map(str, fault["loc"]):
        if not _is_table(section):
            break
        parts.append(part)
        section = section.model_fields[part].annotation if part in section.model_fields else None
    return parts


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _keys(section: Any, path: list[str]) -> list[str]:
    for part in path:
        section = section.model_fields[part].annotation
    return [key for key in section.model_fields if key != "root"]


def _check_method(method: MethodConfig) -> None:
    factory = METHODS.factory(method.name)
    try:
        validate_call(config=ConfigDict(strict=True, allow_inf_nan=False))(factory)(
            **method.options
        )
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][-1]) if fault["loc"] else ""
        if fault["type"] == "unexpected_keyword_argument":
            known = factory.__kwdefaults__ or {}
            hint = nearest(key, known) if known else f"method {method.name!r} has no options"
            raise ConfigError(f"unknown key 'method.{key}': {hint}") from None
        raise ConfigError(f"method.{key}: {fault['msg']}, got {fault['input']!r}") from None
