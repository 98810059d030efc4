"""The strategy for other Flower projects, and the project on its page."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from loopback import Command, free_port, until
from safetensors.torch import load_file
from states import make_specs, moved, random_state, same
from tiny import tiny_bert
from tiny_site import KINDS
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import rolora.flower
from rolora.algorithm.adapter import AdapterState, Assignment, ClientInfo, Roles, Update, role_of
from rolora.algorithm.method import Method, ServerState, freeze_head
from rolora.algorithm.reduce import Reducer, clip, mean, median
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, step
from rolora.errors import ConfigError, NoQuorum
from rolora.flower import freeze, moving, strategy
from rolora.methods import get_method

PAGE = Path(__file__).parent.parent / "docs" / "flower.md"
EXAMPLES = {11: 10, 12: 7, 13: 3}  # node -> its rows
LAYERS = tuple(make_specs().scaling)
START = AdapterState(random_state(make_specs(), 0), dict.fromkeys(LAYERS, 1.0))
A = "base_model.model.layer.0.query.lora_A.weight"
B = "base_model.model.layer.0.query.lora_B.weight"
BIAS = "base_model.model.score.bias"

Answer = Callable[[Message], Message | None]
Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor] | ArrayRecord]


@dataclass
class Nodes:
    """A grid of function calls: each node answers with ``answer``, or not at all (None)."""

    answer: Answer
    sent: list[Message] = field(default_factory=list)
    trained: dict[int, str] = field(default_factory=dict)  # round -> what the messages name

    def get_node_ids(self) -> list[int]:
        return list(EXAMPLES)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        self.sent += asked
        for config in (message.content["config"] for message in asked if is_train(message)):
            self.trained[config["server-round"]] = config.get("trainable", "")
        answers = [self.answer(message) for message in asked]
        return [answer for answer in answers if answer is not None]


def node_of(message: Message) -> int:
    return int(message.metadata.dst_node_id)


def is_train(message: Message) -> bool:
    return bool(message.metadata.message_type == "train")


def state_in(record: ArrayRecord) -> AdapterState:
    return AdapterState(record.to_torch_state_dict(), START.scaling)


def trained_by(node: int, round: int, before: AdapterState, roles: Roles) -> AdapterState:
    """What a node holds after a pretended training."""
    return moved(before, roles, 100 * round + node)


def pretended(message: Message) -> dict[str, Tensor]:
    """The same, of what a message names."""
    config = message.content["config"]
    roles: Roles = frozenset(config["trainable"].split(","))
    before = state_in(message.content["arrays"])
    return dict(trained_by(node_of(message), config["server-round"], before, roles))


def reply(message: Message, tensors: Any, **metrics: Any) -> Message:
    record = tensors if isinstance(tensors, ArrayRecord) else ArrayRecord(dict(tensors))
    numbers = {"num-examples": EXAMPLES[node_of(message)], "loss": 1.0}
    numbers |= {name.replace("_", "-"): value for name, value in metrics.items()}
    content = RecordDict({"arrays": record, "metrics": MetricRecord(numbers)})
    return Message(content, reply_to=message)


def honest(message: Message, **metrics: Any) -> Message:
    """A client as the page shows it."""
    if is_train(message):
        return reply(message, moving(pretended(message), message.content["config"]), **metrics)
    numbers = {"accuracy": node_of(message) / 100, "num-examples": EXAMPLES[node_of(message)]}
    numbers |= {name.replace("_", "-"): value for name, value in metrics.items()}
    return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)


def but(node: int, bad: Answer, round: int = 1) -> Answer:
    """Everybody is honest, but this node's training in this round."""

    def answer(message: Message) -> Message | None:
        config = message.content["config"]
        odd = is_train(message) and node_of(message) == node and config["server-round"] == round
        return bad(message) if odd else honest(message)

    return answer


def run(answer: Answer = honest, rounds: int = 1, used: Any = None) -> tuple[Any, Nodes]:
    """The result of some rounds of Flower's own loop, and the grid."""
    nodes = Nodes(answer)
    used = used or strategy(min_train_nodes=3)
    return used.start(nodes, ArrayRecord(dict(START)), num_rounds=rounds), nodes


