"""Federations over Flower, by its public interface: a strategy for others' apps, and our engine.

``strategy`` replaces FedAvg in the ServerApp of any Flower project; ``freeze`` and ``moving`` are
for its ClientApp (docs/flower.md). ``engine.Remote`` trains a run's cohorts at the sites of
``rolora.sites``. Only ``fedavg`` and ``transport`` import flwr: the rest works without it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
