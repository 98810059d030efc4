"""The same run across real machines: sites that keep their rows, a coordinator, Flower between.

Only ``carrier``, ``apps`` and ``plain_server`` import flwr, and those that speak its Fleet API; the
rest is plain functions from message to message, so that it can be tried without a network.

For Flower projects of one's own, ``strategy`` takes the place of Flower's FedAvg in the ServerApp;
``freeze`` and ``moving`` are for its ClientApp (docs/flower.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rolora.flower.client import freeze as freeze
    from rolora.flower.client import moving as moving
    from rolora.flower.fedavg import strategy as strategy

_HOMES = {"freeze": "client", "moving": "client", "strategy": "fedavg"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that this package can do without flwr."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rolora.flower' has no attribute {name!r}")
    return getattr(import_module(f"rolora.flower.{_HOMES[name]}"), name)
