"""Claims about adapters on disk: PEFT reads ours, we read PEFT's, nothing is lost on the way."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from states import same
from tiny_clients import LABELS, Bench, classifier, language_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rolora.algorithm.adapter import AdapterState
from rolora.data.examples import collate
from rolora.errors import ConfigError
from rolora.model.peft import read_adapter, save_adapter


def make(kind: str, folder: Path, **lora: Any) -> Bench:
    name, _, task = kind.partition(" ")
    place = folder / name
    if not place.exists():
        getattr(tiny, f"tiny_{name}")(place)
    build = language_model if task == "lm" else classifier
    return build(place, torch.float32, **lora)


def save(bench: Bench, adapter: AdapterState, folder: Path) -> Path:
    base = bench.base
    save_adapter(
        folder, adapter, base.peft_config, base.model.config, base.tokenizer, {"task": "any"}, ""
    )
    return folder


def fresh(kind: str, model: Path, config: Any = None) -> Any:
    """The base model as a stranger loads it, without this library."""
    if kind.endswith("lm"):
        return transformers.AutoModelForCausalLM.from_pretrained(model)
    more = {"num_labels": len(LABELS)} if config is None else {"config": config}
    return transformers.AutoModelForSequenceClassification.from_pretrained(model, **more)


def logits(model: Any, bench: Bench) -> torch.Tensor:
    batch = collate(bench.examples, torch.arange(6), bench.base.tokenizer.pad_token_id)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**batch.inputs).logits
    return found


ROUND_TRIPS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("bert", {"rslora": True, "rank": 3, "alpha": 5}),
    ("bert", {"target_modules": ("dense",)}),
    ("bert", {"target_modules": ("all-linear",), "layers": "top:1"}),
    ("roberta", {}),
    ("roberta", {"target_modules": ("dense",), "layers": "top:1"}),  # the head has a dense too
    ("llama lm", {}),
    ("llama lm", {"layers": "top:1", "rslora": True}),
    ("llama lm", {"target_modules": ("all-linear",)}),
    ("llama", {"layers": (0,)}),
    ("gpt2 lm", {"target_modules": ("all-linear",), "dropout": 0.1}),
    ("gpt2", {}),
    ("distilbert", {"target_modules": ("q_lin", "lin2")}),
]


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize(("kind", "lora"), ROUND_TRIPS, ids=lambda value: str(value))
def test_peft_loads_what_we_write_and_computes_the_same_logits(
    tmp_path: Path, kind: str, lora: dict[str, Any]
) -> None:
    bench = make(kind, tmp_path, **lora)
    adapter = bench.start()
    folder = save(bench, adapter, tmp_path / "adapter")
    model = tmp_path / kind.partition(" ")[0]
    configs = [None, transformers.AutoConfig.from_pretrained(folder / "model_config.json")]
    for config in configs[kind == "gpt2" :]:  # GPT-2's own names no padding token
        theirs = peft.PeftModel.from_pretrained(fresh(kind, model, config), folder)
        with bench.base.holding(adapter):
            ours = logits(bench.base.model, bench)
        assert torch.allclose(ours, logits(theirs, bench), rtol=0, atol=1e-5)
    assert not torch.allclose(ours, logits(bench.base.model, bench), rtol=0, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "gpt2 lm", "llama lm"]
)
def test_peft_autopeft_and_pipelines_load_what_we_write_from_any_folder(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, task = kind.partition(" ")
    (tmp_path / "far").mkdir()
    getattr(tiny, f"tiny_{name}")(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    bench = make(kind, Path(), target_modules=("all-linear",))  # a relative path of the base
    adapter = bench.start()
    save(bench, adapter, tmp_path / "adapter")
    with bench.base.holding(adapter):
        ours = logits(bench.base.model, bench)

    monkeypatch.chdir(tmp_path / "far")
    folder = "../adapter"
    config = transformers.AutoConfig.from_pretrained(f"{folder}/model_config.json")
    lm = task == "lm"
    auto = transformers.AutoModelForCausalLM if lm else AutoModelForSequenceClassification
    autopeft = peft.AutoPeftModelForCausalLM if lm else peft.AutoPeftModelForSequenceClassification
    more: dict[str, Any] = {} if lm else {"id2label": config.id2label}
    if name in ("gpt2", "llama"):
        more["pad_token_id"] = config.pad_token_id
    what = "text-generation" if lm else "text-classification"
    pipeline = transformers.pipeline(what, folder, model_kwargs=more)
    place = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    loaded = [
        peft.PeftModel.from_pretrained(auto.from_pretrained(place, config=config), folder),
        autopeft.from_pretrained(folder, **more),
        auto.from_pretrained(folder, config=config),
        pipeline.model,
    ]
    for model in loaded:
        assert torch.allclose(ours, logits(model, bench), rtol=0, atol=1e-5)
    text = tiny.SENTENCES[0]
    assert pipeline.tokenizer(text)["input_ids"] == bench.base.tokenizer(text)["input_ids"]
    if not lm:
        assert pipeline(text)[0]["label"] in LABELS


@pytest.mark.parametrize(("kind", "lora"), ROUND_TRIPS[:7], ids=lambda value: str(value))
def test_what_is_read_is_what_was_written_bit_for_bit(
    tmp_path: Path, kind: str, lora: dict[str, Any]
) -> None:
    bench = make(kind, tmp_path, **lora)
    adapter = bench.start()
    back = read_adapter(save(bench, adapter, tmp_path / "adapter"), bench.base.specs)
    assert same(back, adapter)
    assert back.scaling == adapter.scaling


def test_the_folder_says_which_base_labels_and_task_it_belongs_to(tmp_path: Path) -> None:
    bench = make("bert", tmp_path)
    folder = save(bench, bench.start(), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "bert")
    assert config["modules_to_save"] == ["classifier"]
    assert json.loads((folder / "model_config.json").read_text())["id2label"] == {
        str(index): label for index, label in enumerate(LABELS)
    }
    assert json.loads((folder / "rolora.json").read_text()) == {"task": "any"}


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama lm", "llama"])
def test_an_adapter_made_by_plain_peft_is_a_start(tmp_path: Path, kind: str) -> None:
    bench = make(kind, tmp_path)
    config = copy.deepcopy(bench.base.peft_config)
    config.inference_mode = False
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = peft.get_peft_model(fresh(kind, tmp_path / kind.partition(" ")[0]), config)
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", bench.base.specs)
    assert adapter.keys() == {spec.name for spec in bench.base.specs.tensors}
    with bench.base.holding(adapter):
        ours = logits(bench.base.model, bench)
    assert torch.allclose(ours, logits(theirs, bench), rtol=0, atol=1e-5)


def strong(model: Any, seed: int = 3) -> Any:
    """A PEFT model whose lora_B is not 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


