"""Claims about the client bank: K clients at once are K clients one after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from states import relative, same
from tiny_clients import EVERYTHING, SHARDS, Bench, classifier, language_model
from torch.nn import functional

from rolora.algorithm.adapter import role_of
from rolora.data.examples import collate
from rolora.training.local import batches
from rolora.training.settings import LocalSettings

LANGUAGE = ("llama", "gpt2")
Make = Callable[..., Bench]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("bert", "llama", "roberta", "gpt2")
    place = tmp_path_factory.mktemp("models")
    return {name: getattr(tiny, f"tiny_{name}")(place / name) for name in names}


SETTINGS = {
    "epochs": LocalSettings(steps=None, epochs=2, batch_size=4),
    "steps": LocalSettings(steps=3, batch_size=4, weight_decay=0.1, max_grad_norm=0.5),
    "sgd": LocalSettings(steps=None, epochs=2, batch_size=4, optimizer="sgd", momentum=0.9),
}


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "make", "dtype"),
    [("bert", classifier, torch.float64), ("llama", language_model, torch.float32)],
)
def test_clients_in_one_bank_end_where_each_ends_alone(
    folders: dict[str, Path],
    name: str,
    make: Make,
    dtype: torch.dtype,
    dropout: float,
    how: str,
) -> None:
    bench, settings = make(folders[name], dtype, dropout=dropout), SETTINGS[how]
    work = bench.work(settings)
    together = bench.train(work, settings)
    alone = [bench.train([w], settings)[0] for w in work]
    for w, one, other in zip(work, together, alone, strict=True):
        assert relative(one.adapter, other.adapter) <= TOLERANCE[dtype]
        assert one.loss == pytest.approx(other.loss, rel=TOLERANCE[dtype])
        assert one.steps == other.steps == settings.num_steps(len(SHARDS[w.client]))
        assert relative(one.adapter, w.start) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "make"), [("bert", classifier), ("llama", language_model)])
def test_a_client_of_a_bank_trains_as_with_peft_and_torch(
    folders: dict[str, Path], name: str, make: Make, dtype: torch.dtype, optimizer: Any
) -> None:
    bench = make(folders[name], dtype)
    settings = LocalSettings(
        steps=4, batch_size=4, weight_decay=0.1, optimizer=optimizer, momentum=0.9
    )
    work = bench.work(settings)
    ours = bench.train(work, settings)[2].adapter

    config = copy.deepcopy(bench.base.peft_config)
    config.inference_mode = False
    auto = (
        transformers.AutoModelForSequenceClassification.from_pretrained(
            folders[name], num_labels=3, dtype=dtype
        )
        if make is classifier
        else transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype)
    )
    model = peft.get_peft_model(auto, config, autocast_adapter_dtype=False).eval()
    peft.set_peft_model_state_dict(model, dict(work[2].start))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learned) == len(ours)
    plain: torch.optim.Optimizer = torch.optim.AdamW(learned, lr=5e-3, weight_decay=0.1)
    if optimizer == "sgd":
        plain = torch.optim.SGD(learned, lr=5e-3, weight_decay=0.1, momentum=0.9)
    stream = batches(work[2], 4, seed=7, round=1)
    for _ in range(4):
        batch = collate(bench.examples, next(stream), bench.base.tokenizer.pad_token_id)
        logits, labels = model(**batch.inputs).logits, batch.targets
        if make is language_model:
            ids = batch.inputs["input_ids"]
            labels = torch.full((ids.numel(),), -100).index_copy(0, labels, ids.flatten()[labels])
            labels = labels.view(ids.shape)[:, 1:]
            logits = logits[:, :-1].mT
        plain.zero_grad()
        functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        plain.step()
    theirs = peft.get_peft_model_state_dict(model)
    assert relative(ours, theirs) <= {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]


HEADS = {
    "bert": ("classifier",),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "llama": ("score",),
    "gpt2": ("score",),
}


@pytest.mark.parametrize("name", HEADS)
def test_each_client_trains_a_head_of_its_own(folders: dict[str, Path], name: str) -> None:
    bench = classifier(folders[name])
    assert bench.base.head_layers == HEADS[name]
    settings = LocalSettings(steps=3, batch_size=4)
    work = bench.work(settings, same_start=True)
    together = [
        trained.adapter.only(frozenset({"head"})) for trained in bench.train(work, settings)
    ]
    for w, head in zip(work, together, strict=True):
        alone = bench.train([w], settings)[0].adapter.only(frozenset({"head"}))
        assert relative(head, alone) <= 1e-9
        assert all(not torch.equal(head[key], w.start[key]) for key in head)
    assert {key.rsplit(".", 1)[0] for key in together[0]} == {
        f"base_model.model.{layer}" for layer in HEADS[name]
    }
    assert relative(together[0], together[1]) > 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_not_trained_keeps_its_bits(folders: dict[str, Path], name: str) -> None:
    bench = classifier(folders[name])
    settings = LocalSettings(steps=2, batch_size=4, weight_decay=0.5)
    work = bench.work(settings)
    for w, trained in zip(
        work, bench.train(work, settings, lambda step: EVERYTHING - {"head"}), strict=True
    ):
        for key, tensor in trained.adapter.items():
            assert torch.equal(tensor, w.start[key]) == (role_of(key) == "head")


@pytest.mark.parametrize("targets", [("c_attn",), ("c_fc", "c_proj"), ("all-linear",)])
def test_gpt2_s_transposed_layers_are_adapted_as_by_peft(
    folders: dict[str, Path], targets: tuple[str, ...]
) -> None:
    bench = language_model(folders["gpt2"], target_modules=targets)
    start = bench.start()
    auto = transformers.AutoModelForCausalLM.from_pretrained(folders["gpt2"], dtype=torch.float64)
    model = peft.get_peft_model(auto, bench.base.peft_config, autocast_adapter_dtype=False).eval()
    peft.set_peft_model_state_dict(model, dict(start))
    batch = collate(bench.examples, torch.arange(5), bench.base.tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = model(**batch.inputs).logits
        with bench.base.holding(start):
            ours = bench.base.model(**batch.inputs).logits
        with model.disable_adapter():
            plain = model(**batch.inputs).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    assert not torch.allclose(ours, plain, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_an_empty_bank_leaves_the_base_model_bit_for_bit(
    folders: dict[str, Path], name: str
) -> None:
    bench = language_model(folders[name]) if name in LANGUAGE else classifier(folders[name])
    config, held = bench.base.model.config, bench.base.model.state_dict()
    plain = type(bench.base.model).from_pretrained(folders[name], config=config)  # type: ignore[attr-defined]
    head = {k.replace(".base.", "."): v for k, v in held.items() if k.startswith("classifier")}
    plain.load_state_dict(plain.state_dict() | head)  # the file lacks it
    plain.double().eval()
    batch = collate(bench.examples, torch.arange(5), bench.base.tokenizer.pad_token_id)
    with torch.no_grad():
        before = bench.base.model(**batch.inputs).logits
        with bench.base.holding(bench.start()):
            adapted = bench.base.model(**batch.inputs).logits
        after = bench.base.model(**batch.inputs).logits
        truth = plain(**batch.inputs).logits
    assert torch.equal(before, truth)
    assert torch.equal(after, truth)
    assert not torch.allclose(adapted, truth)


def test_a_bank_s_adapters_come_back_as_they_were_loaded(folders: dict[str, Path]) -> None:
    bench = classifier(folders["bert"])
    starts = [bench.start(seed) for seed in range(3)]
    bench.base.bank.load(starts)
    try:
        assert all(same(bench.base.bank.take(k), starts[k]) for k in range(3))
        bench.base.bank.keep(2)
        assert bench.base.bank.clients == 2
        assert same(bench.base.bank.take(1), starts[1])
    finally:
        bench.base.bank.unload()
