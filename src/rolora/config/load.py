"""Read a run's configuration from a TOML file and overrides, and check it against the schema."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, validate_call

from rolora.algorithm.choices import REDUCERS
from rolora.attacks import ATTACKS, NO_ATTACK
from rolora.config.schema import SHORT, AggregateConfig, RunConfig
from rolora.errors import ConfigError, nearest
from rolora.files import from_home
from rolora.methods import METHODS
from rolora.registry import Registry
from rolora.tasks.registry import task_kind

# Where the files of a run are. They may move: hashes say whether they are still the same. And which
# trackers its rounds go to.
PLACES = (
    *("data.train", "data.test", "data.second_test", "data.validation"),
    *("model.path", "lora.init_from", "train.cache", "federation.on"),
    *("track.to", "track.project"),
)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), root: str | Path | None = None
) -> RunConfig:
    """Read a TOML file, apply ``key.path=value`` overrides, and check everything.

    Relative paths start from ``root``: if it is left out, from the folder of the file, and in the
    ``config.toml`` of a run folder from that of the file that the run was started with. Raises
    ConfigError naming the key and the nearest known one.
    """
    values = read_toml(path)
    file = from_home(path)
    origin = values.pop("provenance", {})
    if root is None:
        root = origin.get("root", ".") if isinstance(origin, dict) else "."
        if not isinstance(root, str):
            raise ConfigError(f"{path} is damaged: provenance.root is {root!r}, not a folder")
        root = file.resolve().parent / root
    config = make_config({"name": file.stem, **values}, overrides, root=Path(root))
    if not origin:  # a run that has begun goes on as it is
        refuse_idle(config.aggregate)
    return config


def places(config: RunConfig) -> list[str]:
    """The overrides that give another configuration the ``PLACES`` of this one."""
    found = []
    for place in PLACES:
        section, _, key = place.partition(".")
        if (value := getattr(getattr(config, section), key)) is not None:
            found.append(f"{place}={toml_text(value)}")
    return found


def toml_text(value: str | float | list[str]) -> str:
    """A value as an override has it."""
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def relative_root(config: RunConfig, folder: Path) -> str:
    """``config.root`` as seen from ``folder``, so that both can be moved together."""
    return os.path.relpath(config.root, folder.resolve())


def read_toml(path: str | Path, hint: str = "rolora init writes one") -> dict[str, Any]:
    """The contents of a TOML file. Raises ConfigError if it cannot be read.

    ``hint`` tells the user how to get such a file.
    """
    try:
        return tomllib.loads(from_home(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist ({hint})") from None
    except IsADirectoryError:
        raise ConfigError(f"config {path} is a folder; give a TOML file") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def make_config(
    values: dict[str, Any], overrides: Sequence[str] = (), *, root: Path = Path()
) -> RunConfig:
    """A configuration from nested dicts; see ``load_config``."""
    for override in overrides:
        values = _override(values, override)
    if "root" in values:
        raise ConfigError(f"unknown key 'root': {nearest('root', _keys(RunConfig, []))}")
    try:
        config = RunConfig.model_validate({**values, "root": root.resolve()})
    except ValidationError as error:
        raise ConfigError(first_fault(error, RunConfig)) from None
    check_options(METHODS, config.method.name, config.method.options, "method")
    if config.attack.name != NO_ATTACK:
        check_options(ATTACKS, config.attack.name, config.attack.options, "attack")
    _check_reducers(config.aggregate)
    return config


def dump_config(config: RunConfig, provenance: Mapping[str, Any], folder: Path) -> str:
    """The resolved configuration as TOML, for a file in ``folder``, with a ``[provenance]`` table.

    It is for the coordinator's own disk: unlike ``model_dump`` it has the server's seed and the
    trackers. Keys that are None are left out.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    if config.server_seed is not None:
        values["server_seed"] = config.server_seed
    if config.track.to:
        values["track"] = config.track.model_dump(exclude_none=True)
    origin = {**provenance, "root": relative_root(config, folder)}
    return tomli_w.dumps({**values, "provenance": origin})


def config_hash(config: RunConfig) -> str:
    """A hash of the settings that define a run.

    Left out are where it runs and where its files are (``PLACES``), the server's seed, what "auto"
    resolves to, and the number of rounds, which a resumed run may raise. So are keys without effect
    that older versions do not know: a run that one of them has started can be resumed.
    """
    compares = task_kind(config.model.task).compares
    later = ("chosen", "rejected", "positive", "second_split", "second_name")
    unset = {key for key in later if getattr(config.data, key) is None}
    values = config.model_dump_json(
        exclude={
            "train": {"rounds", "bank", "workers", "cache"},
            "eval": {"samples"},
            "model": {"dtype", "path", "device_map"},
            "data": {"train", "test", "second_test", "validation", *unset},
            **({} if compares else {"preference": True}),
            "lora": {"init_from"},
            "federation": True,
            "attack": {"name", "clients"} if config.attack.name == NO_ATTACK else set(),
            "aggregate": {
                key
                for key in ("options", "byzantine", "trusted")
                if not getattr(config.aggregate, key)
            },
        }
    )
    return hashlib.sha256(values.encode()).hexdigest()[:32]


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        read = {}
    # anything but one TOML value is a bare word, as in method.name=ffa_lora
    value = read["value"] if len(read) == 1 else text
    return _with(values, key.strip().split("."), value)


