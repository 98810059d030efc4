"""Claims about turns: the same product from another pair of factors, one of them orthogonal."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from states import assign, dense, make_specs, random_state, same, updates_from
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, pieces, role_of
from rolora.algorithm.factors import turn
from rolora.algorithm.ledger import Arrival, Ledger, after_round, lacking
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.patches import applied, turned
from rolora.algorithm.reduce import mean
from rolora.algorithm.seeding import generator
from rolora.algorithm.step import Aggregation, step
from rolora.methods import get_method

SHAPES = some.tuples(some.integers(1, 9), some.integers(1, 9), some.integers(1, 12))
STILL = some.sampled_from(("A", "B"))


def factors(state: AdapterState, role: str) -> list[Tensor]:
    """The rank-one pieces (rank, width) of each layer's factor."""
    return [pieces(name, tensor) for name, tensor in state.items() if role_of(name) == role]


def orthogonal(factor: Tensor, length: float, within: float) -> bool:
    gram = factor.double() @ factor.double().mT
    wanted = torch.eye(len(factor), dtype=torch.float64) * length**2
    return bool((gram - wanted).abs().max() <= within)


@given(shape=SHAPES, still=STILL, length=some.floats(0.01, 100), seed=some.integers(0, 99))
def test_a_turn_keeps_every_product_to_1e_12_whatever_the_rank(
    shape: tuple[int, int, int], still: Literal["A", "B"], length: float, seed: int
) -> None:
    before = random_state(make_specs((shape,)), seed, torch.float64)
    deficient = {  # the last of the pieces repeats the first, and so the rank is one less
        name: pieces(name, torch.cat([piece[:-1], piece[:1]])).contiguous()
        for name, tensor in before.items()
        if role_of(name) == still
        for piece in [pieces(name, tensor)]
    }
    for start in (before, before | deficient):
        after = turn(ServerState(start), still, length).adapter
        old, new = dense(start), dense(after)
        for layer, product in old.items():
            scale = start.scaling[layer]
            a, b = (start[f"{layer}.lora_{factor}.weight"] for factor in "AB")
            size = float(scale * a.norm() * b.norm())
            assert float((new[layer] - product).norm()) <= 1e-12 * size


@given(
    width=some.integers(4, 9),
    rank=some.integers(1, 4),
    still=STILL,
    length=some.floats(0.01, 100),
    seed=some.integers(0, 99),
)
def test_the_factor_that_stays_frozen_has_orthogonal_pieces_of_this_length(
    width: int, rank: int, still: Literal["A", "B"], length: float, seed: int
) -> None:
    start = random_state(make_specs(((width, width, rank),)), seed, torch.float64)
    after = turn(ServerState(start), still, length).adapter
    assert all(orthogonal(one, length, 1e-12 * length**2) for one in factors(after, still))


@pytest.mark.parametrize("still", ["A", "B"])
def test_a_layer_whose_factor_is_zero_stays_as_it_is(still: Literal["A", "B"]) -> None:
    start = random_state(make_specs(), 0)
    zeros = {
        n: torch.zeros_like(t) for n, t in start.items() if role_of(n) == still and "layer.0" in n
    }
    after = turn(ServerState(start | zeros), still, 1.0)
    untouched = [name for name in start if "layer.0" in name]
    assert len(untouched) == 2
    assert all(torch.equal(after.adapter[name], (start | zeros)[name]) for name in untouched)
    assert not any("layer.0" in name for name in after.patches)


def rounds_of(method: Method, count: int, partial: bool = False) -> list[ServerState]:
    """The server's states of a few rounds of three clients; in some of them two are away."""
    states = [ServerState(method.init(make_specs(), generator(0, "init")))]
    for round in range(1, count + 1):
        infos = [ClientInfo(name, i + 1, 2, round) for i, name in enumerate(("ann", "bob", "cy"))]
        cohort = assign(method, states[-1], infos[: 1 if partial and round % 2 else 3])
        updates = updates_from(method, cohort, seed=round)
        after, report = step(
            method, Aggregation(mean()), states[-1], cohort, updates, generator(round, "step")
        )
        assert report.aggregation_error is not None
        assert report.aggregation_error <= 1e-6
        states.append(after)
    return states


@pytest.mark.parametrize("options", [{}, {"b_rounds": 2}, {"first": "A"}, {"orthogonal_a": True}])
def test_in_every_round_the_frozen_factor_is_orthogonal_and_the_average_exact(
    options: dict[str, object],
) -> None:
    method = get_method("rolora", turn=0.5, **options)
    for state in rounds_of(method, 6, partial=True):
        still = "A" if "B" in method.trained(state.round + 1) else "B"
        found = factors(state.adapter, still)
        assert len(found) == 2
        if any(map(torch.any, found)):  # lora_B is zero before it is trained
            assert all(orthogonal(one, 0.5, 1e-6) for one in found)


