"""Claims about what else a bank holds: cores, deltas, ranks of one's own, and a method's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from states import relative, same
from tiny_clients import SHARDS, Bench, classifier, language_model
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Roles, role_of
from rolora.algorithm.method import Method, ServerState
from rolora.data.examples import collate
from rolora.methods import get_method
from rolora.model.bank import PREFIX, Bank, linear_shape
from rolora.training.local import Trained, Work
from rolora.training.settings import LocalSettings

RANKS = dict(zip(SHARDS, (4, 1, 3, 2), strict=True))
EPOCHS = LocalSettings(steps=None, epochs=1, batch_size=4)
SETTINGS = {
    "adamw": LocalSettings(steps=3, batch_size=4, weight_decay=0.1, max_grad_norm=0.5),
    "sgd": replace(EPOCHS, optimizer="sgd", momentum=0.9, weight_decay=0.1),
}
PARTS = {
    "a core": get_method("fed_sb"),
    "cores and gains": get_method("ravan"),
    "a delta": get_method("fedex_lora"),
    "ranks of their own": get_method("hetlora"),
    "ranks of their own and a delta": get_method("flora"),
    "a penalty": get_method("hetlora", gamma=0.5),
    "a filter": get_method("la_lora"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_bert(tmp_path_factory.mktemp("parts") / "bert")


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return classifier(folder, rank=4, dropout=0.3)


def work_of(bench: Bench, method: Method, settings: LocalSettings) -> list[Work]:
    """Each client's part of a round, its ranks its own, from another head and factors each."""
    server = ServerState(bench.start_of(method))
    found = []
    for seed, (name, rows) in enumerate(SHARDS.items()):
        view = method.download(server, ClientInfo(name, len(rows), RANKS[name], 1))
        other = bench.start_of(method, seed)
        own = {
            name: other[name][tuple(slice(width) for width in tensor.shape)].contiguous()
            for name, tensor in view.items()
            if role_of(name) != "delta"
        }
        found.append(Work(name, rows, view | own, settings.num_steps(len(rows))))
    return found


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("part", PARTS)
def test_clients_with_it_end_in_one_bank_where_each_ends_alone(
    bench: Bench, part: str, how: str
) -> None:
    method, settings = PARTS[part], SETTINGS[how]
    work = work_of(bench, method, settings)
    together = bench.train(work, settings, method=method)
    for w, one in zip(work, together, strict=True):
        (alone,) = bench.train([w], settings, method=method)
        assert {n: t.shape for n, t in one.adapter.items()} == {
            n: t.shape for n, t in w.start.items()
        }
        assert relative(one.adapter, alone.adapter) <= 1e-9
        assert one.loss == pytest.approx(alone.loss, rel=1e-9)
        still = w.start.select(lambda name: role_of(name) not in method.trained(1))
        assert same(one.adapter.select(still.__contains__), still)
        assert relative(one.adapter, w.start) > 1e-4


