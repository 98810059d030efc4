"""What coordinator and site send each other: a few plain values, and bytes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from rolora.algorithm.adapter import role_of, tensor_hash
from rolora.data.readers import nesting
from rolora.errors import RoloraError, printable

SITE_NAME = re.compile(r"[\w-][\w.-]{0,63}")
Scalar = str | int | float | bool

# Bounds of what either side reads of the other.
MOST_KEYS = 32  # of a head
MOST_TEXT = 300_000  # characters of a text in a head
LARGEST = 2**53  # whole number, positive or negative
MOST_LABELS = 1000  # of a run
LABEL_LENGTH = 64  # characters
MOST_CONFIG = 2**20  # bytes of a run's configuration as JSON
DEEPEST = 8  # tables and lists in each other, in JSON

# Why a site refuses: only the code leaves the site; the coordinator has the sentence.
REASONS = {
    "protocol": "it runs another version of rolora: install the same at both",
    "question": "it cannot use what it was sent",
    "config": "it cannot use the run's configuration",
    "task": "its operator has not allowed this task (tasks in site.toml)",
    "role": "its operator has given no column a role that the run reads (site.toml)",
    "labels": "its labels are not those, or more or longer than those, that its operator allows",
    "rows": "the run would train on, or score, fewer of its rows than its operator allows",
    "split": "the run would hold out nearly the same of its rows as an earlier run",
    "limit": "its operator allows no more rounds, runs or questions, or no run of this size: "
    "steps, batch or rank",
    "turns": "it takes one step a round, and the method alternates factors between steps: raise "
    "train.local_epochs, or lower train.batch_size",
    "data": "its rows cannot be read as this run needs them",
    "count": "it has another number of rows than the coordinator was told",
    "diverged": "its loss, or what it would send, is not finite: lower train.lr, or set "
    "train.max_grad_norm",
    "disk": "it cannot read or write its files",
    "failed": "it failed",
}


class MessageError(RoloraError):
    """A message that cannot be used, and why."""


@dataclass(frozen=True)
class SiteMessage:
    """A question to a site, or its answer.

    ``head`` holds plain values; ``body`` is a payload of ``algorithm.codec``, or JSON.
    ``tensors`` lists what is in the body, and ``note`` says more, for the sender's own log: they
    are not sent.
    """

    head: Mapping[str, Scalar]
    body: bytes = b""
    tensors: tuple[str, ...] = ()
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes of everything that is sent: names and values as text, and the body."""
        return len(self.body) + sum(len(f"{k}{v}".encode()) for k, v in self.head.items())

    def text(self, key: str) -> str:
        """A string of the head. Raises MessageError if it is missing or has another type."""
        value = self.head.get(key)
        if not isinstance(value, str):
            raise MessageError(f"{key!r} is {_shown(value)}, expected a string")
        return value

    def integer(self, key: str) -> int:
        """An integer >= 0 of the head. Raises MessageError otherwise."""
        value = self.head.get(key)
        if type(value) is not int or value < 0:
            raise MessageError(f"{key!r} is {_shown(value)}, expected an integer of at least 0")
        return value

    def number(self, key: str) -> float:
        """A finite number of the head. Raises MessageError otherwise."""
        value = self.head.get(key)
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            raise MessageError(f"{key!r} is {_shown(value)}, expected a finite number")
        return float(value)  # type: ignore[arg-type]


def _shown(value: object) -> str:
    return printable(repr(value)[:80])


def bounded(head: Mapping[str, object], body: bytes = b"") -> SiteMessage:
    """A message of the other side, not yet looked at, whose head is a few short plain values.

    Raises MessageError otherwise.
    """
    if len(head) > MOST_KEYS:
        raise MessageError(f"its head has {len(head)} keys, more than {MOST_KEYS}")
    plain: dict[str, Scalar] = {}
    for key, value in head.items():
        if len(key) > 64 or not key.isidentifier():
            raise MessageError("its head has a key that is not a name")
        if not isinstance(value, str | int | float):  # a bool is an int
            raise MessageError(f"{key!r} is neither text nor a number")
        if isinstance(value, str) and (len(value) > MOST_TEXT or not _encodes(value)):
            raise MessageError(f"{key!r} is longer than {MOST_TEXT} characters, or no text")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise MessageError(f"{key!r} is a whole number beyond 2^53")
        plain[key] = value
    return SiteMessage(plain, body)