QUERY = "layer.1.attention.self.query"


@pytest.mark.parametrize(
    "theirs",
    [
        {"lora_alpha": 32},
        {"use_rslora": True},
        {"lora_alpha": 3, "use_rslora": True},
        {"alpha_pattern": {QUERY: 64, "value": 1}},
        {"r": 4, "rank_pattern": {"query": 2, "value": 2}, "alpha_pattern": {"value": 5}},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.5, "layers_pattern": "layer", "layers_to_transform": [0, 1]},
        {"exclude_modules": ["key"], "target_modules": r".*self\.(query|key|value)"},
    ],
    ids=str,
)
def test_the_strength_of_an_adapter_is_that_of_its_own_configuration(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    bench = make("bert", tmp_path, rank=2, alpha=8)
    config = peft.LoraConfig(
        **{
            "r": 2,
            "lora_alpha": 8,
            "target_modules": ["query", "value"],
            "modules_to_save": ["classifier"],
            "task_type": "SEQ_CLS",
            **theirs,
        }
    )
    model = strong(peft.get_peft_model(fresh("bert", tmp_path / "bert"), config))
    model.save_pretrained(tmp_path / "theirs")
    for any_rank in (False, True):
        adapter = read_adapter(tmp_path / "theirs", bench.base.specs, any_rank=any_rank)
        assert adapter.scaling == bench.base.specs.scaling
        with bench.base.holding(adapter):
            ours = logits(bench.base.model, bench)
        assert torch.allclose(ours, logits(model, bench), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("use_qalora", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [3]),
        ("alora_invocation_tokens", [1]),
        ("peft_type", "IA3"),
        ("a_key_of_next_year", {"on": 1}),
    ],
)
def test_an_adapter_that_computes_more_than_its_factors_is_refused_by_the_key_s_name(
    tmp_path: Path, key: str, value: Any
) -> None:
    bench = make("bert", tmp_path)
    folder = save(bench, bench.start(), tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ConfigError, match=key) as caught:
        read_adapter(folder, bench.base.specs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_alpha": "8"},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": 10**400},
        {"lora_alpha": True},
        {"lora_alpha": None},
        {"r": "2"},
        {"r": [2]},
        {"rank_pattern": [2]},
        {"rank_pattern": "query"},
        {"rank_pattern": {"query": "2"}},
        {"alpha_pattern": {"query": math.nan}},
        {"alpha_pattern": {"(": 8}},
        {"alpha_pattern": {"(" * 5000: 8}},
        {"alpha_pattern": {"a{99999999999999}": 8}},
        {"alpha_pattern": {"(a+)+b": 8}},
        {"alpha_pattern": {".*.*.*.*.*b": 8}},
    ],
    ids=lambda changed: str(changed)[:40],
)
def test_a_strength_that_is_no_number_or_takes_for_ever_to_find_is_refused_by_its_key(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    bench = make("bert", tmp_path)
    folder = save(bench, bench.start(), tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ConfigError, match=next(iter(changed))) as caught:
        read_adapter(folder, bench.base.specs)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def spoiled(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: change(v) if k.endswith(name) else v for k, v in tensors.items()}, weights)
    return folder


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("layer.0.attention.self.query.lora_B.weight", lambda t: t / 0, "that are not finite"),
        ("query.lora_A.weight", lambda t: t.double() + 1e300, "that are not finite"),
        ("classifier.bias", lambda t: t * math.nan, "classifier.bias that are not finite"),
        ("query.lora_A.weight", lambda t: t.int(), "has dtype torch.int32"),
    ],
)
def test_an_adapter_with_values_that_are_no_finite_numbers_is_refused_by_the_tensor_s_name(
    tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], said: str
) -> None:
    bench = make("bert", tmp_path)
    folder = spoiled(save(bench, bench.start(), tmp_path / "adapter"), name, change)
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_adapter(folder, bench.base.specs)