def _with(values: Any, path: list[str], value: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{path[0]!r} is not inside a table")
    head, *rest = path
    return {**values, head: _with(values.get(head, {}), rest, value) if rest else value}


def first_fault(error: ValidationError, schema: type[BaseModel]) -> str:
    """The main fault of values that do not fit ``schema``, in one line."""
    faults = error.errors()
    # a misspelt required key is an unknown key and a missing one: the former explains the latter
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    where = _key(fault, schema)
    key = ".".join(where)
    others = [f for f in faults if _key(f, schema) != where]
    more = f" (and {len(others)} more)" if others else ""
    if fault["type"] == "extra_forbidden":
        homes = [] if where[1:] else [f"{name}.{key}" for name in _sections_with(key, schema)]
        known = _keys(schema, where[:-1])
        near = nearest(where[-1], known, key.removesuffix(where[-1]))
        hint = f"did you mean {homes[0]!r}?" if homes else near
        return f"unknown key {key!r}: {hint}{more}"
    if fault["type"] == "missing":
        return f"{key} is missing{more}"
    if fault["type"] == "model_type":
        return f"{key} is a table, not {fault['input']!r}: give {key}.KEY=VALUE{more}"
    # a key of several types has one fault per type
    messages = [f["msg"].removeprefix("Value error, ") for f in faults if _key(f, schema) == where]
    got = "" if fault["type"] == "value_error" else f", got {fault['input']!r}"
    return f"{key}: {'; or '.join(messages)}{got}{more}"


def _key(fault: Mapping[str, Any], section: Any) -> list[str]:
    """The path of the faulty key, without what pydantic appends to it, such as a type's name."""
    parts: list[str] = []
    for part in map(str, fault["loc"]):
        if not _is_table(section):
            break
        parts.append(part)
        section = section.model_fields[part].annotation if part in section.model_fields else None
    return parts


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _sections_with(key: str, schema: type[BaseModel]) -> list[str]:
    tables = {name: field.annotation for name, field in schema.model_fields.items()}
    return [name for name, kind in tables.items() if _is_table(kind) and key in _keys(kind, [])]


def _keys(section: Any, path: list[str]) -> list[str]:
    for part in path:
        section = section.model_fields[part].annotation
    return [key for key in section.model_fields if key != "root"]


def _check_reducers(how: AggregateConfig) -> None:
    """ConfigError for reducers that do not go together, or for an option of the wrong type."""
    # here, since they take torch, which takes seconds: a misspelt key is reported immediately
    from rolora.algorithm.reduce import compose, is_wrapper, mean
    from rolora.algorithm.step import Aggregation

    for name in how.options.keys() - dict(how.rules):
        hint = nearest(name, dict(how.rules))
        raise ConfigError(f"[aggregate.options.{name}] is for a reducer that is not used: {hint}")
    for name, options in how.rules:
        inner = [mean()] if is_wrapper(name) else []
        check_options(REDUCERS, name, options, f"aggregate.options.{name}", *inner)
    Aggregation(compose(how.rules), trusted=how.trusted)
    if how.byzantine:
        _check_byzantine(how)


def refuse_idle(how: AggregateConfig) -> None:
    """ConfigError for a key of SHORT that is set and has no effect."""
    readers: dict[str, list[str]] = {}
    for name, keys in SHORT.items():
        for option, key in keys.items():
            if getattr(how, key) == AggregateConfig.model_fields[key].default:
                continue
            if option in how.options.get(name, {}):
                both = f"aggregate.{key} or aggregate.options.{name}.{option}"
                raise ConfigError(f"give {both}, not both")
            readers.setdefault(key, []).append(name)
    for key, names in readers.items():
        if not {*names} & dict(how.rules).keys():
            raise ConfigError(
                f"aggregate.{key} has no effect: it is for {' and '.join(names)}, and neither "
                "aggregate.reducer nor aggregate.optimizer names one"
            )


def _check_byzantine(how: AggregateConfig) -> None:
    """ConfigError for settings that let clients who send anything have their way."""
    names = [name for name, _ in how.rules]
    if "byzantine" not in REDUCERS.options(names[-1]):
        raise ConfigError(
            f"aggregate.byzantine = {how.byzantine}, but {names} withstands no client: leave out "
            "aggregate.reducer, or end it with a rule such as 'trimmed_mean' or 'krum'"
        )
    if how.trim != AggregateConfig().trim:
        raise ConfigError(
            "[aggregate]: give trim or byzantine, not both: byzantine is how many clients "
            "trimmed_mean cuts at each end"
        )


def check_options(
    registry: Registry, name: str, options: Mapping[str, Any], where: str, *given: Any
) -> None:
    """Make what ``registry`` has under this name, to check its options' names, types and ranges.

    ``where`` is the table that the options stand in, ``given`` the factory's positional arguments.
    Raises ConfigError for an unknown name, an unknown, missing or wrong option.
    """
    strict = validate_call(config=ConfigDict(strict=True, allow_inf_nan=False))
    try:
        strict(registry.factory(name))(*given, **options)
    except ValidationError as error:
        fault = error.errors()[0]
        key = f"{where}.{fault['loc'][-1]}" if fault["loc"] else where
        if fault["type"] == "unexpected_keyword_argument":
            known = registry.options(name)
            none = f"{registry.kind} {name!r} has no options"
            hint = nearest(str(fault["loc"][-1]), known, f"{where}.") if known else none
            raise ConfigError(f"unknown key {key!r}: {hint}") from None
        if fault["type"] == "missing_keyword_only_argument":
            raise ConfigError(f"{key} is missing: {registry.kind} {name!r} needs it") from None
        raise ConfigError(f"{key}: {fault['msg']}, got {fault['input']!r}") from None
