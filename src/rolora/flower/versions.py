"""What site and coordinator tell each other of the versions that they run."""

from __future__ import annotations

from importlib.metadata import version

PROTOCOL = 3
VERSIONS = "/rolora"  # the path at which a coordinator serves its versions


def versions() -> dict[str, str | int | float | bool]:
    """The protocol, which must be the same at site and coordinator, and versions of libraries."""
    return {"protocol": PROTOCOL, **{name: version(name) for name in ("rolora", "torch", "flwr")}}