@pytest.mark.parametrize(
    ("name", "rank", "change"),
    [
        ("query.lora_B.weight", 2, lambda t: t.repeat(1, 2)),
        ("query.lora_B.weight", 2, lambda t: t[:, :, None].contiguous()),
        ("query.lora_B.weight", 2, lambda t: t[:, 0].contiguous()),
        ("query.lora_A.weight", 0, lambda t: t[:0]),
    ],
)
def test_where_layers_may_differ_in_rank_both_factors_of_a_layer_still_have_the_same(
    tmp_path: Path, name: str, rank: int, change: Callable[[Tensor], Tensor]
) -> None:
    bench = make("bert", tmp_path)
    folder = spoiled(save(bench, bench.start(), tmp_path / "adapter"), name, change)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": rank}))
    with pytest.raises(ConfigError, match="does not fit"):
        read_adapter(folder, bench.base.specs, any_rank=True)


def test_an_adapter_without_its_configuration_is_refused(tmp_path: Path) -> None:
    bench = make("bert", tmp_path)
    folder = save(bench, bench.start(), tmp_path / "adapter")
    for text in ("{", "[]", '"a"', "{}", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"adapter_config\.json"):
            read_adapter(folder, bench.base.specs)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter_config.json is missing"):
        read_adapter(folder, bench.base.specs)


def test_an_adapter_without_a_head_is_read_without_one(tmp_path: Path) -> None:
    bench = make("bert", tmp_path)
    adapter = bench.start()
    folder = save(bench, adapter, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "lora" in k}, weights)
    back = read_adapter(folder, bench.base.specs)
    assert same(back, adapter.only(frozenset({"A", "B"})))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 3}, r"lora_A.weight is \(3, 32\), expected \(2, 32\) \(rank, target_modules"),
        ({"layers": "top:1"}, r"layer.0.attention.self.query.lora_A.weight is missing, expected"),
        ({"target_modules": ("query",)}, r"value.lora_A.weight is missing, expected \(2, 32\)"),
        ({"target_modules": ("query", "value", "key")}, r"it also holds .*key.lora_A.weight"),
    ],
)
def test_an_adapter_of_another_shape_is_refused_with_its_first_misfit(
    tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    other = make("bert", tmp_path, **lora)
    folder = save(other, other.start(), tmp_path / "adapter")
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder, make("bert", tmp_path).base.specs)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert re.search(message, str(caught.value))


def test_a_folder_that_is_no_adapter_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    bench = make("bert", tmp_path)
    with pytest.raises(ConfigError, match="is not a PEFT adapter with safetensors weights"):
        read_adapter(tmp_path / "bert", bench.base.specs)
    folder = save(bench, bench.start(), tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is damaged"):
        read_adapter(folder, bench.base.specs)
