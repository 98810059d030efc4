"""Claims about loading a base model: what can carry clients' adapters, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import architectures
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from states import relative
from tiny_clients import classifier, language_model
from transformers import AutoConfig, AutoModelForCausalLM, BertForSequenceClassification

from rolora.errors import ConfigError
from rolora.model import checkpoint
from rolora.model.base import Base, load_base
from rolora.model.peft import LoraSettings
from rolora.model.stack import device_map, layers_of
from rolora.training.settings import LocalSettings


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
        ("deberta-v2", {}, "self.query_proj' is also called with vectors that belong to no row"),
        ("deberta-v2", {}, "set lora.target_modules to some of dense, value_proj"),
        ("xlnet", {}, "no layer of 'xlnet' can carry per-client adapters: use another model"),
        ("xlnet", {"target_modules": "all-linear"}, "does not see its rows one after another, so"),
        ("albert", {}, "has no default target_modules for 'albert': set lora.target_modules, for"),
        (
            "distilbert",
            {},
            'for example to ["q_lin", "v_lin"], or to "all-linear" (k_lin, lin1, lin',
        ),
        ("bart", {}, "is an encoder-decoder, which is not supported: set model.path to an encoder"),
        ("bert", {"target_modules": ("quary",)}, "no layer is named 'quary'; this model has dense"),
        ("bert", {"target_modules": ("query", "quary")}, "no layer is named 'quary'"),
        ("bert", {"target_modules": r".*\.quary"}, "no layer's whole path matches '.*"),
        (
            "bert",
            {"target_modules": "query"},
            "matches 'query'; for names write a list",
        ),
        (
            "bert",
            {"target_modules": "("},
            "lora.target_modules = '(' cannot be used as a regular exp",
        ),
        ("bert", {"target_modules": "(" * 5000}, "cannot be used as a regular expression: "),
        ("bert", {"target_modules": r"(\w+)+\d"}, "it repeats a group, or more than 4 parts"),
        ("bert", {"target_modules": ".*" * 30 + "x"}, "it repeats a group, or more than 4 parts"),
        (
            "bert",
            {"target_modules": r".*\.attention.*"},
            "layer.0.attention, a BertAttention",
        ),
        (
            "bert",
            {"target_modules": r".*query", "layers": "top:1"},
            "remove it, and let",
        ),
        (
            "bert",
            {"target_modules": ("query", "pooler.dense"), "layers": "top:1"},
            "in the layers of",
        ),
        (
            "bert",
            {"target_modules": ("query", "classifier")},
            "'classifier' is part of the task",
        ),
        ("bert", {"target_modules": ("word_embeddings",)}, "word_embeddings, a Embedding, which"),
        ("bert", {"target_modules": ("query", "embeddings")}, "bert.embeddings, a BertEmbeddings"),
        ("bert", {"layers": "top:3"}, "use 'all', 'top:1'..'top:2', or a list"),
        ("bert", {"layers": (0, 2)}, "the model's layers are 0..1"),
        ("bert", {"rank": 33}, "it has 32 inputs and 32 outputs, so no change of it has a rank"),
    ],
)
def test_a_model_that_cannot_carry_the_adapters_is_refused_in_one_line(
    tmp_path: Path, name: str, lora: dict[str, Any], message: str
) -> None:
    if name in ("bert", "distilbert"):
        folder = getattr(tiny, f"tiny_{name}")(tmp_path / "model")
    else:
        folder = architectures.save(name, "classification", tmp_path / "model")
    assert re.search(re.escape(message), str(refusal(folder, **lora)))


def test_a_language_model_s_output_embedding_carries_no_adapter_and_is_never_claimed_to(
    tmp_path: Path,
) -> None:
    folder = str(tiny.tiny_llama(tmp_path / "model"))
    for name, why in (
        ("lm_head", "lm_head, the output embedding, which stays as it is: use down_proj"),
        ("embed_tokens", "model.embed_tokens, a Embedding, which cannot carry LoRA here: use"),
    ):
        with pytest.raises(ConfigError, match=f"lora.target_modules: '{name}' selects {why}"):
            load_base(folder, "causal_lm", LoraSettings(target_modules=("q_proj", name)))


def test_a_layer_that_is_called_several_times_or_on_flat_rows_serves_each_client_alone(
    tmp_path: Path,
) -> None:
    for name, task, make in (
        ("albert", "classification", classifier),
        ("opt", "causal_lm", language_model),
    ):
        folder = architectures.save(name, task, tmp_path / name)
        bench = make(folder, torch.float64, target_modules="all-linear", dropout=0.2)
        settings = LocalSettings(steps=3, batch_size=4)
        work = bench.work(settings)
        together = bench.train(work, settings)
        for w, one in zip(work, together, strict=True):
            (alone,) = bench.train([w], settings)
            assert relative(one.adapter, alone.adapter) <= 1e-9


def test_a_layer_that_a_model_never_calls_is_not_among_all_linear_ones(tmp_path: Path) -> None:
    folder = tiny.tiny_esm(tmp_path / "model")
    labels = ("no", "yes")
    base = load_base(
        str(folder), "classification", LoraSettings(target_modules="all-linear"), labels=labels
    )
    assert not [layer for layer in base.specs.scaling if "contact_head" in layer]
    assert "regression" in str(refusal(folder, rank=1, target_modules=("regression",)))
    assert "is never called" in str(refusal(folder, rank=1, target_modules=("regression",)))


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


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"layer_norm_eps": 1e-3}, True),
        ({"hidden_act": "relu"}, True),
        ({"num_attention_heads": 1}, True),
        ({"layer_norm_eps": 1e-12}, False),  # as it was
        ({"_name_or_path": "elsewhere", "transformers_version": "4.0.0"}, False),
        ({"dtype": "bfloat16", "architectures": ["BertModel"]}, False),
        ({"id2label": {"0": "x", "1": "y"}, "problem_type": "regression"}, False),
        ({"attn_implementation": "eager", "use_cache": False}, False),
    ],
    ids=str,
)
def test_a_base_is_told_by_how_it_computes_with_its_weights_and_not_by_names(
    changes: dict[str, object], other: bool, tmp_path: Path
) -> None:
    tiny.tiny_bert(tmp_path / "model")
    file = tmp_path / "model" / "config.json"

    def digest() -> str:
        folder, labels = str(tmp_path / "model"), ("good", "bad")
        return load_base(folder, "classification", LoraSettings(), labels=labels).digest

    before = digest()
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert (digest() != before) == other


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
        ("all-linear", "all", 13),
        ("all-linear", (0,), 6),
        (r".*\.layer\.1\..*(query|value)", "all", 2),
        (("layer.1.attention.self.query", "value"), "all", 3),
        (("pooler.dense",), "all", 1),
    ],
)
def test_target_modules_and_layers_choose_what_is_adapted(
    tmp_path: Path, targets: str | tuple[str, ...], layers: str | tuple[int, ...], count: int
) -> None:
    folder = tiny.tiny_bert(tmp_path / "model")
    settings = LoraSettings(target_modules=targets, layers=layers)
    base = load_base(str(folder), "classification", settings, labels=("no", "yes"))
    assert len(base.specs.scaling) == count
    fresh = BertForSequenceClassification.from_pretrained(folder)
    theirs = peft.get_peft_model(fresh, base.peft_config)  # the saved configuration says the same
    chosen = {name.rpartition(".lora_A")[0] for name in theirs.state_dict() if "lora_A" in name}
    assert chosen == base.specs.scaling.keys()
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


CPUS = (torch.device("cpu"),) * 2


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_base_whose_layers_are_loaded_device_by_device_is_the_same(
    name: str, tmp_path: Path
) -> None:
    folder = getattr(tiny, f"tiny_{name}")(tmp_path / "model")
    make = classifier if name == "bert" else language_model
    one, several = make(folder), make(folder, devices=CPUS)
    assert several.base.digest == one.base.digest
    settings = LocalSettings(steps=2, batch_size=4)
    ended = (bench.train(one.work(settings), settings) for bench in (one, several))
    assert all(relative(a.adapter, b.adapter) == 0 for a, b in zip(*ended, strict=True))


@pytest.mark.parametrize("name", ["albert", "mpnet"])
def test_a_base_whose_layers_cannot_be_on_several_devices_is_refused(
    name: str, tmp_path: Path
) -> None:
    folder = architectures.save(name, "classification", tmp_path / "model")
    lora = LoraSettings(target_modules="all-linear")
    with pytest.raises(ConfigError, match=r"cannot be spread over GPUs: remove model\.device_map"):
        load_base(str(folder), "classification", lora, labels=("no", "yes"), devices=CPUS)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_device_has_its_share_of_the_weights_and_the_layers_in_their_order(
    name: str, share: float, count: int
) -> None:
    sizes = {**architectures.SIZES, "num_hidden_layers": 12, "vocab_size": 200}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    where = device_map(model, range(count), share)
    found = layers_of(model)
    assert where is not None
    assert found is not None
    left, held = dict(model.named_parameters()), [0.0] * count
    for path, device in where.items():
        part = {n: left.pop(n) for n in [*left] if n == path or n.startswith(f"{path}.")}
        width = share if path.startswith(f"{found[0]}.") else 1.0
        held[device] += width * sum(p.numel() for p in part.values())
    assert not left
    order = [where[f"{found[0]}.{index}"] for index in range(12)]
    assert order[0] == 0
    assert order == sorted(order)
    layer = share * sum(p.numel() for p in found[1][0].parameters())
    outside = sum(held) - 12 * layer
    assert max(held) <= max(sum(held) / count, outside + layer) + layer