def mean_of(states: Mapping[int, AdapterState], name: str) -> Tensor:
    """The weighted mean of one tensor, summed in float64."""
    whole = sum(EXAMPLES[node] for node in states)
    parts = [EXAMPLES[node] * state[name].double() for node, state in states.items()]
    return (torch.stack(parts).sum(dim=0) / whole).float()


def by_step(
    method: Method, aggregation: Aggregation, rounds: int
) -> tuple[ServerState, list[float | None]]:
    """The same rounds through rolora's step alone: the last state, and the aggregation errors."""
    server, errors = ServerState(START), []
    for round in range(1, rounds + 1):
        shared, trainable = method.shared(round), method.trainable(round, 0)
        cohort = {
            str(node): Assignment(ClientInfo(str(node), count, 2, round), server.adapter)
            for node, count in EXAMPLES.items()
        }
        updates = [
            Update(
                str(node),
                trained_by(node, round, server.adapter, trainable).only(shared),
                count,
                {},
            )
            for node, count in EXAMPLES.items()
        ]
        server, report = step(method, aggregation, server, cohort, updates, generator(0))
        errors.append(report.aggregation_error)
    return server, errors


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages in the process of a ServerApp only."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """The lines of Flower's log with these words."""
    return lambda words: [line for r in caplog.records if words in (line := r.getMessage())]


def test_the_phase_alternates_and_every_node_is_sent_the_whole_adapter() -> None:
    result, nodes = run(rounds=4)
    assert list(nodes.trained.values()) == ["B,head", "A,head", "B,head", "A,head"]
    sent = [message.content["arrays"] for message in nodes.sent]
    assert len(sent) == 4 * (3 + 3), "all train and evaluate"
    assert all(record.keys() == START.keys() for record in sent)
    assert result.arrays.keys() == START.keys()


def test_the_frozen_factor_stays_bit_for_bit_and_the_other_is_the_float64_mean() -> None:
    before = START
    phases: list[Roles] = [frozenset({"B", "head"}), frozenset({"A", "head"})]
    for round, roles in enumerate(phases, start=1):
        after = state_in(run(rounds=round)[0].arrays)
        theirs = {node: trained_by(node, round, before, roles) for node in EXAMPLES}
        for name in START:
            if role_of(name) in roles:
                assert not torch.equal(after[name], before[name])
                assert torch.equal(after[name], mean_of(theirs, name)), name
            else:
                assert torch.equal(after[name], before[name])
        before = after


@pytest.mark.parametrize("weights", ["num_examples", "uniform"])
@pytest.mark.parametrize(
    "reducer", [mean(), median(), clip(mean(), norm=0.1)], ids=["mean", "median", "clip"]
)
@pytest.mark.parametrize("name", ["rolora", "ffa_lora", "fedit"])
def test_rounds_are_rolora_s_own_steps(name: str, reducer: Reducer, weights: Any) -> None:
    used = strategy(name, reducer=reducer, weights=weights, min_train_nodes=3)
    result, _ = run(rounds=2, used=used)
    server, errors = by_step(get_method(name), Aggregation(reducer, weights), 2)
    assert same(state_in(result.arrays), server.adapter)
    told = [result.train_metrics_clientapp[round]["aggregation_error"] for round in (1, 2)]
    assert told == errors


def test_a_round_s_metrics_say_how_exact_it_was_and_how_many_were_used() -> None:
    result, _ = run(rounds=2)
    for round in (1, 2):
        metrics = dict(result.train_metrics_clientapp[round])
        assert 0 <= metrics.pop("aggregation_error") < 1e-6
        assert metrics == {"loss": 1.0, "round": round, "accepted": 3, "rejected": 0}
    fedit, _ = run(used=strategy("fedit", min_train_nodes=3))
    assert fedit.train_metrics_clientapp[1]["aggregation_error"] > 1e-4