@pytest.mark.parametrize("still", ["A", "B"])
def test_a_step_of_sgd_beside_an_orthogonal_factor_is_the_preconditioned_step_of_peft(
    still: Literal["A", "B"],
) -> None:
    lr, length = 0.1, 0.7
    start = random_state(make_specs(((6, 5, 3),)), 1, torch.float64)
    (layer,) = start.layers()
    names = {factor: f"{layer}.lora_{factor}.weight" for factor in "AB"}
    product = torch.randn(6, 5, dtype=torch.float64, generator=generator(0, "gradient"))

    def stepped(state: AdapterState, rate: float, peft: bool) -> Tensor:
        """The product after a step on the factor that is not still."""
        pair = {f: state[names[f]].clone().requires_grad_(f != still) for f in "AB"}
        ((pair["B"] @ pair["A"]) * product).sum().backward()  # type: ignore[no-untyped-call]
        if peft:
            riemannian = pytest.importorskip("peft.optimizers.riemannian", reason="needs peft 0.20")
            riemannian._RiemannianPreconditioner([(pair["A"], pair["B"])], reg=0.0).step()
        after = {f: p.detach() - rate * (0 if p.grad is None else p.grad) for f, p in pair.items()}
        return after["B"] @ after["A"]

    theirs = stepped(start, lr * length**2, peft=True)
    ours = stepped(turn(ServerState(start), still, length).adapter, lr, peft=False)
    assert float((theirs - ours).norm()) <= 1e-12 * float(ours.norm())


def test_a_client_is_sent_the_average_and_rank_times_rank_numbers_and_makes_the_server_s_bits() -> (
    None
):
    def numbers(method: Method) -> list[int]:
        """Down to a client that is always there; checks that it makes what it should have."""
        server, ledger, sent = rounds_of(method, 0)[0], Ledger(), []
        held: dict[str, Tensor] = {}
        for round in range(1, 6):
            infos = [ClientInfo(name, i + 1, 2, round) for i, name in enumerate(("ann", "bob"))]
            cohort = assign(method, server, infos)
            view = cohort["ann"].received
            came = lacking(method, server, view, ledger, ledger.held.get("ann"))
            made = {**held, **applied(held, came)}
            assert same(made, view)
            sent.append(came.num_bytes() // 4)
            updates = updates_from(method, cohort, seed=round)
            how = Aggregation(mean())
            after, _ = step(method, how, server, cohort, updates, generator(round, "step"))
            arrived = [Arrival(one.client, {}, one.num_bytes()) for one in updates]
            ledger, _ = after_round(method, server, after, cohort, ledger, arrived)
            held = {**view, **updates[0].adapter}
            server = after
        return sent

    plain, turned = numbers(get_method("rolora")), numbers(get_method("rolora", turn=1.0))
    layers, rank = 2, 2
    assert turned[0] == plain[0]
    assert turned[1:] == [each + layers * rank * rank for each in plain[1:]]


def test_server_optimizers_keep_no_memory_of_factors_that_are_turned() -> None:
    assert get_method("rolora").supports_server_optimizer
    assert not get_method("rolora", turn=1.0).supports_server_optimizer


def test_scaled_gradients_are_those_of_peft_s_riemannian_optimizer_for_each_client() -> None:
    """Both factors at once, which is what PEFT's knows; each client by its own factors."""
    riemannian = pytest.importorskip("peft.optimizers.riemannian", reason="needs peft 0.20")
    states = [random_state(make_specs(((6, 5, 3),)), seed, torch.float64) for seed in (1, 2)]
    gradients = [random_state(make_specs(((6, 5, 3),)), seed, torch.float64) for seed in (3, 4)]
    leaves = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    (layer,) = states[0].layers()
    pair = [f"{layer}.lora_{factor}.weight" for factor in "AB"]
    hook = get_method("fedit", scaled=True).gradient
    assert hook is not None
    ours = {
        n: hook(n, torch.stack([gradient[n] for gradient in gradients]), leaves) for n in leaves
    }
    for client, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
        theirs = [state[name].clone().requires_grad_() for name in pair]
        for parameter, name in zip(theirs, pair, strict=True):
            parameter.grad = gradient[name].clone()
        riemannian._RiemannianPreconditioner([(theirs[0], theirs[1])], reg=1e-2).step()
        for parameter, name in zip(theirs, pair, strict=True):
            assert parameter.grad is not None
            assert float((ours[name][client] - parameter.grad).norm()) <= 1e-12
        for name in state.only(frozenset({"head"})):
            assert torch.equal(ours[name][client], gradient[name])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_turn_is_applied_in_one_order_whose_bits_no_machine_changes(
    factor: str, threads: int
) -> None:
    """The oracle is NumPy, product by product, in float64, in which a matrix product would show."""
    rng, rank, width = generator(0, "turn"), 16, 40_000  # wide enough for several threads
    tensor = torch.randn(rank, width, generator=rng, dtype=torch.float64)
    by = torch.randn(rank, rank, generator=rng, dtype=torch.float64)
    by = by + by.mT
    wanted = np.zeros((rank, width))
    for k in range(rank):
        wanted = wanted + by.numpy()[:, k, None] * tensor.numpy()[k]
    name = f"layer.lora_{factor}.weight"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = turned(name, pieces(name, tensor), by)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(pieces(name, found).numpy(), wanted)