def test_clients_whose_deltas_differ_are_refused(bench: Bench) -> None:
    work = work_of(bench, get_method("fedex_lora"), EPOCHS)
    deltas = work[1].start.only(frozenset({"delta"}))
    other = replace(work[1], start=work[1].start | {n: t + 1 for n, t in deltas.items()})
    with pytest.raises(ValueError, match=r"clients of one bank have different .*lora_delta"):
        bench.train([work[0], other], EPOCHS)
    assert bench.base.bank.clients == 0


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_what_fills_up_a_smaller_rank_stays_zero_bit_for_bit(
    bench: Bench, how: str, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, settings = get_method("hetlora", gamma=gamma), SETTINGS[how]
    work = work_of(bench, method, settings)
    seen: dict[str, list[Tensor]] = {}
    take = Bank.take

    def watched(bank: Bank, client: int) -> AdapterState:
        inside = bank.view(client)
        for name, leaf in bank.leaves.items():
            filled = leaf[client].detach().clone()
            filled[tuple(slice(width) for width in inside[name].shape)] = 0
            seen.setdefault(name, []).append(filled)
        return take(bank, client)

    monkeypatch.setattr(Bank, "take", watched)
    bench.train(work, settings, method=method)
    factors = [name for name in seen if role_of(name) in ("A", "B")]
    assert all(len(seen[name]) == len(work) for name in factors)
    assert {tensor.shape for name in factors for tensor in seen[name]} == {(4, 32), (32, 4)}
    assert not any(tensor.any() for name in factors for tensor in seen[name])


@pytest.mark.parametrize(("name", "task"), [("bert", "classes"), ("llama", "lm"), ("gpt2", "lm")])
def test_a_delta_beside_the_base_is_a_changed_base_weight(
    tmp_path: Path, name: str, task: str
) -> None:
    place = getattr(tiny, f"tiny_{name}")(tmp_path / name)
    bench = language_model(place) if task == "lm" else classifier(place)
    adapter = bench.start_of(get_method("fedex_lora"))
    batch = collate(bench.examples, torch.arange(5), bench.base.tokenizer.pad_token_id)

    def logits(held: AdapterState) -> Tensor:
        with torch.no_grad(), bench.base.holding(held):
            found: Tensor = bench.base.model(**batch.inputs).logits
        return found

    beside = logits(adapter)
    for layer in bench.base.specs.scaling:
        linear: Any = bench.base.model.get_submodule(layer.removeprefix(PREFIX)).base
        delta = adapter[f"{layer}.lora_delta.weight"]
        assert delta.shape == linear_shape(linear)[::-1]
        linear.weight.data += delta if linear.weight.shape == delta.shape else delta.mT
        if type(linear).__name__ == "Conv1D" and delta.shape[0] == delta.shape[1]:
            linear.weight.data += delta.mT - delta
    plain = adapter.select(lambda name: role_of(name) != "delta")
    assert torch.allclose(logits(plain), beside, rtol=0, atol=1e-10)
    none = adapter | {n: torch.zeros_like(t) for n, t in adapter.only(frozenset({"delta"})).items()}
    assert same({"": logits(none)}, {"": logits(plain)})


def test_a_penalty_s_gradient_joins_that_of_the_client_s_own_loss(bench: Bench) -> None:
    settings = LocalSettings(steps=1, batch_size=4, optimizer="sgd")
    method = get_method("hetlora", gamma=0.5, decay=0.3)
    work = work_of(bench, method, settings)
    free = bench.train(work, settings, method=get_method("hetlora"), lr=1.0)
    pulled = bench.train(work, settings, method=method, lr=1.0)
    for w, one, other in zip(work, free, pulled, strict=True):
        leaves = {n: t.clone().requires_grad_(True) for n, t in w.start.items()}
        cost = torch.zeros((), dtype=torch.float64)
        for layer in w.start.layers():
            down, up = leaves[f"{layer}.lora_A.weight"], leaves[f"{layer}.lora_B.weight"]
            first = max(1, len(down) // 2)
            cost = cost + 0.3 * (down[first:].norm() * up[:, first:].norm())
        slopes = torch.autograd.grad(cost, [*leaves.values()], allow_unused=True)
        for name, slope in zip(leaves, slopes, strict=True):
            wanted = one.adapter[name] - (0 if slope is None else slope)
            assert torch.allclose(other.adapter[name], wanted, rtol=0, atol=1e-12), name
        rank = RANKS[w.client]
        assert (relative(other.adapter, one.adapter) > 1e-3) == (rank > 1)


@pytest.mark.parametrize("how", ["adamw", "sgd"])
def test_la_lora_s_factors_take_turns_and_the_waiting_one_does_not_move_a_bit(
    bench: Bench, how: str
) -> None:
    method, roles = get_method("la_lora"), [set[str](), {"B", "head"}, {"A", "head"}]
    ends: list[list[Trained]] = []
    for steps in range(1, 6):
        settings = replace(SETTINGS[how], steps=steps, epochs=None)
        ends.append(bench.train(work_of(bench, method, settings), settings, method=method))
    start = [w.start for w in work_of(bench, method, settings)]
    before = start
    for step, group in enumerate(ends):
        after = [trained.adapter for trained in group]
        for one, other in zip(before, after, strict=True):
            moved: set[str] = {role_of(n) for n in one if not torch.equal(one[n], other[n])}
            assert moved == roles[1 + step % 2]
        before = after


def test_a_method_s_gradient_is_given_every_client_s_own_and_what_it_returns_is_used(
    bench: Bench,
) -> None:
    settings = LocalSettings(steps=1, batch_size=4, optimizer="sgd")
    seen: dict[str, Tensor] = {}

    def doubled(name: str, gradients: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        assert {leaf.shape for leaf in leaves.values()} >= {gradients.shape}
        seen[name] = gradients.clone()
        return 2 * gradients

    method = replace(get_method("fedit"), gradient=doubled)
    work = work_of(bench, method, settings)
    for w in work:
        assert w.steps == 1
    ended = bench.train(work, settings, method=method, lr=1.0)
    everything: Roles = frozenset({"A", "B", "head"})
    assert seen.keys() == work[0].start.only(everything).keys()
    for client, (w, one) in enumerate(zip(work, ended, strict=True)):
        for name, gradients in seen.items():
            step = w.start[name] - one.adapter[name]
            assert torch.allclose(step, 2 * gradients[client], rtol=0, atol=1e-12)
