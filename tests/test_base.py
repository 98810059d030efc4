"""Claims about loading a base model: what can carry clients' adapters, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertForSequenceClassification

from rolora.errors import ConfigError
from rolora.model import checkpoint
from rolora.model.base import Base, load_base
from rolora.model.peft import LoraSettings


def config_of(base: Base) -> Any:
    return base.model.config


def refusal(folder: Path, **lora: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_base(str(folder), "classification", LoraSettings(**lora), labels=("no", "yes"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        ("deberta", {}, "layer 'deberta.encoder.layer.0.attention.self.query_proj' is not called"),
        ("albert", {"target_modules": ("query",)}, "attention.query' is not called once with one"),
        ("albert", {}, "no default target_modules for 'albert': set lora.target_modules to some"),
        ("distilbert", {}, "set lora.target_modules to some of k_lin, lin1, lin2, out_lin, q_lin"),
        ("bart", {}, "is an encoder-decoder"),
        ("bert", {"target_modules": ("quary",)}, "no layer is named quary"),
        ("bert", {"target_modules": ("classifier",)}, "no layer is named classifier"),
        ("bert", {"layers": "top:3"}, "use 'all', 'top:1'..'top:2', or a list"),
        ("bert", {"layers": (0, 2)}, "the model's layers are 0..1"),
        ("bert", {"rank": 33}, "it has 32 inputs and 32 outputs, so no change of it has a rank"),
    ],
)
def test_a_model_that_cannot_carry_the_adapters_is_refused_in_one_line(
    tmp_path: Path, name: str, lora: dict[str, Any], message: str
) -> None:
    folder = getattr(tiny, f"tiny_{name}")(tmp_path / "model")
    assert re.search(re.escape(message), str(refusal(folder, **lora)))


def test_a_folder_without_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny.tiny_bert(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert str(refusal(folder)).startswith(f"cannot load model '{folder}'")
    assert "does not exist" in str(refusal(tmp_path / "nowhere"))


def test_a_model_that_no_hub_can_be_asked_for_is_refused_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "is_reachable", lambda _: False)
    message = str(refusal(Path("nobody/nothing")))
    assert message.startswith("model 'nobody/nothing' is not on this machine, and the hub does not")
    assert "run hf download nobody/nothing" in message


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny.tiny_bert(tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    assert "it has no tokenizer" in str(refusal(folder))


def test_a_configuration_that_is_no_object_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny.tiny_bert(tmp_path / "model")
    (folder / "config.json").write_text("[]")
    assert str(refusal(folder)).startswith(f"cannot load model '{folder}'")


def test_a_base_is_told_by_its_weights_and_not_by_a_head_that_is_drawn(tmp_path: Path) -> None:
    def digest(labels: int = 2) -> str:
        names = [str(label) for label in range(labels)]
        return load_base(
            str(tmp_path / "model"), "classification", LoraSettings(), labels=names
        ).digest

    tiny.tiny_bert(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = {k: v for k, v in load_file(weights).items() if not k.startswith("classifier")}
    save_file(tensors, weights, {"format": "pt"})
    before = digest()
    assert digest() == before == digest(labels=3)
    tensors["bert.embeddings.word_embeddings.weight"][0, 0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    assert digest() != before


def test_a_head_model_cannot_stand_in_for_a_language_model(tmp_path: Path) -> None:
    folder = tiny.tiny_llama(tmp_path / "model")
    assert not AutoConfig.from_pretrained(folder).tie_word_embeddings
    weights = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(weights).items() if not k.startswith("lm_head")}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks lm_head.weight: it is not a causal"):
        load_base(str(folder), "causal_lm", LoraSettings())


@pytest.mark.parametrize(
    ("targets", "layers", "count"),
    [
        (("query", "value"), "all", 4),
        (("query",), "top:1", 1),
        (("query",), (0,), 1),
        (("dense",), "all", 7),  # three in each layer, and the pooler, which sees no positions
        (("all-linear",), "all", 13),
        (("all-linear",), "top:1", 6),
    ],
)
def test_target_modules_and_layers_choose_what_is_adapted(
    tmp_path: Path, targets: tuple[str, ...], layers: str | tuple[int, ...], count: int
) -> None:
    folder = tiny.tiny_bert(tmp_path / "model")
    settings = LoraSettings(target_modules=targets, layers=layers)
    base = load_base(str(folder), "classification", settings, labels=("no", "yes"))
    assert len(base.specs.scaling) == count
    if layers == (0,):
        assert all(".layer.0." in layer for layer in base.specs.scaling)
    if layers == "top:1":
        assert all(".layer.1." in layer for layer in base.specs.scaling)


def test_a_padding_token_is_given_only_to_a_model_that_has_none(tmp_path: Path) -> None:
    # RoBERTa counts positions from its padding token, so changing it would change the model
    roberta = tiny.tiny_roberta(tmp_path / "roberta")
    config = AutoConfig.from_pretrained(roberta)
    config.pad_token_id = 1
    config.save_pretrained(roberta)
    base = load_base(str(roberta), "classification", LoraSettings(), labels=("no", "yes"))
    assert config_of(base).pad_token_id == 1
    gpt2 = load_base(str(tiny.tiny_gpt2(tmp_path / "gpt2")), "causal_lm", LoraSettings())
    assert config_of(gpt2).pad_token_id == gpt2.tokenizer.pad_token_id is not None


def test_the_base_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    base = load_base(str(tiny.tiny_llama(tmp_path / "model")), "causal_lm", LoraSettings())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert base.device == torch.device("cpu")


def test_a_head_in_the_checkpoint_is_kept_and_a_missing_one_is_left_to_the_seed(
    tmp_path: Path,
) -> None:
    folder = tiny.tiny_bert(tmp_path / "model")

    def load(labels: str) -> Base:
        return load_base(str(folder), "classification", LoraSettings(), labels=labels)

    assert not load("012").specs.head
    with torch.random.fork_rng():
        torch.manual_seed(5)
        whole = BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    whole.save_pretrained(folder)
    found = load("012").specs.head
    assert found.keys() == {f"base_model.model.classifier.{key}" for key in ("weight", "bias")}
    assert torch.equal(found["base_model.model.classifier.weight"], whole.classifier.weight)
    assert not load("01").specs.head  # a head of three labels is no head of two
    assert not load("abc").specs.head  # nobody knows which of its outputs is "a"
