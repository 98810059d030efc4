"""The contract of a federated-LoRA method, and the one server step that every method goes through.

A method is a record of small pure functions. It never sees a model, a network, or a raw client
update: ``aggregate`` gets ``reduce``, which it calls once a round, so that checks, robust rules and
clipping apply to every method alike.

>>> from rolora.method import get_method
>>> rolora = get_method("rolora", first="B")
>>> [sorted(rolora.shared(round) - {"head"}) for round in (1, 2, 3)]
[['B'], ['A'], ['B']]
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rolora.adapter import AdapterState, ClientInfo, LowRank, Roles, Specs, Update, mean_delta
from rolora.errors import ConfigError, nearest
from rolora.reduce import Memory, Reducer, Value

Project = Callable[[AdapterState], Value]


class Reduce(Protocol):
    """``reduce(project=..., weight=...)`` -> the combined value. To be called once a round.

    ``project`` maps what a client holds (what it received overlaid with what it sent) to the space
    that is reduced; left out, the shared tensors themselves. ``weight`` maps an update to its
    weight; left out, the run's setting (num_examples or uniform).
    """

    def __call__(
        self, project: Project | None = None, weight: Callable[[Update], float] | None = None
    ) -> Value: ...


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from round to round.

    ``round`` counts finished rounds, so the round being run is ``round + 1``; ``attempt`` counts
    tries of it that found no quorum. ``memory`` is the reducer's.
    """

    adapter: AdapterState
    memory: Memory = field(default_factory=dict)
    round: int = 0
    attempt: int = 0


def lora_init(specs: Specs, rng: torch.Generator) -> AdapterState:
    """lora_A ~ U(−1/√in, 1/√in) (Kaiming uniform with a = √5, as PEFT), lora_B = 0; float32.

    Head weights that the checkpoint lacks are normal, head biases 0, as transformers does.
    """
    tensors: dict[str, Tensor] = {}
    for spec in specs.tensors:
        if spec.role == "A":
            bound = 1 / math.sqrt(spec.shape[1])
            tensors[spec.name] = (torch.rand(spec.shape, generator=rng) * 2 - 1) * bound
        elif spec.name in specs.head:
            tensors[spec.name] = specs.head[spec.name]
        elif spec.role == "head" and len(spec.shape) > 1:
            tensors[spec.name] = torch.randn(spec.shape, generator=rng) * specs.head_std
        else:
            tensors[spec.name] = torch.zeros(spec.shape)
    return AdapterState(tensors, specs.scaling)


def whole_adapter(server: ServerState, client: ClientInfo) -> AdapterState:
    """A client should hold the whole adapter; only what it lacks travels."""
    return server.adapter


