"""Claims about local training and evaluation of single clients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import pytest
import torch
from states import relative, same
from tiny import tiny_bert, tiny_llama
from tiny_clients import EVERYTHING, Bench, classifier, language_model
from torch import Tensor, nn

from rolora.algorithm.adapter import AdapterState, Role, Roles, role_of
from rolora.algorithm.method import Method
from rolora.data.examples import Batch, Examples, collate
from rolora.methods import get_method
from rolora.training import local
from rolora.training.local import NonFiniteLoss, Trained, Work, batches, evaluate
from rolora.training.settings import LocalSettings

NOTHING = AdapterState({}, {})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return classifier(tiny_bert(tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return language_model(tiny_llama(tmp_path_factory.mktemp("models") / "llama"))


def stream(client: str = "ann", rows: int = 10, seed: int = 7, round: int = 1) -> Iterator[Tensor]:
    return batches(Work(client, torch.arange(100, 100 + rows), NOTHING, 99), 4, seed, round)


def test_every_epoch_covers_each_row_once_and_ends_in_a_short_batch() -> None:
    found = list(islice(stream(), 9))
    assert [len(batch) for batch in found] == [4, 4, 2] * 3
    for epoch in range(3):
        rows = torch.cat(found[3 * epoch : 3 * epoch + 3])
        assert sorted(rows.tolist()) == list(range(100, 110))


def test_each_epoch_round_client_and_seed_has_an_order_of_its_own() -> None:
    def epochs(**changes: Any) -> list[tuple[int, ...]]:
        found = torch.cat(list(islice(stream(**changes), 6)))
        return [tuple(found[:10].tolist()), tuple(found[10:].tolist())]

    changes: list[dict[str, Any]] = [{}, {"round": 2}, {"client": "bob"}, {"seed": 8}]
    orders = [order for change in changes for order in epochs(**change)]
    assert len(set(orders)) == len(orders)
    assert epochs() == epochs()


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        (LocalSettings(steps=5, batch_size=8), 1, 5),
        (LocalSettings(steps=5, batch_size=8), 1000, 5),
        (LocalSettings(steps=None, epochs=1, batch_size=8), 16, 2),
        (LocalSettings(steps=None, epochs=1, batch_size=8), 17, 3),
        (LocalSettings(steps=None, epochs=3, batch_size=8), 7, 3),
        (LocalSettings(steps=5, epochs=2, batch_size=8), 9, 4),
    ],
)
def test_steps_are_as_told_or_epochs_times_batches_rounded_up(
    settings: LocalSettings, rows: int, steps: int
) -> None:
    assert settings.num_steps(rows) == steps


def counted(bench: Bench, losses: list[float]) -> Bench:
    """The same bench; ``losses`` gets each pass's mean loss of its only client."""

    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        each, count = bench.task.loss(model, batch)
        losses.append(float((each.sum() / count.sum()).detach()))
        return each, count

    return replace(bench, task=replace(bench.task, loss=loss))


def test_the_loss_reported_is_the_mean_over_the_steps(bench: Bench, writer: Bench) -> None:
    settings = LocalSettings(steps=None, epochs=2, batch_size=4)
    for one in (bench, writer):
        losses: list[float] = []
        (trained,) = counted(one, losses).train(one.work(settings)[:1], settings)
        assert trained.steps == len(losses) == 4
        assert trained.loss == pytest.approx(sum(losses) / 4, rel=1e-12)
        assert len(set(losses)) == 4