@pytest.mark.parametrize("turn", [1, -1], ids=["as sampled", "backwards"])
def test_replies_are_taken_in_the_order_of_the_nodes_whatever_order_they_arrive_in(
    turn: int,
) -> None:
    class Arriving(Nodes):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> list[Message]:
            return super().send_and_receive(messages)[::turn]

    ones = Reducer(dict, lambda m, value, r, w: m or dict(value), lambda m, rng: (m, {}))
    used = strategy(min_train_nodes=3, reducer=ones)
    result = used.start(Arriving(honest), ArrayRecord(dict(START)), num_rounds=1)
    first = trained_by(11, 1, START, frozenset({"B", "head"}))
    assert same(state_in(result.arrays), first)


def test_a_client_may_send_the_whole_adapter_back() -> None:
    whole, _ = run(lambda m: reply(m, pretended(m)) if is_train(m) else honest(m), rounds=3)
    half, _ = run(rounds=3)
    assert same(state_in(whole.arrays), state_in(half.arrays))


def test_half_an_adapter_is_what_fedavg_hands_on_and_this_strategy_does_not() -> None:
    only_b: Answer = lambda m: reply(m, {B: state_in(m.content["arrays"])[B]})  # noqa: E731
    fedavg, _ = run(only_b, used=FedAvg(min_train_nodes=3, fraction_evaluate=0.0))
    assert fedavg.arrays.keys() == {B}
    assert run()[0].arrays.keys() == START.keys()


def edited(change: Change) -> Answer:
    """A node that sends something else."""

    def answer(message: Message) -> Message:
        tensors = moving(pretended(message), message.content["config"])
        return reply(message, change(tensors))

    return answer


def with_b(change: Callable[[Tensor], Tensor]) -> Answer:
    return edited(lambda tensors: {**tensors, B: change(tensors[B])})


def with_value(value: float) -> Answer:
    return with_b(lambda tensor: torch.where(torch.arange(8).view(4, 2) == 3, value, tensor))