def merge_shared(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    """The reduced shared tensors replace the server's; the others stay bit for bit."""
    return replace(server, adapter=server.adapter | reduce())


@dataclass(frozen=True, kw_only=True)
class Method:
    """One federated-LoRA method. ``round`` starts at 1; ``local step`` at 0.

    ``trainable(round, local step)``: the roles that get gradients. ``shared(round)``: the roles
    that travel up; what is trained but not shared is personal and stays with the client.
    ``download``: what a client should hold before it trains. ``pooled``: one client that holds all
    rows and takes the cohort's steps (an upper bound, not a federation).
    """

    name: str
    trainable: Callable[[int, int], Roles]
    shared: Callable[[int], Roles]
    init: Callable[[Specs, torch.Generator], AdapterState] = lora_init
    download: Callable[[ServerState, ClientInfo], AdapterState] = whole_adapter
    aggregate: Callable[[ServerState, Reduce, torch.Generator], ServerState] = merge_shared
    pooled: bool = False

    def personal(self, round: int) -> Roles:
        """Roles trained in this round that never leave the client."""
        return self.trainable(round, 0) - self.shared(round)


def freeze_head(method: Method) -> Method:
    """The same method with the task head frozen: it travels down once and is never trained."""
    head: Roles = frozenset({"head"})
    return replace(
        method,
        trainable=lambda round, step: method.trainable(round, step) - head,
        shared=lambda round: method.shared(round) - head,
    )


def method_names() -> list[str]:
    """The names of all methods: the files of the folder ``rolora/methods``."""
    folder = Path(__file__).with_name("methods")
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def method_factory(name: str) -> Callable[..., Method]:
    """The ``method(*, ...)`` function of the file ``methods/<name>.py``; its keywords are options.

    Raises ConfigError for a name that is no file there.
    """
    if name not in method_names():
        raise ConfigError(f"unknown method {name!r}: {nearest(name, method_names())}")
    factory: Callable[..., Method] = importlib.import_module(f"rolora.methods.{name}").method
    return factory


def get_method(name: str, **options: Any) -> Method:
    """The method of this name with these options. Raises ConfigError for an unknown one."""
    factory = method_factory(name)
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "it takes no options"
            raise ConfigError(f"method {name!r} has no option {option!r}: {hint}")
    return factory(**options)


@dataclass(frozen=True)
class Aggregation:
    """How a run combines updates: the reducer, the clients' weights, and the quorum."""

    reducer: Reducer
    weights: Literal["num_examples", "uniform"] = "num_examples"
    quorum: int = 1


@dataclass(frozen=True)
class RoundReport:
    """What ``step`` found: who was used, who was rejected and why, and how exact the average was.

    ``aggregation_error`` is ‖Σ p_i ΔW_i − ΔW‖_F / ‖Σ p_i ΔW_i‖_F over all adapted layers, where
    ΔW_i is the change of scaling·B·A between what client i received and what it returned, and ΔW
    the change of the server's; ``None`` where the server cannot know (personal factors).
    """

    accepted: tuple[str, ...]
    rejected: Mapping[str, str]
    aggregation_error: float | None
    quorum_met: bool


def step(
    method: Method,
    aggregation: Aggregation,
    server: ServerState,
    cohort: Mapping[str, ClientInfo],
    updates: Iterable[Update],
    rng: torch.Generator,
) -> tuple[ServerState, RoundReport]:
    """Check the updates of a round, combine the good ones, and return the next server state.

    Updates are taken in order of client id, so arrival order changes nothing. A faulty update is
    rejected and named, never fatal. Below the quorum the round does not advance: the same state
    comes back with ``attempt + 1``.
    """
    round = server.round + 1
    accepted: list[Update] = []
    rejected: dict[str, str] = {}
    arrived = sorted(updates, key=lambda update: update.client)
    times = Counter(update.client for update in arrived)
    for update in arrived:
        fault = _fault(method, server, cohort, update, times[update.client])
        if fault is None:
            accepted.append(update)
        else:
            rejected[update.client] = fault
    names = tuple(update.client for update in accepted)
    if len(accepted) < max(1, aggregation.quorum):
        stalled = replace(server, attempt=server.attempt + 1)
        return stalled, RoundReport(names, rejected, None, quorum_met=False)

    received = {u.client: method.download(server, cohort[u.client]) for u in accepted}
    weigh = _weights(aggregation)
    kept: list[Memory] = []

    def reduce(
        project: Project | None = None, weight: Callable[[Update], float] | None = None
    ) -> Value:
        if kept:
            raise RuntimeError(f"method {method.name!r} called reduce twice in one round")
        into = project or (lambda view: view.only(method.shared(round)))
        reducer, memory = aggregation.reducer, server.memory or aggregation.reducer.init()
        for update in accepted:
            view = received[update.client]
            value, reference = into(view | update.adapter), into(view)
            memory = reducer.add(memory, value, reference, (weight or weigh)(update))
        reduced, memory = reducer.finish(memory, rng)
        kept.append(memory)
        return reduced

    after = method.aggregate(server, reduce, rng)
    after = replace(after, memory=kept[0] if kept else {}, round=round, attempt=0)
    error = None
    if not method.personal(round):
        pairs = [(received[u.client], received[u.client] | u.adapter) for u in accepted]
        error = aggregation_error(pairs, [weigh(u) for u in accepted], server, after)
    return after, RoundReport(names, rejected, error, quorum_met=True)


def _weights(aggregation: Aggregation) -> Callable[[Update], float]:
    if aggregation.weights == "uniform":
        return lambda update: 1.0
    return lambda update: float(update.num_examples)


def _fault(
    method: Method,
    server: ServerState,
    cohort: Mapping[str, ClientInfo],
    update: Update,
    times: int,
) -> str | None:
    """Why this update cannot be used, in words for the record, or ``None``."""
    if update.client not in cohort:
        return "not in this round's cohort"
    if times > 1:  # which of them to believe would depend on the order of arrival
        return f"sent {times} updates"
    info = cohort[update.client]
    if type(update.num_examples) is not int or update.num_examples != info.num_examples:
        return f"num_examples is {update.num_examples!r}, but it joined with {info.num_examples}"
    expected = method.download(server, info).only(method.shared(server.round + 1))
    if missing := sorted(expected.keys() - update.adapter.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(update.adapter.keys() - expected.keys()):
        return f"{extra[0]} was not asked for"
    for name, tensor in update.adapter.items():
        like = expected[name]
        if tensor.shape != like.shape:
            return f"{name} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}"
        if tensor.dtype != like.dtype:
            return f"{name} has dtype {tensor.dtype}, expected {like.dtype}"
        if not torch.isfinite(tensor).all():
            return f"{name} has values that are not finite"
    return None


def aggregation_error(
    clients: Sequence[tuple[AdapterState, AdapterState]],
    weights: Sequence[float],
    before: ServerState,
    after: ServerState,
) -> float:
    """Relative error of the aggregated product (see ``RoundReport``); 0.0 if nothing moved.

    ``clients`` are (received, returned) pairs; weights need not sum to 1.
    """
    share = [weight / sum(weights) for weight in weights]
    moves = [_change(received, returned) for received, returned in clients]
    ideal, actual = mean_delta(moves, share), _change(before.adapter, after.adapter)
    wanted = _norm(ideal)
    missed = _norm({layer: ideal[layer] - actual[layer] for layer in ideal})
    return missed / wanted if wanted else (math.inf if missed else 0.0)


def _change(old: AdapterState, new: AdapterState) -> dict[str, LowRank]:
    before = old.delta()
    return {layer: matrix - before[layer] for layer, matrix in new.delta().items()}


def _norm(matrices: Mapping[str, LowRank]) -> float:
    return math.sqrt(sum(matrix.norm() ** 2 for matrix in matrices.values()))
