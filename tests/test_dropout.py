"""Claims about LoRA's dropout in the bank: a row's mask is its own, whoever trains beside it."""

from __future__ import annotations

import pytest
import torch
from states import relative, same
from tiny import tiny_bert
from tiny_clients import Bench, classifier
from torch import Tensor

from rolora.data.examples import collate
from rolora.model.bank import Noise, row_keys
from rolora.training.local import Work, evaluate
from rolora.training.settings import LocalSettings

SEEDS = [11, 22, 2**63 - 1, 0]


def kept(keys: Tensor, layer: int = 5, length: int = 32, rate: float = 0.3) -> Tensor:
    """Which elements of (rows, length, 64) stay."""
    return Noise(keys).mask(torch.zeros(len(keys), length, 64), layer, rate) > 0


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_the_share_dropped_is_the_rate_and_the_mean_is_kept(rate: float) -> None:
    mask = Noise(row_keys(SEEDS, 0, [8] * 4)).mask(torch.zeros(32, 64, 128), 5, rate)
    assert torch.unique(mask).tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    assert float((mask == 0).float().mean()) == pytest.approx(rate, abs=0.01)  # of 262,144
    by_row = (mask == 0).float().mean(dim=(1, 2))
    assert float((by_row - rate).abs().max()) < 0.03


def test_rows_clients_steps_layers_and_positions_toss_independent_coins() -> None:
    keys = row_keys(SEEDS[:2], 3, [2, 2])
    first = kept(keys)
    others = {
        "next row": first.roll(1, dims=0),
        "other client": first.roll(2, dims=0),
        "next step": kept(row_keys(SEEDS[:2], 4, [2, 2])),
        "other layer": kept(keys, layer=6),
        "next position": first.roll(1, dims=1),
        "next feature": first.roll(1, dims=2),
    }
    for what, other in others.items():
        assert float((first & other).float().mean()) == pytest.approx(0.49, abs=0.03), what


def test_a_row_s_mask_does_not_depend_on_its_padding() -> None:
    keys = row_keys(SEEDS, 1, [2] * 4)
    assert torch.equal(kept(keys, length=9), kept(keys, length=20)[:, :9])


def test_a_row_s_key_does_not_depend_on_the_clients_or_rows_beside_it() -> None:
    together = row_keys(SEEDS, 2, [5] * 4).view(4, 5)
    for client, seed in enumerate(SEEDS):
        assert torch.equal(row_keys([seed], 2, [3]), together[client, :3])
    assert torch.equal(kept(together[2]), kept(together.reshape(-1)).view(4, 5, 32, 64)[2])


def test_keys_differ_between_all_rows_clients_and_steps() -> None:
    keys = torch.cat([row_keys(SEEDS, step, [64] * 4) for step in range(64)])
    assert len(torch.unique(keys)) == len(SEEDS) * 64 * 64


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Bench]:
    """Without dropout, and with a half of LoRA's input dropped."""
    folder = tiny_bert(tmp_path_factory.mktemp("models") / "bert")
    return classifier(folder), classifier(folder, dropout=0.5)


def test_each_client_and_round_drops_its_own_elements(benches: tuple[Bench, Bench]) -> None:
    without, dropping = benches
    settings = LocalSettings(steps=1)
    work = [  # one row, so that the order of rows can make no difference
        Work(client, torch.tensor([9]), without.start(), 1) for client in ("ann", "bob")
    ]
    plain = [t.loss for round in (1, 2) for t in without.train(work, settings, round=round)]
    losses = [t.loss for round in (1, 2) for t in dropping.train(work, settings, round=round)]
    assert plain == pytest.approx([plain[0]] * 4, rel=1e-12)
    assert len({round(loss, 6) for loss in [*losses, plain[0]]}) == 5
    assert losses[:2] == [t.loss for t in dropping.train(work, settings, round=1)]


def test_dropout_is_inactive_in_evaluation(benches: tuple[Bench, Bench]) -> None:
    without, dropping = benches
    start = without.start()
    dropping.train(dropping.work(LocalSettings(steps=1)), LocalSettings(steps=1))
    batch = collate(without.examples, torch.arange(6), 0)
    with torch.no_grad(), without.base.holding(start), dropping.base.holding(start):
        assert torch.equal(
            dropping.base.model(**batch.inputs).logits, without.base.model(**batch.inputs).logits
        )
    assert evaluate(dropping.base, dropping.task, dropping.examples, start) == evaluate(
        without.base, without.task, without.examples, start
    )


def test_only_lora_s_input_is_dropped(benches: tuple[Bench, Bench]) -> None:
    without = benches[0]
    settings = LocalSettings(steps=2, batch_size=4)
    work = [
        type(w)(
            w.client, w.rows, w.start | {k: t * 0 for k, t in w.start.items() if "lora" in k}, 2
        )
        for w in without.work(settings)
    ]
    frozen = [bench.train(work, settings, lambda step: frozenset({"head"})) for bench in benches]
    for one, other in zip(*frozen, strict=True):
        assert same(one.adapter, other.adapter)
        assert relative(one.adapter, work[0].start) > 0
