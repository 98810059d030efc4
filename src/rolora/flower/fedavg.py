"""For a ServerApp of one's own: a Flower strategy that averages as a method of rolora says.

>>> from rolora.flower import strategy
>>> strategy("rolora", fraction_train=0.5).configrecord_key
'config'
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
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
from rolora.errors import ConfigError
from rolora.flower.client import TRAINABLE
from rolora.flower.records import adapter_in, comparable, update_in
from rolora.methods import get_method

PLAIN = Specs(  # a PEFT model's adapter at its smallest
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
    **fedavg: Any,
) -> LoraStrategy:
    """A strategy for ``flwr.serverapp``, in the place of FedAvg, whose keywords it takes too.

    ``method`` is a name, or a Method such as ``get_method("rolora", first="A")``; ``reducer``
    combines the updates (left out, their mean); ``weights`` are those of a mean; ``quorum`` is how
    many good replies a round needs. Raises ConfigError for a method that plain clients cannot do.
    """
    found = get_method(method) if isinstance(method, str) else method
    _refuse_what_plain_clients_cannot(found)
    if quorum < 1:
        raise ConfigError(f"quorum is {quorum}, expected at least 1")
    return LoraStrategy(found, Aggregation(reducer or mean(), weights, quorum), **fedavg)


def _refuse_what_plain_clients_cannot(method: Method) -> None:
    name = method.name
    if not method.federated:
        raise ConfigError(
            f"method {name!r} trains on all rows in one place, and Flower's nodes keep theirs: "
            "use 'fedit', which averages plain LoRA, or run it with rolora compare"
        )
    asked = [(round, step) for round in (1, 2) for step in (0, 1)]
    hooks = (method.gradient, method.penalty)
    if (
        method.download is not whole_adapter
        or method.upload is not as_trained
        or hooks != (None, None)
        or method.needs_gradient
        or any(method.trainable(round, step) != method.shared(round) for round, step in asked)
    ):
        raise ConfigError(
            f"method {name!r} needs clients that keep more than the shared adapter, and plain "
            "Flower clients keep nothing: use 'rolora', or the whole engine (rolora run --on)"
        )
    if len(method.init(PLAIN, generator(0))) > len(PLAIN.tensors):
        raise ConfigError(
            f"method {name!r} changes the base weights too, for which a PEFT model has no place: "
            "use 'rolora', or the whole engine (rolora run --on)"
        )


class LoraStrategy(FedAvg):  # type: ignore[misc]
    """FedAvg's sampling, messages and evaluation; rolora's ``step`` in the place of its average.

    The state is rolora's: its ``round`` counts rounds that were averaged, and the phase follows it
    alone. Flower's own loop counts every round.
    """

    def __init__(self, method: Method, aggregation: Aggregation, **fedavg: Any) -> None:
        super().__init__(**fedavg)
        self.method, self.aggregation = method, aggregation
        self._begin()

    def _begin(self) -> None:
        self.state = ServerState(AdapterState({}, {}))
        self.asked: tuple[str, ...] = ()
        self.counts: dict[str, int] = {}  # node -> the number of examples that it first named

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Flower's loop, from the method's first round on.

        Raises AggregationError if no round at all could be averaged.
        """
        self._begin()
        result = super().start(*args, **kwargs)
        if self.state.attempt and not self.state.round:
            raise AggregationError(
                f"no round was averaged: none had {self.aggregation.quorum} good replies (quorum); "
                "the log says for each reply what was wrong"
            )
        return result

    def summary(self) -> None:
        """Log the strategy's settings."""
        log(INFO, "\t├──> Method: %s, quorum %d", self.method.name, self.aggregation.quorum)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The whole adapter for every sampled node, and what it is to train in this round."""
        self.state = replace(self.state, adapter=adapter_in(arrays))
        roles = self.method.trainable(self.state.round + 1, 0)
        trained = ",".join(sorted(roles & {role_of(name) for name in self.state.adapter}))
        config[TRAINABLE] = trained
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.asked = tuple(map(str, sorted(m.metadata.dst_node_id for m in messages)))
        log(
            INFO, "configure_train: round %d of the method trains %s", self.state.round + 1, trained
        )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next adapter, whole, and the metrics of the round; a bad reply is left out.

        Below the quorum the adapter stays as it is, and the next round repeats the phase.
        """
        if not self.asked:
            return None, None
        came = list(replies)
        report = self._step(came)
        accepted, rejected = report.accepted, report.rejected
        for node, reason in rejected.items():
            log(WARNING, "aggregate_train: the reply of node %s is left out: %s", node, reason)
        if not report.quorum_met:
            log(
                WARNING,
                "aggregate_train: %d good replies, and a round needs %d: nothing is averaged, and "
                "the next round does round %d of the method again",
                len(accepted),
                self.aggregation.quorum,
                self.state.round + 1,
            )
        first = {str(message.metadata.src_node_id): message for message in reversed(came)}
        contents = [first[node].content for node in accepted]
        metrics = self._averaged(contents, self.train_metrics_aggr_fn) or MetricRecord()
        metrics["round"] = self.state.round
        metrics["accepted"], metrics["rejected"] = len(accepted), len(rejected)
        if report.aggregation_error is not None:
            metrics["aggregation_error"] = report.aggregation_error
        return ArrayRecord(dict(self.state.adapter)), metrics

    def _step(self, replies: Iterable[Message]) -> RoundReport:
        """Take the state through rolora's step; a node that did not answer has failed."""
        state, round = self.state, self.state.round + 1
        shared = state.adapter.only(self.method.shared(round))
        updates = [update_in(r, state.adapter, shared, self.weighted_by_key) for r in replies]
        came = {update.client for update in updates}
        silent = [
            Failure(node, "no answer within the time that it had")
            for node in self.asked
            if node not in came
        ]
        named = {u.client: u.num_examples for u in reversed(updates) if isinstance(u, Update)}
        counts = named | self.counts
        rank = max(t.shape[0] for name, t in state.adapter.items() if role_of(name) == "A")
        cohort = {
            node: Assignment(ClientInfo(node, counts.get(node, 0), rank, round), state.adapter)
            for node in self.asked
        }
        rng = generator(0, "aggregate", round, state.attempt)  # for reducers that draw; none does
        replies = [*updates, *silent]
        self.state, report = step(self.method, self.aggregation, state, cohort, replies, rng)
        self.counts |= {node: counts[node] for node in report.accepted}
        return report

    def _averaged(self, contents: list[Any], average: Any) -> MetricRecord | None:
        """The metrics of these replies as one record; None if none can be used."""
        usable = comparable(contents, self.weighted_by_key)
        if len(usable) < len(contents):
            log(
                WARNING,
                "the metrics of %d replies are left out: not finite, or named otherwise than most",
                len(contents) - len(usable),
            )
        return average(usable, self.weighted_by_key) if usable else None

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """FedAvg's, over the replies whose metrics can be averaged; others end no run."""
        good, _ = self._check_and_log_replies(list(replies), is_train=False, validate=False)
        return self._averaged([message.content for message in good], self.evaluate_metrics_aggr_fn)
