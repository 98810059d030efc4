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
    from rolora.adapter import AdapterState as AdapterState
    from rolora.adapter import ClientInfo as ClientInfo
    from rolora.adapter import Update as Update
    from rolora.comparison.queue import compare as compare
    from rolora.config import load_config as load_config
    from rolora.config import make_config as make_config
    from rolora.errors import RoloraError as RoloraError
    from rolora.evaluation import evaluate_adapter as evaluate_adapter
    from rolora.method import Method as Method
    from rolora.method import ServerState as ServerState
    from rolora.method import get_method as get_method
    from rolora.method import method_names as method_names
    from rolora.reduce import Reducer as Reducer
    from rolora.report import write_report as write_report
    from rolora.rounds import RoundResult as RoundResult
    from rolora.rounds import federate as federate
    from rolora.runs import resume as resume
    from rolora.runs import start as start
    from rolora.schema import RunConfig as RunConfig

__version__ = version("rolora")

_HOMES = {
    "AdapterState": "adapter",
    "ClientInfo": "adapter",
    "Method": "method",
    "Reducer": "reduce",
    "RoloraError": "errors",
    "RoundResult": "rounds",
    "RunConfig": "config",
    "ServerState": "method",
    "Update": "adapter",
    "compare": "comparison.queue",
    "evaluate_adapter": "evaluation",
    "federate": "rounds",
    "get_method": "method",
    "load_config": "config",
    "make_config": "config",
    "method_names": "method",
    "resume": "runs",
    "start": "runs",
    "write_report": "report",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that ``import rolora`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rolora' has no attribute {name!r}")
    return getattr(import_module(f"rolora.{_HOMES[name]}"), name)
