"""Federated LoRA fine-tuning with exact averages: RoLoRA, its baselines, a PEFT adapter at the end.

>>> import rolora
>>> config = rolora.load_config("questions.toml", ["train.rounds=10"])  # doctest: +SKIP
>>> for result in rolora.start(config, "runs/questions").rounds():      # doctest: +SKIP
...     print(result.round, result.loss, dict(result.metrics))
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rolora.algorithm.adapter import AdapterState as AdapterState
    from rolora.algorithm.adapter import ClientInfo as ClientInfo
    from rolora.algorithm.adapter import Update as Update
    from rolora.algorithm.method import Method as Method
    from rolora.algorithm.method import ServerState as ServerState
    from rolora.algorithm.reduce import Reducer as Reducer
    from rolora.comparison.queue import compare as compare
    from rolora.config.load import load_config as load_config
    from rolora.config.load import make_config as make_config
    from rolora.config.schema import RunConfig as RunConfig
    from rolora.errors import RoloraError as RoloraError
    from rolora.methods import get_method as get_method
    from rolora.methods import method_names as method_names
    from rolora.report.page import write_report as write_report
    from rolora.run.evaluation import evaluate_adapter as evaluate_adapter
    from rolora.run.runs import resume as resume
    from rolora.run.runs import start as start
    from rolora.training.rounds import RoundResult as RoundResult
    from rolora.training.rounds import federate as federate

__version__ = version("rolora")

_HOMES = {
    "AdapterState": "algorithm.adapter",
    "ClientInfo": "algorithm.adapter",
    "Method": "algorithm.method",
    "Reducer": "algorithm.reduce",
    "RoloraError": "errors",
    "RoundResult": "training.rounds",
    "RunConfig": "config.schema",
    "ServerState": "algorithm.method",
    "Update": "algorithm.adapter",
    "compare": "comparison.queue",
    "evaluate_adapter": "run.evaluation",
    "federate": "training.rounds",
    "get_method": "methods",
    "load_config": "config.load",
    "make_config": "config.load",
    "method_names": "methods",
    "resume": "run.runs",
    "start": "run.runs",
    "write_report": "report.page",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that ``import rolora`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rolora' has no attribute {name!r}")
    return getattr(import_module(f"rolora.{_HOMES[name]}"), name)
