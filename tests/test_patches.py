"""Claims about what a delta grows by in a round, and how it travels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from states import assign, dense, effect, make_specs, relative, same, updates_from

from rolora.algorithm.adapter import AdapterState, ClientInfo
from rolora.algorithm.ledger import Arrival, Ledger, after_round, lacking
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.patches import applied, layout, rank_of
from rolora.algorithm.reduce import mean, median
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, step
from rolora.methods import get_method

OUT, IN, RANK = 60, 40, 2
LAYERS = ((OUT, IN, RANK), (IN, OUT, RANK))
DENSE = sum(out * width for out, width, _ in LAYERS)
BOTH = sum(rank * (out + width) for out, width, rank in LAYERS)
HEAD = 3 * 4 + 3


def play(
    method: Method,
    clients: int,
    rounds: int = 3,
    aggregation: Aggregation | None = None,
    absent: int | None = None,
) -> list[tuple[int, AdapterState, AdapterState, AdapterState, ServerState]]:
    """Per round: the numbers sent down to the first client, what it held before, what came, what it
    should have, and the server at the end. ``absent``: the round in which it takes no part."""
    server = ServerState(method.init(make_specs(LAYERS), generator(0, "init")))
    ledger, held, seen = Ledger(), server.adapter.select(lambda name: False), []
    for round in range(1, rounds + 1):
        infos = [ClientInfo(f"c{i:02d}", 1 + i, RANK, round) for i in range(clients)]
        cohort = assign(method, server, infos[round == absent :])
        if "c00" in cohort:
            view = cohort["c00"].received
            came = lacking(method, server, view, ledger, ledger.held.get("c00"))
        updates = updates_from(method, cohort, seed=10 * round)
        how = aggregation or Aggregation(mean())
        after, _ = step(method, how, server, cohort, updates, generator(round, "step"))
        arrived = [Arrival(one.client, {}, one.num_bytes()) for one in updates]
        ledger, _ = after_round(method, server, after, cohort, ledger, arrived)
        if "c00" in cohort:
            seen.append((came.num_bytes() // 4, held, came, view, after))
            held = view | updates[0].adapter
        server = after
    return seen


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
@pytest.mark.parametrize("clients", [1, 3, 9])
def test_what_a_client_adds_to_its_delta_gives_the_bits_of_the_server(
    name: str, clients: int
) -> None:
    for _, held, came, view, _ in play(get_method(name), clients)[1:]:
        assert same({**held, **applied(held, came)}, view)
        sizes = {key: tensor.shape for key, tensor in layout(view, rank_of(came)).items()}
        assert {key: sizes[key] for key in came} == {key: t.shape for key, t in came.items()}


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_down_travels_the_stack_of_the_clients_or_the_matrix_whichever_is_smaller(
    name: str,
) -> None:
    first, *later = [numbers for numbers, *_ in play(get_method(name), 3)]
    assert first == BOTH + DENSE + HEAD
    assert later == [BOTH + 3 * BOTH + HEAD] * 2
    first, *later = [numbers for numbers, *_ in play(get_method(name), 12)]  # 12 · BOTH = DENSE
    assert later == [BOTH + DENSE + HEAD] * 2


def test_a_client_that_was_absent_is_sent_the_matrix() -> None:
    numbers = [each for each, *_ in play(get_method("flora"), 3, rounds=4, absent=2)]
    assert numbers[1:] == [BOTH + DENSE + HEAD, BOTH + 3 * BOTH + HEAD]


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_delta_formed_from_factors_is_the_one_that_was_meant_to_float_tolerance(
    name: str,
) -> None:
    def plainly(server: ServerState, reduce: object, rng: torch.Generator) -> ServerState:
        after = method.aggregate(server, reduce, rng)  # type: ignore[arg-type]
        meant.append(dense(after.adapter))
        return after

    meant: list[dict[str, torch.Tensor]] = []
    method = get_method(name)
    for (*_, after), wanted in zip(
        play(replace(method, aggregate=plainly), 5, rounds=6), meant, strict=True
    ):
        assert after.patches
        assert relative(dense(after.adapter), wanted) < 3e-7


def test_changes_of_no_low_rank_are_sent_as_they_are() -> None:
    seen = play(get_method("flora"), 3, aggregation=Aggregation(median()))
    assert [numbers for numbers, *_ in seen[1:]] == [BOTH + DENSE + HEAD] * 2
    assert all(not after.patches for *_, after in seen)


def test_the_sum_of_factors_has_the_same_bits_in_whatever_order_it_is_taken() -> None:
    *_, (_, held, came, view, _) = play(get_method("flora"), 9)
    order = torch.randperm(9 * RANK, generator=generator(0, "order"))
    turned = {
        name: tensor[order] if name.endswith("grown_A.weight") else tensor[:, order]
        for name, tensor in came.items()
        if "grown" in name
    }
    again = {**held, **applied(held, {**came, **turned})}
    assert same(effect(AdapterState(again, view.scaling)), effect(view))
