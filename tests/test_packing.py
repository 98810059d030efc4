"""Claims about packed batches: nothing is computed on padding, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from states import relative
from tiny_clients import Bench, classifier, language_model
from torch import Tensor

from rolora.data.examples import Batch
from rolora.model.base import Base
from rolora.model.packing import Packing, collect, pack, packed_attention, spread
from rolora.model.stack import take_over
from rolora.training.local import evaluate
from rolora.training.settings import LocalSettings

MODELS = ("bert", "roberta", "distilbert", "llama", "gpt2")
SETTINGS = LocalSettings(steps=None, epochs=2, batch_size=4)
Make = Callable[..., Bench]


def make(name: str, folder: Path, **lora: object) -> Bench:
    targets = {"distilbert": ("q_lin", "v_lin")}.get(name, ())
    maker: Make = language_model if name in ("llama", "gpt2") else classifier
    return maker(getattr(tiny, f"tiny_{name}")(folder), **{"target_modules": targets, **lora})


def padded(bench: Bench) -> Bench:
    return dataclasses.replace(bench, base=dataclasses.replace(bench.base, stack=None))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_packed_clients_train_and_score_as_padded_ones(
    name: str, dropout: float, tmp_path: Path
) -> None:
    bench = make(name, tmp_path / "model", dropout=dropout)
    assert bench.base.stack is not None
    work = bench.work(SETTINGS)
    packed, plain = bench.train(work, SETTINGS), padded(bench).train(work, SETTINGS)
    for one, other in zip(packed, plain, strict=True):
        assert relative(one.adapter, other.adapter) <= 1e-9
        assert one.loss == pytest.approx(other.loss, rel=1e-10)
    adapter = packed[0].adapter
    scores = evaluate(bench.base, bench.task, bench.examples, adapter)
    expected = evaluate(padded(bench).base, bench.task, bench.examples, adapter)
    assert scores == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama"])
def test_layers_see_each_real_token_once_and_the_last_only_those_that_the_head_reads(
    name: str, tmp_path: Path
) -> None:
    bench = make(name, tmp_path / "model")
    seen: list[tuple[int, ...]] = []
    for path, module in bench.base.model.named_modules():
        if path.endswith(("intermediate.dense", "mlp.up_proj", "ffn.lin1")):
            module.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    settings = LocalSettings(steps=1, batch_size=64)
    work = bench.work(settings)[:2]
    bench.train(work, settings)
    tokens = sum(int(bench.examples.lengths[w.rows].sum()) for w in work)
    rows = sum(len(w.rows) for w in work)
    # DistilBERT adds what entered a layer to what attention gave in the layer itself
    last = rows if name in ("bert", "roberta") else tokens
    assert seen == [(1, tokens)] * (len(seen) - 1) + [(1, last)]


def test_whatever_reads_tokens_that_were_not_computed_gets_nan(tmp_path: Path) -> None:
    base = make("bert", tmp_path / "model").base
    lengths = torch.tensor([4, 2])
    batch = Batch({"input_ids": torch.full((2, 4), 9)}, lengths, torch.tensor([0, 0]))
    with torch.no_grad(), base.running(batch) as given:
        hidden = base.model.base_model(**given.inputs).last_hidden_state  # type: ignore[operator]
    assert hidden[:, 0].isfinite().all()
    assert hidden[:, 1:].isnan().all()


def test_a_head_that_reads_more_than_first_tokens_gets_them_even_if_it_is_zero(
    tmp_path: Path,
) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny.tiny_bert(tmp_path / "model")
    ).eval()
    model.classifier.weight.data.zero_()

    class Mean(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(dim=1)

    stack = take_over(model, lambda path: True)
    assert stack is not None
    assert stack.first
    model.bert.pooler = Mean()
    stack = take_over(model, lambda path: True)
    assert stack is not None
    assert not stack.first


def test_rows_longer_than_an_attention_window_run_padded(tmp_path: Path) -> None:
    bench = make("bert", tmp_path / "model")
    stack = bench.base.stack
    assert stack is not None
    stack.window = 4
    batch = Batch({"attention_mask": torch.ones(1, 5)}, torch.tensor([5]), torch.tensor([0]))
    with bench.base.running(batch) as given:
        assert "attention_mask" in given.inputs
    with bench.base.running(dataclasses.replace(batch, lengths=torch.tensor([4]))) as given:
        assert "attention_mask" not in given.inputs


def test_a_model_with_position_biases_keeps_its_padding_and_its_numbers(tmp_path: Path) -> None:
    config = transformers.MPNetConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    model = transformers.MPNetForSequenceClassification(config).eval()
    ids = torch.arange(10, 20).view(2, 5)
    before = model(input_ids=ids).logits
    assert take_over(model, lambda path: True) is None
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_model_that_is_not_packed_still_trains(tmp_path: Path) -> None:
    base: Base = make("bert", tmp_path / "model").base
    assert base.stack is not None
    base.stack.window = 1
    bench = make("bert", tmp_path / "other")
    assert bench.train(bench.work(SETTINGS)[:1], SETTINGS)[0].loss > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 5, 5], [40, 2, 17, 1]])
def test_attention_in_bfloat16_has_the_values_and_gradients_of_float32_rounded(
    lengths: list[int] | None, causal: bool
) -> None:
    module = torch.nn.Identity()
    module.is_causal = causal  # type: ignore[assignment]
    packing = None if lengths is None else pack(torch.tensor(lengths))
    rng = torch.Generator().manual_seed(0)
    shape = (3, 1, 4, sum(lengths or [9]), 8)
    parts, upstream = torch.randn(shape, generator=rng), torch.randn(shape[1:], generator=rng)

    def run(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.bfloat16().to(dtype).requires_grad_() for x in parts)
        out, _ = packed_attention(module, q, k, v, None, packing)
        out.backward(upstream.transpose(1, 2).bfloat16().to(dtype))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            alone, _ = packed_attention(module, q, k, v, None, packing)
        return [out, alone, *(x.grad for x in (q, k, v) if x.grad is not None)]

    (out, alone, *gradients), exact = run(torch.bfloat16), run(torch.float32)
    assert all(x.dtype == torch.bfloat16 for x in (out, alone, *gradients))
    for found, expected in zip((out, *gradients), (exact[0], *exact[2:]), strict=True):
        assert torch.equal(found, expected.bfloat16())
    assert torch.allclose(alone.float(), exact[1], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [40, 2, 17, 33, 1]])
def test_attention_of_first_tokens_has_their_values_and_gradients(lengths: list[int]) -> None:
    module = torch.nn.Identity()
    module.is_causal = False  # type: ignore[assignment]
    packing = pack(torch.tensor(lengths))
    rng = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 1, 4, sum(lengths), 8, generator=rng, dtype=torch.float64)

    def run(packing: Packing) -> list[Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in parts)
        out, _ = packed_attention(module, q, k, v, None, packing)
        firsts = out[:, packing.firsts]
        firsts.sin().sum().backward()  # type: ignore[no-untyped-call]
        return [firsts, *(x.grad for x in (q, k, v) if x.grad is not None)]

    found = run(dataclasses.replace(packing, first=True))
    for one, other in zip(found, run(packing), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[3, 1, 4], [40, 2, 17, 33, 1], [5, 5, 5], [1]])
def test_spreading_and_collecting_are_each_other_s_inverse_and_gradient(lengths: list[int]) -> None:
    packing = pack(torch.tensor(lengths))
    x = torch.randn(sum(lengths), 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        # what padding holds must not matter, so it is made different
        changed = spread(x, packing).sin().index_fill(0, packing.padding, 7.0)
        return collect(changed, packing)

    assert torch.equal(there_and_back(x), x.sin())
    assert torch.autograd.gradcheck(there_and_back, (x,))
    assert sum(g.rows for g in packing.groups) == len(lengths)
    real = torch.cat([g.real.flatten() for g in packing.groups])
    assert torch.equal((~real).nonzero().squeeze(1), packing.padding)
    for group in packing.groups:
        assert group.width < 2 * max(16, int(group.real.sum(dim=-1).min()))