@pytest.mark.parametrize("settled", [1, 2, 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_blamed_on_client_round_and_step_whenever_it_is_looked_at(
    bench: Bench, bad: float, settled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "SETTLED", settled)
    settings = LocalSettings(steps=4, batch_size=4)
    work = bench.work(settings)
    order = torch.cat(list(islice(batches(work[2], 4, seed=7, round=5), 3)))
    poisoned = int(order[9])  # cat's third batch

    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        each, count = bench.task.loss(model, batch)
        like = torch.tensor(tokens_of(bench, poisoned))
        if batch.inputs["input_ids"].shape[1] < len(like):
            return each, count
        hit = (batch.inputs["input_ids"][:, : len(like)] == like).all(1)
        hit &= batch.lengths == len(like)
        return torch.where(hit, bad, each), count

    broken = replace(bench, task=replace(bench.task, loss=loss))
    with pytest.raises(NonFiniteLoss, match=r"client 'cat' .* in round 5, local step 3:") as caught:
        broken.train(work, settings, round=5)
    assert "\n" not in str(caught.value)
    assert bench.base.bank.clients == 0


def test_short_batches_are_filled_with_a_client_s_own_rows_only(bench: Bench) -> None:
    settings = LocalSettings(steps=None, epochs=1, batch_size=4)
    work = bench.work(settings)[1:]  # without ann, who holds row 0
    own = {tuple(tokens_of(bench, row)) for w in work for row in w.rows.tolist()}
    seen: set[tuple[int, ...]] = set()

    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        for ids, length in zip(batch.inputs["input_ids"], batch.lengths, strict=True):
            seen.add(tuple(ids[:length].tolist()))
        return bench.task.loss(model, batch)

    replace(bench, task=replace(bench.task, loss=loss)).train(work, settings)
    assert seen == own


def tokens_of(bench: Bench, row: int) -> list[int]:
    start, end = bench.examples.offsets[row : row + 2].tolist()
    tokens: list[int] = bench.examples.tokens[start:end].tolist()
    return tokens


def test_gradients_are_clipped_by_each_client_s_own_norm(bench: Bench) -> None:
    """With plain SGD a step moves a client by lr · max_grad_norm at most, along its gradient."""
    free = LocalSettings(steps=1, batch_size=4, optimizer="sgd")
    work = bench.work(free)
    moves = [
        distance(t.adapter, w.start)
        for t, w in zip(bench.train(work, free, lr=1.0), work, strict=True)
    ]
    bound = sorted(moves)[1] * 1.01  # two clients below it, two above
    tight = replace(free, max_grad_norm=bound)
    for w, move, trained in zip(work, moves, bench.train(work, tight, lr=1.0), strict=True):
        moved = distance(trained.adapter, w.start)
        assert moved == pytest.approx(min(move, bound), rel=1e-5)
        (alone,) = bench.train([w], tight, lr=1.0)
        assert relative(trained.adapter, alone.adapter) <= 1e-9


def distance(one: AdapterState, other: AdapterState) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("frozen", ["A", "B", "head"])
def test_weight_decay_never_moves_what_is_frozen(bench: Bench, optimizer: Any, frozen: Any) -> None:
    settings = LocalSettings(
        steps=None, epochs=2, batch_size=4, weight_decay=0.5, optimizer=optimizer, momentum=0.5
    )
    work = bench.work(settings)
    roles: Roles = EVERYTHING - {frozen}
    for w, trained in zip(work, bench.train(work, settings, lambda step: roles), strict=True):
        for name, tensor in trained.adapter.items():
            assert torch.equal(tensor, w.start[name]) == (role_of(name) == frozen)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_pulls_what_is_trained_towards_zero(bench: Bench, optimizer: Any) -> None:
    free = LocalSettings(steps=1, optimizer=optimizer)
    plain, pulled = (
        bench.train(bench.work(settings)[:1], settings, lr=1e-2)[0].adapter
        for settings in (free, replace(free, weight_decay=0.5))
    )
    start = bench.start()
    for name in start:  # in the first step of either, w ← w − lr · decay · w
        assert torch.allclose(pulled[name], plain[name] - 0.005 * start[name], rtol=0, atol=1e-12)


def test_what_is_trained_may_change_with_the_local_step(bench: Bench) -> None:
    settings = LocalSettings(steps=2, batch_size=4)
    work = bench.work(settings)

    def by_turns(step: int) -> Roles:
        return frozenset({"B"}) if step == 0 else frozenset({"A"})

    first = bench.train(
        [replace(w, steps=1) for w in work], settings, lambda step: frozenset({"B"})
    )
    both = bench.train(work, settings, by_turns)
    for w, one, two in zip(work, first, both, strict=True):
        assert same(two.adapter.only(frozenset({"B"})), one.adapter.only(frozenset({"B"})))
        assert distance(two.adapter, one.adapter) > 0
        assert same(two.adapter.only(frozenset({"head"})), w.start.only(frozenset({"head"})))


def test_training_leaves_starts_and_base_as_they_were(bench: Bench) -> None:
    settings = LocalSettings(steps=2)
    work = bench.work(settings)
    held = {name: tensor.clone() for name, tensor in bench.base.model.state_dict().items()}
    bench.train(work, settings)
    assert same(held, bench.base.model.state_dict())
    assert all(same(w.start, bench.start(seed)) for seed, w in enumerate(work))


def test_evaluation_does_not_depend_on_the_batch_size(bench: Bench, writer: Bench) -> None:
    for one in (bench, writer):
        whole = evaluate(one.base, one.task, one.examples, one.start(), batch_size=64)
        for size in (1, 5, 32):
            metrics = evaluate(one.base, one.task, one.examples, one.start(), batch_size=size)
            assert metrics == pytest.approx(whole, rel=1e-6)


def test_evaluation_counts_each_row_once_and_in_its_place(bench: Bench) -> None:
    seen: list[Tensor] = []

    def score(outputs: Tensor, examples: Examples) -> dict[str, float]:
        seen.append(outputs)
        return {}

    adapter = bench.start()
    evaluate(bench.base, replace(bench.task, score=score), bench.examples, adapter, batch_size=5)
    with torch.no_grad(), bench.base.holding(adapter):
        rows = [collate(bench.examples, torch.tensor([i]), 0) for i in range(len(bench.examples))]
        one_by_one = torch.cat([bench.task.outputs(bench.base.model, row) for row in rows])
    assert torch.allclose(seen[0], one_by_one, rtol=0, atol=1e-5)
    assert len(torch.unique(one_by_one, dim=0)) > 28  # rows differ, so their order is seen


def test_accuracy_and_loss_are_over_all_rows_whatever_the_batches(bench: Bench) -> None:
    adapter = bench.start(scale=0.5)
    with torch.no_grad(), bench.base.holding(adapter):
        batch = collate(bench.examples, torch.arange(len(bench.examples)), 0)
        guess = bench.task.outputs(bench.base.model, batch)
    metrics = evaluate(bench.base, bench.task, bench.examples, adapter, batch_size=3)
    right = (guess.argmax(1) == bench.examples.targets).double().mean()
    assert metrics["accuracy"] == pytest.approx(float(right))
    assert metrics["loss"] == pytest.approx(
        float(nn.functional.cross_entropy(guess, bench.examples.targets)), rel=1e-5
    )


@pytest.mark.parametrize(("optimizer", "ratio"), [("adamw", 16.0), ("sgd", 0.25)])
def test_b_learns_at_lr_times_the_ratio_as_under_an_optimizer_of_its_own(
    bench: Bench, writer: Bench, optimizer: Any, ratio: float
) -> None:
    settings = LocalSettings(
        steps=None,
        epochs=2,
        batch_size=4,
        optimizer=optimizer,
        momentum=0.9,
        weight_decay=0.1,
        b_lr_ratio=ratio,
    )
    for one in (bench, writer):
        work = one.work(settings)
        assert len({w.steps for w in work}) == 3  # so clients leave the bank at different steps
        alike = one.train(work, replace(settings, b_lr_ratio=1.0), lr=1e-3)
        for w, ours, plain in zip(work, one.train(work, settings, lr=1e-3), alike, strict=True):
            theirs = by_plain_optimizers(one, w, settings, 1e-3, {"B": ratio})
            assert relative(ours.adapter, theirs) <= 1e-9
            assert relative(ours.adapter, plain.adapter) > 1e-4


def by_plain_optimizers(
    one: Bench,
    work: Work,
    settings: LocalSettings,
    lr: float,
    ratios: Mapping[str, float],
    rounds: Mapping[int, Roles] = MappingProxyType({1: EVERYTHING}),
) -> AdapterState:
    """One client, over these rounds, in which these roles move, with a torch optimiser per role
    that is never reset."""
    base = one.base
    with base.holding(work.start):
        roles: dict[Role, list[Tensor]] = {}
        for name, leaf in base.bank.leaves.items():
            roles.setdefault(role_of(name), []).append(leaf.requires_grad_())
        decay = settings.weight_decay
        optimizers: dict[Role, torch.optim.Optimizer] = {
            role: torch.optim.AdamW(leaves, lr=lr, weight_decay=decay)
            if settings.optimizer == "adamw"
            else torch.optim.SGD(leaves, lr, settings.momentum, weight_decay=decay)
            for role, leaves in roles.items()
        }
        for round, moving in rounds.items():
            stream = batches(work, settings.batch_size, seed=7, round=round)
            for role, optimizer in optimizers.items():
                optimizer.param_groups[0]["lr"] = lr * ratios.get(role, 1) * (role in moving)
            for _ in range(work.steps):
                batch = collate(one.examples, next(stream), base.tokenizer.pad_token_id)
                with base.running(batch) as given:
                    losses, count = one.task.loss(base.model, given)
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                (losses.sum() / count.sum()).backward()  # type: ignore[no-untyped-call]
                for optimizer in optimizers.values():
                    optimizer.step()
        return base.bank.take(0)


def over_rounds(
    one: Bench, work: Sequence[Work], settings: LocalSettings, method: Method, rounds: int
) -> list[Trained]:
    """These clients' training over rounds, each going on from where it was."""
    found: list[Trained] = []
    for round in range(1, rounds + 1):
        if found:
            work = [
                replace(w, start=t.adapter, moments=t.moments)
                for w, t in zip(work, found, strict=True)
            ]
        found = one.train(work, settings, lr=1e-3, round=round, method=method)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_kept_moments_make_rounds_one_training_in_which_the_idle_factor_stands_still(
    bench: Bench, optimizer: Any
) -> None:
    settings = LocalSettings(
        steps=3, batch_size=4, optimizer=optimizer, momentum=0.9, head_lr_ratio=2.0
    )
    kept, method = replace(settings, kept=EVERYTHING), get_method("rolora")
    (work,) = bench.work(settings)[:1]
    (ours,) = over_rounds(bench, [work], kept, method, 4)
    rounds = {round: method.trained(round) for round in range(1, 5)}
    theirs = by_plain_optimizers(bench, work, settings, 1e-3, {"head": 2.0}, rounds)
    assert relative(ours.adapter, theirs) <= 1e-9
    (fresh,) = over_rounds(bench, [work], settings, method, 4)
    assert relative(ours.adapter, fresh.adapter) > 1e-3


def test_clients_of_one_bank_may_have_taken_different_numbers_of_steps_before(
    bench: Bench,
) -> None:
    settings = LocalSettings(steps=None, epochs=1, batch_size=4, kept=EVERYTHING)
    method, work = get_method("fedit"), bench.work(settings)
    assert len({w.steps for w in work}) == 3
    together = over_rounds(bench, work, settings, method, 3)
    for each, w in zip(together, work, strict=True):
        (alone,) = over_rounds(bench, [w], settings, method, 3)
        assert relative(each.adapter, alone.adapter) <= 1e-9
        steps = {int(v) for path, v in each.moments.items() if path.startswith("step/")}
        assert steps == {3 * w.steps}


def test_a_factor_beside_a_zero_one_keeps_no_moments(bench: Bench) -> None:
    settings = LocalSettings(steps=2, batch_size=4, kept=EVERYTHING)
    (work,) = bench.work(settings)[:1]
    zeros = {n: torch.zeros_like(t) for n, t in work.start.items() if role_of(n) == "B"}
    work = replace(work, start=work.start | zeros)
    (first,) = over_rounds(bench, [work], settings, get_method("rolora"), 1)
    assert {role_of(path) for path in first.moments} == {"B", "head"}
    (second,) = over_rounds(bench, [work], settings, get_method("rolora"), 2)
    assert {role_of(path) for path in second.moments} == {"A", "B", "head"}
    assert max(first.moments["step/" + name] for name in zeros) == 2


def test_a_ratio_for_b_leaves_cores_and_heads_at_the_learning_rate(bench: Bench) -> None:
    plain = LocalSettings(steps=3, batch_size=4)
    work = bench.work(plain)[:1]
    core = {
        f"{layer}.lora_core.weight": 0.1 * torch.ones(1, 2, 2, dtype=torch.float64)
        for layer in work[0].start.layers()
    }
    work = [replace(work[0], start=work[0].start | core)]
    for roles in ({"core"}, {"head"}, {"A"}):
        slow, fast = (
            bench.train(work, settings, lambda step, roles=roles: frozenset(roles))[0].adapter  # type: ignore[misc]
            for settings in (plain, replace(plain, b_lr_ratio=16.0))
        )
        assert same(slow, fast)
        assert distance(slow, work[0].start) > 0