def with_bytes(data: bytes, stype: str = "numpy.ndarray") -> Answer:
    def change(tensors: dict[str, Tensor]) -> ArrayRecord:
        arrays = {name: Array(tensor.numpy()) for name, tensor in tensors.items()}
        return ArrayRecord({**arrays, B: Array("float32", (4, 2), stype, data)})

    return edited(change)


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def promising(count: int) -> bytes:
    """The header of a large array, and no array."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def with_two_records(message: Message) -> Message:
    content = honest(message).content
    content["more"] = ArrayRecord(dict(START))
    return Message(content, reply_to=message)


def without_metrics(message: Message) -> Message:
    return Message(RecordDict({"arrays": ArrayRecord(pretended(message))}), reply_to=message)


def unfrozen(message: Message) -> Message:
    before = state_in(message.content["arrays"])
    return reply(message, moved(before, frozenset({"A", "B", "head"}), 1))


GOOD = saved(np.zeros((4, 2), np.float32))
COUNT = "expected one MetricRecord with 'num-examples' from 1 to 536870911"
UNREADABLE = "its reply cannot be read"
FAULTS: dict[str, tuple[Answer, str]] = {
    "NaN": (with_value(math.nan), f"{B} has values that are not finite"),
    "infinity": (with_value(-math.inf), f"{B} has values that are not finite"),
    "transposed": (with_b(lambda t: t.T), f"{B} has shape (2, 4), expected (4, 2)"),
    "float64": (with_b(Tensor.double), f"{B} has dtype torch.float64, expected torch.float32"),
    "missing": (edited(lambda t: {n: t[n] for n in t if n != B}), f"{B} is missing"),
    "nothing": (edited(lambda t: ArrayRecord()), "is missing"),
    "extra": (edited(lambda t: {**t, "lora_C": t[B]}), "lora_C was not asked for"),
    "both factors": (unfrozen, f"{A} is frozen in this round but came back changed"),
    "text": (with_bytes(saved(np.array(["a"] * 8))), UNREADABLE),
    "cut short": (with_bytes(GOOD[:-3]), UNREADABLE),
    "a header of far more": (with_bytes(promising(10**15)), UNREADABLE),
    "pickle": (with_bytes(b"cos\nsystem\n(S'true'\ntR."), UNREADABLE),
    "an archive": (with_bytes(b"PK\x03\x04 and so on"), UNREADABLE),
    "another coding": (with_bytes(GOOD, "torch"), UNREADABLE),
    "a huge count": (lambda m: honest(m, num_examples=10**12), COUNT),
    "no rows": (lambda m: honest(m, num_examples=0), COUNT),
    "fewer than none": (lambda m: honest(m, num_examples=-7), COUNT),
    "half a row": (lambda m: honest(m, num_examples=6.5), COUNT),
    "NaN rows": (lambda m: honest(m, num_examples=math.nan), COUNT),
    "rows in a list": (lambda m: honest(m, num_examples=[7]), COUNT),
    "no metrics": (without_metrics, COUNT),
    "two records": (with_two_records, "expected one ArrayRecord, got 2"),
    "an error": (lambda m: Message(Error(1, "out of\nmemory"), reply_to=m), "out of memory"),
    "silence": (lambda m: None, "no answer before the deadline"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_reply_is_named_and_counted_and_the_others_are_used_as_if_it_never_came(
    fault: str, said: Callable[[str], list[str]]
) -> None:
    bad, reason = FAULTS[fault]
    result, _ = run(but(12, bad))
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["accepted"], metrics["rejected"], metrics["round"]) == (2, 1, 1)
    (line,) = said("is left out: ")
    assert line.startswith("aggregate_train: the reply of node 12 is left out: ")
    assert reason in line
    assert "\n" not in line
    theirs = {n: trained_by(n, 1, START, frozenset({"B", "head"})) for n in (11, 13)}
    after = state_in(result.arrays)
    for name in START:
        expected = START[name] if role_of(name) == "A" else mean_of(theirs, name)
        assert torch.equal(after[name], expected), name


def test_a_node_may_not_change_how_many_rows_it_has(said: Callable[[str], list[str]]) -> None:
    result, _ = run(but(12, lambda m: honest(m, num_examples=400_000), round=2), rounds=3)
    assert [m["rejected"] for m in result.train_metrics_clientapp.values()] == [0, 1, 0]
    (line,) = said("is left out: ")
    assert "num_examples is 400000, but it joined with 7" in line


def test_of_two_replies_of_a_node_the_first_counts_and_a_stranger_s_does_not(
    said: Callable[[str], list[str]],
) -> None:
    used = strategy(min_train_nodes=3)
    nodes = Nodes(honest)
    arrays = ArrayRecord(dict(START))
    asked = used.configure_train(1, arrays, ConfigRecord(), nodes)
    replies = nodes.send_and_receive(asked)
    again = with_b(lambda tensor: tensor * 2)(nodes.sent[0])
    stranger = Message(nodes.sent[0].content, dst_node_id=99, message_type="train")
    replies += [x for x in (again, Message(replies[0].content, reply_to=stranger)) if x]
    after, metrics = used.aggregate_train(1, replies)
    assert metrics is not None
    assert (metrics["accepted"], metrics["rejected"]) == (3, 2)
    assert same(state_in(after), state_in(run()[0].arrays))
    assert [line.rpartition(": ")[2] for line in said("is left out: ")] == [
        "sent more than one update; the first counts",
        "not in this round's cohort",
    ]


def test_a_round_without_enough_good_replies_changes_nothing_and_its_phase_comes_again(
    said: Callable[[str], list[str]],
) -> None:
    used = strategy(min_train_nodes=3, quorum=3)
    result, nodes = run(but(12, lambda m: None, round=2), rounds=4, used=used)
    assert list(nodes.trained.values()) == ["B,head", "A,head", "A,head", "B,head"]
    metrics = result.train_metrics_clientapp
    assert [metrics[round]["round"] for round in (1, 2, 3, 4)] == [1, 1, 2, 3]
    assert (metrics[2]["accepted"], metrics[2]["rejected"]) == (2, 1)
    assert "aggregation_error" not in metrics[2]
    (line,) = said("nothing is averaged")
    assert "2 usable replies, but a round needs 3" in line
    assert "the next round repeats round 2 of the method" in line
    stalled, _ = run(but(12, lambda m: None, round=2), rounds=2, used=used)
    assert same(state_in(stalled.arrays), state_in(run()[0].arrays))


def test_a_run_in_which_no_round_was_averaged_fails_and_says_so() -> None:
    with pytest.raises(NoQuorum, match="no round was averaged: none had 1 usable replies"):
        run(lambda m: None if is_train(m) else honest(m), rounds=2)


def test_a_second_start_begins_anew() -> None:
    used = strategy(min_train_nodes=3)
    once, _ = run(rounds=3, used=used)
    answer: Answer = lambda m: honest(m, num_examples=5)  # noqa: E731
    run(answer, rounds=1, used=used)
    again, nodes = run(rounds=3, used=used)
    assert nodes.trained[1] == "B,head"
    assert same(state_in(again.arrays), state_in(once.arrays))


@pytest.mark.parametrize(
    ("odd", "left_out"),
    [
        ({"loss": math.nan}, 1),
        ({"loss": [1.0, 2.0]}, 1),
        ({"loss": 10**400}, 1),
        ({"more": 1.0}, 1),
        ({}, 0),
    ],
    ids=str,
)
def test_odd_metrics_are_left_out_and_end_no_run(
    odd: dict[str, Any], left_out: int, said: Callable[[str], list[str]]
) -> None:
    def answer(message: Message) -> Message:
        if node_of(message) != 13:
            return honest(message, loss=2.0)
        return honest(message, **({"loss": 2.0} | odd))

    used = strategy(min_train_nodes=3, min_evaluate_nodes=3)
    result, _ = run(answer, used=used)
    trained, scored = result.train_metrics_clientapp[1], result.evaluate_metrics_clientapp[1]
    assert trained["loss"] == pytest.approx(2.0)
    assert (trained["accepted"], trained["rejected"]) == (3, 0), "its tensors are good"
    kept = [11, 12] if left_out else [11, 12, 13]
    rows = sum(EXAMPLES[node] for node in kept)
    expected = sum(node / 100 * EXAMPLES[node] for node in kept) / rows
    assert scored["accuracy"] == pytest.approx(expected)
    assert scored.keys() == {"accuracy", "loss"}
    assert len(said("the metrics of 1 replies are left out")) == 2 * left_out


def test_evaluation_without_one_usable_reply_has_no_metrics_and_ends_no_run() -> None:
    result, _ = run(lambda m: honest(m) if is_train(m) else honest(m, num_examples=0))
    assert not result.evaluate_metrics_clientapp
    assert result.train_metrics_clientapp[1]["accepted"] == 3


def test_a_round_without_training_leaves_everything_to_evaluation() -> None:
    result, nodes = run(used=strategy(fraction_train=0.0), rounds=2)
    assert not any(is_train(message) for message in nodes.sent)
    assert not result.train_metrics_clientapp
    assert result.evaluate_metrics_clientapp.keys() == {1, 2}


def test_the_keywords_of_fedavg_mean_what_they_mean_there() -> None:
    def other_names(message: Message) -> Message:
        content = message.content
        renamed = RecordDict({"arrays": content["lora"], "config": content["wanted"]})
        (stand_in := Message(renamed, reply_to=message)).metadata.dst_node_id = node_of(message)
        told = honest(stand_in).content
        told["metrics"]["rows"] = told["metrics"].pop("num-examples")
        return Message(told, reply_to=message)

    class Named(Nodes):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> list[Message]:
            return [other_names(message) for message in messages]

    used = strategy(
        min_train_nodes=3,
        fraction_evaluate=0.0,
        weighted_by_key="rows",
        arrayrecord_key="lora",
        configrecord_key="wanted",
        train_metrics_aggr_fn=lambda contents, key: MetricRecord({"count": len(contents)}),
    )
    result = used.start(Named(honest), ArrayRecord(dict(START)), num_rounds=1)
    assert same(state_in(result.arrays), state_in(run()[0].arrays))
    assert result.train_metrics_clientapp[1]["count"] == 3
    few, nodes = run(used=strategy(fraction_train=0.67, min_train_nodes=1, fraction_evaluate=0.0))
    assert len(nodes.sent) == few.train_metrics_clientapp[1]["accepted"] == 2
    with pytest.raises(TypeError, match="fraction_trian"):
        strategy("rolora", fraction_trian=0.5)


def test_the_methods_of_plain_clients_are_these_and_others_are_refused_in_one_line() -> None:
    refused = {}
    for name in rolora.method_names():
        try:
            strategy(name)
        except ConfigError as error:
            refused[name] = str(error)
    able = set(rolora.method_names()) - refused.keys()
    assert able == {"rolora", "ffa_lora", "fedit", "fedsvd", "lora_fair"}
    assert "keep" in refused["local"]
    assert all("use 'rolora'" in refused[name] for name in ("local", "fedsa_lora", "la_lora"))
    assert "also changes the base weights" in refused["fedex_lora"]
    assert "use 'fedit'" in refused["centralized"]
    assert not any("\n" in text for text in refused.values())
    with pytest.raises(ConfigError, match="unknown method 'roloro': did you mean 'rolora'"):
        strategy("roloro")
    with pytest.raises(ConfigError, match="quorum is 0, expected at least 1"):
        strategy(quorum=0)


def test_a_method_that_trains_by_local_step_or_downloads_by_client_is_refused() -> None:
    rolora_ = get_method("rolora")
    by_step_ = replace(rolora_, trainable=lambda round, step: rolora_.shared(round + step))
    by_client = replace(rolora_, download=lambda server, client: server.adapter)
    for method in (by_step_, by_client):
        with pytest.raises(ConfigError, match="a ClientApp keeps none"):
            strategy(method)


def test_a_method_with_options_or_a_frozen_head_is_taken_as_it_is() -> None:
    first_a, nodes = run(used=strategy(get_method("rolora", first="A"), min_train_nodes=3))
    assert nodes.trained == {1: "A,head"}
    assert torch.equal(state_in(first_a.arrays)[B], START[B])
    frozen, nodes = run(used=strategy(freeze_head(get_method("rolora")), min_train_nodes=3))
    assert nodes.trained == {1: "B"}
    assert torch.equal(state_in(frozen.arrays)[BIAS], START[BIAS])


def test_a_message_names_only_what_the_adapter_has() -> None:
    used, nodes = strategy(min_train_nodes=3), Nodes(honest)
    headless = START.only(frozenset({"A", "B"}))
    used.start(nodes, ArrayRecord(dict(headless)), num_rounds=2)
    assert list(nodes.trained.values()) == ["B", "A"]


def without(name: str) -> dict[str, Tensor]:
    return {n: tensor for n, tensor in START.items() if n != name}


UNFIT: dict[str, tuple[Mapping[str, Tensor], str]] = {
    "no LoRA": (START.only(frozenset({"head"})), "no name ends in lora_A.weight"),
    "the whole model": (
        {A.replace(".weight", ".default.weight"): START[A]},
        "lora_A.default.weight is neither a lora_A.weight nor a lora_B.weight",
    ),
    "DoRA": (
        {**START, A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)},
        "lora_magnitude_vector is neither",
    ),
    "one factor": (without(B), "layer.0.query has no lora_A (rank, in) with a lora_B (out, rank)"),
    "another rank": ({**START, B: torch.zeros(4, 3)}, "layer.0.query has no lora_A"),
    "a convolution": ({**START, A: torch.zeros(2, 6, 1, 1)}, "layer.0.query has no lora_A"),
    "integers": ({**START, A: torch.ones(2, 6, dtype=torch.int32)}, f"{A} has values that are not"),
    "NaN": ({**START, A: torch.full((2, 6), math.nan)}, f"{A} has values that are not finite"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_initial_arrays_that_are_no_adapter_are_refused_in_one_line(case: str) -> None:
    tensors, reason = UNFIT[case]
    with pytest.raises(ConfigError) as found:
        strategy().start(Nodes(honest), ArrayRecord(dict(tensors)), num_rounds=1)
    assert reason in str(found.value)
    assert "pass ArrayRecord(peft.get_peft_model_state_dict(model))" in str(found.value)
    assert "\n" not in str(found.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "model")


def peft_model(folder: Path) -> Any:
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    targets = ["query", "value"]
    return peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=targets)
    )


@pytest.mark.parametrize("trainable", ["B,head", "A,head", "A,B,head", "B"])
def test_a_peft_model_trains_what_the_message_names_and_that_is_what_moves(
    trainable: str, folder: Path
) -> None:
    model, config = peft_model(folder), {"trainable": trainable}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # with lora_B = 0 there is no gradient for lora_A
            torch.nn.init.normal_(parameter, generator=generator(0))
    before = {n: t.clone() for n, t in peft.get_peft_model_state_dict(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    freeze(model, config)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    after = peft.get_peft_model_state_dict(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {role_of(name) for name in changed} == set(trainable.split(","))
    assert moving(after, config).keys() == changed
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_only_the_active_adapter_of_a_model_is_trained(folder: Path) -> None:
    model = peft_model(folder)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    freeze(model, {"trainable": "A,head"})
    named = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert named
    assert all(".other." in name and "lora_B" not in name for name in named)


def test_a_client_without_the_strategy_s_message_is_told_so(folder: Path) -> None:
    for config in ({}, {"trainable": ""}, {"trainable": 3}):
        with pytest.raises(ConfigError, match="the message's config has no 'trainable'"):
            moving(START, config)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ConfigError, match="trains B,head, but the model has no such parameter"):
        freeze(base, {"trainable": "B,head"})


def test_real_clients_of_a_real_model_alternate(folder: Path) -> None:
    """PEFT's own state goes through Flower's records and back, at two clients with a gradient."""

    def answer(message: Message) -> Message:
        config, model = message.content["config"], peft_model(folder)
        arrays = message.content["arrays"].to_torch_state_dict()
        peft.set_peft_model_state_dict(model, arrays)
        freeze(model, config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            ids = torch.arange(12).view(2, 6) + node_of(message)
            model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
            optimizer.step()
        return reply(message, moving(peft.get_peft_model_state_dict(model), config))

    start = peft.get_peft_model_state_dict(peft_model(folder))
    states = [start]
    for rounds in (1, 2, 3):
        used = strategy(min_train_nodes=3, fraction_evaluate=0.0)
        result = used.start(Nodes(answer), ArrayRecord(dict(start)), num_rounds=rounds)
        states.append(result.arrays.to_torch_state_dict())
        assert result.train_metrics_clientapp[rounds]["aggregation_error"] < 1e-6
    for before, after, roles in zip(states, states[1:], ("B", "A", "B"), strict=False):
        changed = {role_of(name) for name in start if not torch.equal(before[name], after[name])}
        assert changed == {roles, "head"}


def test_the_package_and_its_client_s_side_do_without_flwr() -> None:
    code = (
        "import sys; sys.modules['flwr'] = None\n"
        "import rolora.flower\n"
        "from rolora.flower import freeze, moving\n"
        "print(rolora.flower.moving.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "moving"


def test_the_public_names_of_the_package_are_what_their_homes_define() -> None:
    assert rolora.flower.__all__ == ["freeze", "moving", "strategy"]
    for name in rolora.flower.__all__:
        found = getattr(rolora.flower, name)
        assert callable(found)
        assert found.__name__ == name
    with pytest.raises(AttributeError, match="strategie"):
        rolora.flower.strategie  # type: ignore[attr-defined]  # noqa: B018


def project_before() -> dict[str, str]:
    """The files of the page's project: each block that its file's name is written above."""
    found = re.findall(r"^`([\w.]+)`\n\n```\w+\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.M)
    return dict(found)


def project_after() -> dict[str, str]:
    """The same with the page's diff applied; each of its hunks must fit in one place."""
    files = project_before()
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.M)
    for part in re.split(r"^--- a/", diff, flags=re.M)[1:]:
        name, _, hunks = part.partition("\n")
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.M)[1:]:
            lines = [line + "\n" for line in hunk.splitlines()]
            old = "".join(line[1:] or "\n" for line in lines if line[0] in " -\n")
            new = "".join(line[1:] or "\n" for line in lines if line[0] in " +\n")
            assert files[name].count(old) == 1, f"{name} has not once:\n{old}"
            files[name] = files[name].replace(old, new)
    return files


