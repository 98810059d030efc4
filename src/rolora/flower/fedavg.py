"""For the ServerApp of a Flower project: a strategy that averages as a method of rolora does.

>>> from rolora.flower import strategy
>>> strategy("rolora", fraction_train=0.5).configrecord_key
'config'
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from rolora.algorithm.adapter import (
    AdapterState,
    Assignment,
    ClientInfo,
    Failure,
    Specs,
    TensorSpec,
    Update,
    role_of,
)
from rolora.algorithm.method import Method, ServerState, as_trained, whole_adapter
from rolora.algorithm.reduce import Reducer, mean
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, RoundReport, step
from rolora.errors import ConfigError, NoQuorum
from rolora.flower.client import TRAINABLE
from rolora.flower.records import adapter_in, comparable, update_in
from rolora.methods import get_method

_log = logging.getLogger("flwr")  # the strategy's lines belong among those of Flower's FedAvg
SMALLEST = Specs(
    (TensorSpec("x.lora_A.weight", "A", (1, 2)), TensorSpec("x.lora_B.weight", "B", (2, 1))),
    {"x": 1.0},
    {},
)


def strategy(
    method: str | Method = "rolora",
    *,
    reducer: Reducer | None = None,
    weights: Literal["num_examples", "uniform"] = "num_examples",
    quorum: int = 1,
    server_seed: int | None = None,
    **fedavg: Any,
) -> LoraStrategy:
    """A strategy for ``flwr.serverapp`` that replaces FedAvg and takes its keywords too.

    ``method`` is a name, or a Method such as ``get_method("rolora", first="A")``; ``reducer``
    combines the updates (default: their mean); ``weights`` are the weights of the mean; ``quorum``
    is the number of usable replies that a round needs; reducers draw from ``server_seed`` (default:
    a random one, so that clients cannot predict it). Raises ConfigError for a method whose clients
    need more than Flower's ClientApp has.
    """
    found = get_method(method) if isinstance(method, str) else method
    _require_stateless_clients(found)
    if quorum < 1:
        raise ConfigError(f"quorum is {quorum}, expected at least 1")
    seed = secrets.randbits(63) if server_seed is None else server_seed
    return LoraStrategy(found, Aggregation(reducer or mean(), weights, quorum), seed, **fedavg)


def _require_stateless_clients(method: Method) -> None:
    name = method.name
    if not method.federated:
        raise ConfigError(
            f"method {name!r} trains on all rows in one place, but Flower's nodes keep theirs: "
            "use 'fedit', which averages plain LoRA, or run it with rolora compare"
        )
    asked = [(round, step) for round in (1, 2) for step in (0, 1)]
    hooks = (method.download, method.upload, method.gradient, method.penalty)
    if (
        hooks != (whole_adapter, as_trained, None, None)
        or method.needs_gradient
        or any(method.trainable(round, step) != method.shared(round) for round, step in asked)
    ):
        raise ConfigError(
            f"method {name!r} needs clients that keep state of their own, but a ClientApp keeps "
            "none: use 'rolora', or run it at sites (rolora run --on)"
        )
    if len(method.init(SMALLEST, generator(0))) > len(SMALLEST.tensors):
        raise ConfigError(
            f"method {name!r} also changes the base weights, which a PEFT adapter cannot hold: "
            "use 'rolora', or run it at sites (rolora run --on)"
        )


class LoraStrategy(FedAvg):  # type: ignore[misc]
    """FedAvg's sampling, messages and evaluation, with rolora's ``step`` as the average.

    ``state.round`` counts rounds that were averaged, and decides what is trained; Flower's loop
    counts every round.
    """

    def __init__(
        self, method: Method, aggregation: Aggregation, server_seed: int, **fedavg: Any
    ) -> None:
        super().__init__(**fedavg)
        self.method, self.aggregation, self.server_seed = method, aggregation, server_seed
        self._begin()

    def _begin(self) -> None:
        self.state = ServerState(AdapterState({}, {}))
        self.asked: tuple[str, ...] = ()
        self.counts: dict[str, int] = {}  # node -> its number of examples when first accepted

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Flower's loop, from the method's first round. Raises NoQuorum if none was averaged."""
        self._begin()
        result = super().start(*args, **kwargs)
        if self.state.attempt and not self.state.round:
            raise NoQuorum(
                f"no round was averaged: none had {self.aggregation.quorum} usable replies "
                "(quorum); the log names what was wrong with each"
            )
        return result

    def summary(self) -> None:
        """Log the strategy's settings."""
        _log.info("\t├──> Method: %s, quorum %d", self.method.name, self.aggregation.quorum)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The whole adapter for every sampled node, and which part of it to train."""
        self.state = replace(self.state, adapter=adapter_in(arrays))
        roles = self.method.trainable(self.state.round + 1, 0)
        trained = ",".join(sorted(roles & {role_of(name) for name in self.state.adapter}))
        config[TRAINABLE] = trained
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.asked = tuple(map(str, sorted(m.metadata.dst_node_id for m in messages)))
        round = self.state.round + 1
        _log.info("configure_train: round %d of the method trains %s", round, trained)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next adapter, whole, and the metrics of the round; unusable replies are left out.

        Below the quorum the adapter stays as it is, and the next round repeats this one.
        """
        if not self.asked:
            return None, None
        came = list(replies)
        report = self._step(came)
        unused = {**report.rejected, **report.missing}
        for node, reason in unused.items():
            _log.warning("aggregate_train: the reply of node %s is left out: %s", node, reason)
        if not report.quorum_met:
            _log.warning(
                "aggregate_train: %d usable replies, but a round needs %d: nothing is averaged, "
                "and the next round repeats round %d of the method",
                len(report.accepted),
                self.aggregation.quorum,
                self.state.round + 1,
            )
        first = {str(message.metadata.src_node_id): message for message in reversed(came)}
        contents = [first[node].content for node in report.accepted]
        metrics = self._averaged(contents, self.train_metrics_aggr_fn) or MetricRecord()
        metrics["round"] = self.state.round
        metrics["accepted"], metrics["rejected"] = len(report.accepted), len(unused)
        if report.aggregation_error is not None:
            metrics["aggregation_error"] = report.aggregation_error
        return ArrayRecord(dict(self.state.adapter)), metrics

    def _step(self, replies: Iterable[Message]) -> RoundReport:
        """Advance the state by rolora's step; a node that did not answer has failed."""
        received, round = self.state.adapter, self.state.round + 1
        shared = received.only(self.method.shared(round))
        key = self.weighted_by_key
        updates = [update_in(reply, received, shared, key) for reply in replies]
        silent = set(self.asked) - {update.client for update in updates}
        why = "no answer before the deadline"
        missing = [Failure(node, why, missing=True) for node in sorted(silent)]
        named = {u.client: u.num_examples for u in reversed(updates) if isinstance(u, Update)}
        counts = named | self.counts
        cohort = {
            node: Assignment(ClientInfo(node, counts.get(node, 0), received.rank, round), received)
            for node in self.asked
        }
        rng = generator(self.server_seed, "aggregate", round, self.state.attempt)
        all_replies = [*updates, *missing]
        self.state, report = step(
            self.method, self.aggregation, self.state, cohort, all_replies, rng
        )
        self.counts |= {node: counts[node] for node in report.accepted}
        return report

    def _averaged(self, contents: list[Any], average: Any) -> MetricRecord | None:
        """The average of these replies' metrics; None if none are usable."""
        usable = comparable(contents, self.weighted_by_key)
        if len(usable) < len(contents):
            _log.warning(
                "the metrics of %d replies are left out: not finite, or not named as in most",
                len(contents) - len(usable),
            )
        return average(usable, self.weighted_by_key) if usable else None

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """FedAvg's average over the replies with usable metrics; the others are left out."""
        contents = []
        for message in replies:
            if message.has_error():
                node, reason = message.metadata.src_node_id, message.error.reason
                _log.warning("aggregate_evaluate: node %s failed: %s", node, reason)
            else:
                contents.append(message.content)
        return self._averaged(contents, self.evaluate_metrics_aggr_fn)
