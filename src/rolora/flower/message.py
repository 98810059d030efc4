"""What coordinator and site send each other: a few plain values, and bytes."""

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

PROTOCOL = 2
SITE_NAME = re.compile(r"[\w-][\w.-]{0,63}")
VERSIONS = "/rolora"  # the path at which a coordinator serves its versions
Scalar = str | int | float | bool


def versions() -> dict[str, Scalar]:
    """The protocol, which must be the same at site and coordinator, and versions of libraries."""
    return {"protocol": PROTOCOL, **{name: version(name) for name in ("rolora", "torch", "flwr")}}


class MessageError(RoloraError):
    """A message that cannot be used, and why."""


@dataclass(frozen=True)
class SiteMessage:
    """A question to a site, or its answer.

    ``head`` holds plain values; ``body`` is a payload of ``algorithm.codec``, or JSON.
    ``tensors`` lists what is in the body for the sender's log; it is not sent.
    """

    head: Mapping[str, Scalar]
    body: bytes = b""
    tensors: tuple[str, ...] = ()

    def text(self, key: str) -> str:
        """A string of the head. Raises MessageError if it is missing or has another type."""
        value = self.head.get(key)
        if not isinstance(value, str):
            raise MessageError(f"{key!r} is {value!r}, expected a string")
        return value

    def integer(self, key: str) -> int:
        """An integer >= 0 of the head. Raises MessageError otherwise."""
        value = self.head.get(key)
        if type(value) is not int or value < 0:
            raise MessageError(f"{key!r} is {value!r}, expected an integer of at least 0")
        return value

    def number(self, key: str) -> float:
        """A number of the head, finite or not. Raises MessageError otherwise."""
        value = self.head.get(key)
        if type(value) not in (int, float):
            raise MessageError(f"{key!r} is {value!r}, expected a number")
        return float(value)  # type: ignore[arg-type]


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
        listed = json.loads(text)
    except ValueError:
        raise wrong from None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise wrong
    found = [name for name in everything if name in listed or role_of(name) in listed]
    if not set(listed) <= {*found, *(role_of(name) for name in found)}:
        raise wrong
    return found
