"""Federations over Flower, by its public interface: a strategy for others' apps, and our engine.

``strategy`` replaces FedAvg in the ServerApp of any Flower project; ``freeze`` and ``moving`` are
for its ClientApp (docs/flower.md). ``engine.Remote`` trains a run's cohorts at the sites of
``rolora.sites``. Only ``fedavg`` and ``transport`` import flwr: the rest works without a network.
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