def _encodes(text: str) -> bool:
    """Whether a text has no lone surrogates, which no file and no message can hold."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def read_json(text: str | bytes, most: int) -> Any:
    """The value of JSON of at most ``most`` characters, not nested deeply, with plain numbers.

    Whole numbers are within 2^53; others are finite, or written NaN, Infinity or -Infinity; a table
    names each key once. Raises MessageError otherwise.
    """
    if len(text) > most:
        raise MessageError(f"JSON of {len(text)} characters, more than {most}")
    try:
        whole = text.decode() if isinstance(text, bytes) else text
        if (depth := nesting(whole.encode())) > DEEPEST:
            raise MessageError(f"JSON nested {depth} deep, more than {DEEPEST}")
        value = json.loads(
            whole, parse_int=_whole, parse_float=_finite, object_pairs_hook=_keyed_once
        )
        json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, RecursionError):
        raise MessageError("it is not valid JSON") from None
    return value


def _whole(digits: str) -> int:
    if abs(int(digits)) > LARGEST:
        _refuse("a whole number beyond 2^53")
    return int(digits)


def _finite(digits: str) -> float:
    if len(digits) > 40 or not math.isfinite(float(digits)):
        _refuse("a number of too many digits")
    return float(digits)


def _keyed_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        _refuse("a key twice")
    return table


def _refuse(what: str) -> NoReturn:
    raise MessageError(f"JSON with {what}")


def read_labels(text: str | bytes) -> list[str]:
    """Distinct labels, from JSON. MessageError unless they are few, short and texts."""
    found = read_json(text, MOST_TEXT)
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise MessageError("'labels' is not a list of strings")
    if len(found) > MOST_LABELS or len(set(found)) < len(found):
        raise MessageError(f"'labels' has {len(found)} labels: more than {MOST_LABELS}, or twice")
    if any(not 0 < len(label) <= LABEL_LENGTH for label in found):
        raise MessageError(f"'labels' has one that is empty or over {LABEL_LENGTH} characters")
    return found


def read_metrics(text: str, known: Collection[str]) -> dict[str, float]:
    """Metrics by name, from JSON. MessageError unless each is known, and a number."""
    found = read_json(text, 10_000)
    if not isinstance(found, dict) or not found.keys() <= set(known):
        raise MessageError("'metrics' is not a table of this task's metrics")
    if any(type(value) not in (int, float) for value in found.values()):
        raise MessageError("'metrics' has a value that is not a number")
    return {name: float(value) for name, value in found.items()}


def lost(why: str) -> SiteMessage:
    """A stand-in for the answer of a node that gave none: another attempt may succeed."""
    return SiteMessage({"error": why, "lost": True})


def reason_of(said: object) -> str:
    """Why a site could not answer, in one short printable line: what its code means, if known."""
    if isinstance(said, str) and said in REASONS:
        return f"{REASONS[said]}; the site's own log says more"
    return printable(str(said)[:200])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of names and exact values."""
    lines = (f"{name} {tensor_hash(tensors[name])}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def compress_names(chosen: Collection[str], everything: Collection[str]) -> str:
    """JSON that selects ``chosen`` from ``everything``: roles if they suffice, else the names."""
    roles = {role_of(name) for name in chosen}
    with_roles = {name for name in everything if role_of(name) in roles}
    return json.dumps(sorted(roles if with_roles == set(chosen) else chosen))


def expand_names(text: str, everything: Collection[str]) -> list[str]:
    """The names that ``compress_names`` selected. Raises MessageError for any other text."""
    wrong = MessageError("'names' does not select tensors of this model's adapter")
    try:
        listed = read_json(text, MOST_TEXT)
    except MessageError:
        raise wrong from None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise wrong
    chosen = set(listed)
    found = [name for name in everything if name in chosen or role_of(name) in chosen]
    if not chosen <= {*found, *(role_of(name) for name in found)}:
        raise wrong
    return found
