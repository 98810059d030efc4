"""What travels between coordinator and site: a few plain values, and bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from torch import Tensor

from rolora.algorithm.adapter import role_of, tensor_hash
from rolora.errors import RoloraError

PROTOCOL = 1
SITE_NAME = re.compile(r"[\w-][\w.-]{0,63}")
VERSIONS = "/rolora"  # where a coordinator says its versions, over HTTP
Plain = str | int | float | bool


def versions() -> dict[str, Plain]:
    """What site and coordinator must agree on, or should."""
    return {"protocol": PROTOCOL, **{name: version(name) for name in ("rolora", "torch", "flwr")}}


class ParcelError(RoloraError):
    """A message that cannot be used; says what is wrong with it."""


@dataclass(frozen=True)
class Parcel:
    """``head``: what is asked or answered; ``body``: bytes of ``algorithm.codec``, or text.

    ``tensors`` names what is in the body, for the sender's own log; it does not travel.
    """

    head: Mapping[str, Plain]
    body: bytes = b""
    tensors: tuple[str, ...] = ()

    def text(self, key: str) -> str:
        """A text of the head. Raises ParcelError if it is missing or no text."""
        value = self.head.get(key)
        if not isinstance(value, str):
            raise ParcelError(f"{key!r} is {value!r}, expected a text")
        return value

    def whole(self, key: str) -> int:
        """A whole number >= 0 of the head. Raises ParcelError otherwise."""
        value = self.head.get(key)
        if type(value) is not int or value < 0:
            raise ParcelError(f"{key!r} is {value!r}, expected a whole number")
        return value

    def number(self, key: str) -> float:
        """A number of the head, finite or not. Raises ParcelError otherwise."""
        value = self.head.get(key)
        if type(value) not in (int, float):
            raise ParcelError(f"{key!r} is {value!r}, expected a number")
        return float(value)  # type: ignore[arg-type]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of names and exact values."""
    lines = (f"{name} {tensor_hash(tensors[name])}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def named(chosen: Collection[str], everything: Collection[str]) -> str:
    """The ``chosen`` names of ``everything`` in few bytes: by their roles where that says it."""
    roles = {role_of(name) for name in chosen}
    whole = {name for name in everything if role_of(name) in roles}
    return json.dumps(sorted(roles if whole == set(chosen) else chosen))


def names_of(text: str, everything: Collection[str]) -> list[str]:
    """What ``named`` has written. Raises ParcelError if it is anything else."""
    try:
        listed = json.loads(text)
    except ValueError:
        listed = None
    wrong = ParcelError("'names' are not all tensors of this model's adapter")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise wrong
    found = [name for name in everything if name in listed or role_of(name) in listed]
    if not set(listed) <= {*found, *(role_of(name) for name in found)}:
        raise wrong
    return found
