"""Claims about the server step: what it refuses, what it leaves alone, and how it counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import cohort_of, dense, make_specs, random_state, same, sent, trained
from torch import Tensor

from rolora.adapter import AdapterState, Roles, Update
from rolora.draws import generator
from rolora.method import (
    Aggregation,
    Method,
    RoundReport,
    ServerState,
    aggregation_error,
    freeze_head,
    get_method,
    step,
)
from rolora.reduce import clip, mean, median, trimmed_mean

SIZES = {"ann": 10, "bob": 7, "cy": 3, "dee": 5}
COHORT = cohort_of(SIZES)
ROLORA = get_method("rolora")
MEAN = Aggregation(mean())
B = "base_model.model.layer.0.query.lora_B.weight"
A = "base_model.model.layer.0.query.lora_A.weight"
BIAS = "base_model.model.score.bias"


def server_state(dtype: torch.dtype = torch.float32) -> ServerState:
    return ServerState(random_state(make_specs(), 0, dtype))


def updates_of(method: Method, server: ServerState, size: float = 0.1) -> list[Update]:
    cohort = cohort_of(SIZES, server.round + 1)
    return [
        sent(method, server, info, trained(method, server, info, seed, size))
        for seed, info in enumerate(cohort.values())
    ]


def take(
    updates: list[Update],
    server: ServerState | None = None,
    method: Method = ROLORA,
    aggregation: Aggregation = MEAN,
) -> tuple[ServerState, RoundReport]:
    start = server or server_state()
    return step(method, aggregation, start, COHORT, updates, generator(0, "aggregate"))


def edited(update: Update, name: str, change: Callable[[Tensor], Tensor] | None) -> Update:
    """The update with one tensor changed, or dropped."""
    tensors = dict(update.adapter)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name, torch.zeros(2, 2)))
    return replace(update, adapter=AdapterState(tensors, update.adapter.scaling))


def renamed(update: Update) -> Update:
    return edited(edited(update, B, None), B.replace("query", "value"), torch.clone)


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def poison(tensor: Tensor) -> Tensor:
        bad = tensor.clone()
        bad.view(-1)[3] = value
        return bad

    return poison


FAULTS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "wrong name": (renamed, f"{B} is missing"),
    "missing name": (lambda u: edited(u, B, None), f"{B} is missing"),
    "missing head": (lambda u: edited(u, BIAS, None), f"{BIAS} is missing"),
    "extra name": (lambda u: edited(u, "lora_C", torch.clone), "lora_C was not asked for"),
    "frozen factor": (lambda u: edited(u, A, torch.clone), f"{A} was not asked for"),
    "transposed": (lambda u: edited(u, B, lambda t: t.T), r"has shape \(2, 4\), expected \(4, 2\)"),
    "cut short": (lambda u: edited(u, B, lambda t: t[:3]), r"has shape \(3, 2\), expected \(4, 2\)"),
    "no dimensions": (lambda u: edited(u, BIAS, lambda t: t[0]), r"has shape \(\), expected \(3,\)"),
    "float64": (lambda u: edited(u, B, Tensor.double), "has dtype torch.float64, expected"),
    "float16": (lambda u: edited(u, B, Tensor.half), "has dtype torch.float16, expected"),
    "int": (lambda u: edited(u, B, Tensor.int), "has dtype torch.int32, expected"),
    "NaN": (lambda u: edited(u, B, poisoned(float("nan"))), f"{B} has values that are not finite"),
    "infinity": (lambda u: edited(u, BIAS, poisoned(float("-inf"))) if False else
                 edited(u, B, poisoned(float("-inf"))), "values that are not finite"),
    "no rows": (lambda u: replace(u, num_examples=0), "num_examples is 0, but it joined with 7"),
    "negative": (lambda u: replace(u, num_examples=-1), "num_examples is -1"),
    "huge": (lambda u: replace(u, num_examples=10**12), "num_examples is 1000000000000"),
    "boolean": (lambda u: replace(u, num_examples=True), "num_examples is True"),
    "fraction": (lambda u: replace(u, num_examples=7.0), "num_examples is 7.0"),  # type: ignore[arg-type]
    "other count": (lambda u: replace(u, num_examples=8), "num_examples is 8, but it joined with 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_update_is_named_and_the_others_are_used_as_if_it_never_came(name: str) -> None:
    spoil, reason = FAULTS[name]
    ann, bob, cy, dee = updates_of(ROLORA, server_state())
    after, report = take([ann, spoil(bob), cy, dee])
    assert report.accepted == ("ann", "cy", "dee")
    assert report.rejected.keys() == {"bob"}
    pytest.raises(AssertionError, match=reason).__enter__  # noqa: B018
    expected, _ = take([ann, cy, dee])
    assert same(after.adapter, expected.adapter)
    assert report.quorum_met
    assert after.round == 1