def test_the_page_s_change_is_one_line_and_an_import_at_the_server_and_two_at_the_client() -> None:
    before, after = project_before(), project_after()
    assert sorted(before) == ["adapted.py", "client_app.py", "pyproject.toml", "server_app.py"]
    assert before["adapted.py"] == after["adapted.py"]
    added = {
        name: [line for line in after[name].splitlines() if line not in text.splitlines()]
        for name, text in before.items()
    }
    assert [len(added[name]) for name in sorted(added)] == [0, 3, 1, 2]
    for name, text in after.items():
        if name.endswith(".py"):
            compile(text, name, "exec")


@dataclass
class Flower:
    """Flower's own programs on this machine: a SuperLink and SuperNodes, nothing of rolora's."""

    folder: Path
    port: int
    programs: list[Command] = field(default_factory=list)

    def start(self, name: str, *words: object) -> None:
        program = (str(Path(sys.executable).parent / name), "--insecure")
        log = self.folder / f"{len(self.programs)}.log"
        self.programs.append(Command.start(log, *words, program=program))

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self.port}/health"
            return bool(urllib.request.urlopen(url, timeout=5).status == 200)
        return False

    def run(self, project: Mapping[str, str], name: str, rounds: int) -> str:
        """What ``flwr run`` says until the run has ended; the adapter is in the folder ``name``."""
        place = self.folder / f"{name}-project"
        place.mkdir()
        for file, text in project.items():
            (place / file).write_text(text)
        wanted = {"model": self.folder / "model", "out": self.folder / name}
        texts = [f'{key}="{path}"' for key, path in wanted.items()]
        config = " ".join([*texts, f"num-server-rounds={rounds}"])
        program = str(Path(sys.executable).parent / "flwr")
        words = ("run", str(place), "here", "--stream", "--run-config", config)
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=900)
        return done.stdout + done.stderr


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flower]:
    port, home = free_port(), tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    source = Path(rolora.__file__).resolve().parents[1]
    settings = {
        "FLWR_HOME": home,
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": source,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    tiny_bert(tmp_path / "model")
    started = Flower(tmp_path, port)
    try:
        started.start("flower-superlink", "--port", port)
        until(started.answers, 120, "the SuperLink")
        for node, rows in (("ann", 21), ("bob", 13)):
            texts = [f"{list(KINDS.values())[row % 3]},{row % 3}\n" for row in range(rows)]
            (tmp_path / f"{node}.csv").write_text("text,label\n" + "".join(texts))
            words = ("--node-config", f'data="{tmp_path / node}.csv"', "--port", free_port())
            started.start("flower-supernode", "--superlink", f"127.0.0.1:{port}", *words)
        yield started
    finally:
        for program in reversed(started.programs):
            program.end()


@pytest.mark.flower
def test_the_page_s_project_runs_with_flwr_run_before_and_after_the_change(flower: Flower) -> None:
    log = flower.run(project_before(), "before", 1)
    assert "Starting FedAvg strategy" in log, log
    assert (flower.folder / "before" / "adapter_model.safetensors").exists(), log
    log = flower.run(project_after(), "after", 2)
    assert "Starting LoraStrategy strategy" in log, log
    phases = re.findall(r"round (\d) of the method trains ([\w,]+)", log)
    assert phases == [("1", "B,head"), ("2", "A,head")], log
    assert "is left out" not in log
    errors = re.findall(r"'accepted': 2, 'rejected': 0, 'aggregation_error': ([\d.e-]+)}", log)
    assert len(errors) == 2, log
    assert max(map(float, errors)) < 1e-6
    base = AutoModelForSequenceClassification.from_pretrained(flower.folder / "model", num_labels=3)
    model = peft.PeftModel.from_pretrained(base, flower.folder / "after")
    stored = load_file(flower.folder / "after" / "adapter_model.safetensors")
    assert all(stored[name].abs().sum() > 0 for name in stored if role_of(name) == "B")
    assert model(input_ids=torch.arange(6)[None]).logits.isfinite().all()
