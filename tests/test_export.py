"""Claims about adapters in other forms: merged into their base, and as GGUF for llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import peft
import pytest
import torch
import transformers
from test_cli import rolora
from tiny import tiny_bert, tiny_gpt2, tiny_llama
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from rolora.config.load import make_config
from rolora.errors import ConfigError
from rolora.model.export import interleaved, write_merged_gguf
from rolora.run import runs
from rolora.run.evaluation import load_trained
from rolora.run.export import export

pytestmark = pytest.mark.usefixtures("quick")
TEXTS = [f"{word} {'and ' * (row % 4)}dog" for row, word in enumerate(["cat", "bird", "fish"] * 8)]


def trained(
    place: Path,
    kind: str,
    method: str = "rolora",
    base: str = "model",
    maker: Callable[[Path], Path] | None = None,
    **lora: Any,
) -> Path:
    """The folder of a finished run of a tiny model."""
    rows = [{"text": text, "label": text[0], "answer": text[::-1]} for text in TEXTS]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (maker or (tiny_llama if kind == "causal_lm" else tiny_bert))(place / "model")
    columns = (
        {"text": "text"} if kind != "causal_lm" else {"prompt": "text", "completion": "answer"}
    )
    values = {
        "model": {"path": base, "task": kind, "dtype": "fp32"},
        "lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear", **lora},
        "data": {"train": "rows.jsonl", "label": "label", "max_length": 32, **columns},
        "partition": {"clients": 3},
        "method": {"name": method},
        "train": {"rounds": 3, "local_steps": 4, "lr": 5e-2},
    }
    for _ in runs.start(make_config(values, root=place), place / "run").rounds():
        pass
    return place / "run"


def logits(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS[:4]]
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=row).logits.flatten() for row in rows])


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
@pytest.mark.parametrize("method", ["rolora", "flora"])
def test_a_merged_model_computes_what_the_adapter_does(
    tmp_path: Path, kind: str, method: str
) -> None:
    run = trained(tmp_path, kind, method)
    export(run, merged=tmp_path / "merged")
    if kind == "causal_lm":
        plain, adapted = transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM
        labels = {}
    else:
        plain = transformers.AutoModelForSequenceClassification
        adapted = peft.AutoPeftModelForSequenceClassification
        labels = {"num_labels": 3}
    merged = plain.from_pretrained(tmp_path / "merged")
    wanted = logits(adapted.from_pretrained(run / "adapter", **labels), run / "adapter")
    assert torch.allclose(logits(merged, tmp_path / "merged"), wanted, atol=1e-5)
    base = plain.from_pretrained(tmp_path / "model", **labels)
    assert not torch.allclose(logits(base, tmp_path / "merged"), wanted, atol=1e-2)
    if labels:
        assert merged.config.id2label == {0: "b", 1: "c", 2: "f"}


def test_a_classifier_without_a_padding_token_of_its_own_takes_rows_of_several_lengths(
    tmp_path: Path,
) -> None:
    tiny_gpt2(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    assert json.loads(file.read_text()).get("pad_token_id") is None
    run = trained(tmp_path, "classification", base="model", maker=tiny_gpt2)
    export(run, merged=tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = tokenizer(TEXTS[:4], return_tensors="pt", padding=True)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    snippet = (run / "adapter" / "README.md").read_text().split("```")[1].removeprefix("python")
    made: dict[str, Any] = {}
    exec(snippet.replace("ADAPTER_FOLDER", str(run / "adapter")), made)
    with torch.no_grad():
        found, wanted = (model.eval()(**rows).logits for model in (merged, made["model"]))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_an_adapter_trained_on_a_gpu_is_exported_on_a_machine_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, "causal_lm")
    file = run / "adapter" / "rolora.json"
    file.write_text(file.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    export(run, gguf=tmp_path / "adapter.gguf")
    assert (tmp_path / "adapter.gguf").is_file()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_merged_weights_have_the_dtype_that_was_asked_for(tmp_path: Path, dtype: Any) -> None:
    run = trained(tmp_path, "causal_lm")
    export(run, merged=tmp_path / "merged", dtype=dtype)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {tensor.dtype for tensor in merged.parameters()} == {wanted}
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "merged").iterdir()}
    assert len(set(modes.values())) == 1, "whoever can read one file can read them all"


def tensors(file: Path) -> dict[str, tuple[str, Any]]:
    """Name -> type and values of each tensor of a GGUF file."""
    return {
        tensor.name: (tensor.tensor_type.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(file).tensors
    }


def error_allowed(kind: str, values: Any) -> Any:
    """How far a type of GGUF may be from these float32 values at most, for each.

    Q8_0 has a float16 step for each 32 values, 1/127 of their largest, and rounds to whole steps.
    """
    if kind == "Q8_0":
        step = abs(values.reshape(-1, 32)).max(1, keepdims=True) / 127
        off = numpy.maximum(step * 2**-11, 2**-25)  # of the step itself
        return (numpy.ones((1, 32)) * (step / 2 + 127 * off)).reshape(values.shape)
    digits, smallest = {"F32": (24, 0), "BF16": (8, 0), "F16": (11, 2**-25)}[kind]
    return numpy.maximum(abs(values) * 2.0**-digits, smallest)


@pytest.mark.parametrize(
    ("dtype", "rank", "kinds"),
    [
        ("fp32", 4, "F32 F32"),
        ("fp16", 4, "F16 F16"),
        ("bf16", 4, "BF16 BF16"),
        ("q8_0", 4, "Q8_0 F16"),
        ("q8_0", 32, "Q8_0 Q8_0"),
    ],
)
def test_an_adapter_in_gguf_is_as_near_as_its_dtype_allows(
    tmp_path: Path, dtype: Any, rank: int, kinds: str
) -> None:
    run = trained(tmp_path, "causal_lm", rank=rank, target_modules=["q_proj", "down_proj"])
    export(run, gguf=tmp_path / "adapter.gguf", dtype=dtype)
    export(run, gguf=tmp_path / "exact.gguf")
    found, exact = tensors(tmp_path / "adapter.gguf"), tensors(tmp_path / "exact.gguf")
    assert found.keys() == exact.keys()
    for name, (kind, values) in found.items():
        wanted = exact[name][1]
        assert kind == kinds.split()[name.endswith("lora_b")], name
        assert (abs(values - wanted) <= error_allowed(kind, wanted) * 1.0001).all(), name


def test_the_adapted_layers_of_a_gguf_base_can_have_8_bits_too(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    as_gguf(tmp_path / "model", tmp_path / "base.gguf", packed="Q4_0")
    run = trained(tmp_path, "causal_lm", base="base.gguf", target_modules=["q_proj", "down_proj"])
    export(run, merged=tmp_path / "exact.gguf")
    export(run, merged=tmp_path / "merged.gguf", dtype="q8_0")
    found, exact = tensors(tmp_path / "merged.gguf"), tensors(tmp_path / "exact.gguf")
    for name, (kind, values) in found.items():
        before, wanted = exact[name]
        assert kind == ("Q8_0" if ".attn_q." in name or ".ffn_down." in name else before), name
        near = error_allowed(kind, wanted) * 1.0001 if kind != before else 0
        assert (abs(values - wanted) <= near).all(), name
    with pytest.raises(ConfigError, match="q8_0 is for GGUF files; --merged FOLDER takes fp32, "):
        export(run, merged=tmp_path / "merged", gguf=tmp_path / "adapter.gguf", dtype="q8_0")
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize("rslora", [False, True])
def test_llama_cpp_adds_from_a_gguf_file_what_peft_adds(tmp_path: Path, rslora: bool) -> None:
    run = trained(tmp_path, "causal_lm", rslora=rslora)
    export(run, gguf=tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}

    model: Any = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    # what transformers does to the weights of such a file when it reads them
    order = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    layers = [name for name, part in model.named_modules() if hasattr(part, "lora_A")]
    assert len(stored) == 2 * len(layers) == 2 * 2 * 7
    for path in layers:
        name = names.get_name(path.removeprefix("base_model.model."))
        down, up = (stored[f"{name}.weight.lora_{letter}"] for letter in "ab")
        product = fields["adapter.lora.alpha"] / len(down) * up @ down
        found = order.process(product.numpy(), f"{name}.weight").weights
        wanted = model.get_submodule(path).get_delta_weight("default").detach()
        assert torch.allclose(torch.tensor(found), wanted, atol=1e-6), path


def test_a_layer_that_gguf_has_no_name_for_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, "causal_lm")
    unknown = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 2)
    monkeypatch.setattr("rolora.model.export.gguf.get_tensor_name_map", lambda *_: unknown)
    with pytest.raises(ConfigError, match="has no name in GGUF"):
        export(run, gguf=tmp_path / "adapter.gguf")
    assert not list(tmp_path.glob("*adapter.gguf*"))


def test_what_was_written_is_told_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = trained(tmp_path, "causal_lm"), tmp_path / "adapter.gguf"
    code, out, _ = rolora(monkeypatch, capsys, "export", run, "--gguf", file, "--json")
    assert (code, json.loads(out), file.is_file()) == (0, {"gguf": str(file)}, True)


def test_a_classifier_s_adapter_is_not_written_as_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = trained(tmp_path, "classification"), tmp_path / "adapter.gguf"
    (tmp_path / "model").rename(tmp_path / "elsewhere")  # it is refused before it is loaded
    code, _, err = rolora(monkeypatch, capsys, "export", run, "--gguf", file)
    assert (code, file.exists()) == (2, False)
    assert "an adapter of a 'bert' cannot be written as GGUF" in err
    code, _, err = rolora(monkeypatch, capsys, "export", run)
    assert code == 2
    assert "choose what to write" in err
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        export(run, merged=tmp_path / "there")
    file.write_text("precious")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        export(run, gguf=file)
    assert file.read_text() == "precious"
    with pytest.raises(ConfigError, match="name two files"):
        export(run, merged=tmp_path / "one.gguf", gguf=tmp_path / "one.gguf")


def as_gguf(folder: Path, file: Path, packed: str = "F32") -> None:
    """A tiny Llama and its byte-level tokenizer, written as llama.cpp's converter would.

    ``packed``: the type of its matrices.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config, state = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(packed, f"MOSTLY_{packed}")])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if (own := heads.get(layer.rpartition(".")[2])) is not None:
            tensor = interleaved(tensor, own)
        kind = gguf.GGMLQuantizationType[packed if tensor.dim() == 2 else "F32"]
        data = gguf.quantize(tensor.contiguous().numpy(), kind)
        writer.add_tensor(f"{names.get_name(layer)}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_card_of_a_classifier_on_a_gguf_base_loads_the_classifier(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    as_gguf(tmp_path / "model", tmp_path / "base.gguf")
    run = trained(tmp_path, "classification", base="base.gguf", maker=tiny_llama)
    export(run, merged=tmp_path / "merged")
    snippet = (run / "adapter" / "README.md").read_text().split("```")[1].removeprefix("python")
    snippet = snippet.replace("BASE_FOLDER", str(tmp_path))
    made: dict[str, Any] = {}
    exec(snippet.replace("ADAPTER_FOLDER", str(run / "adapter")), made)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    found, wanted = (logits(model, tmp_path / "merged") for model in (made["model"], merged))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_an_adapter_of_a_gguf_base_is_merged_into_what_that_holds(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    as_gguf(tmp_path / "model", tmp_path / "base.gguf")
    run = trained(tmp_path, "causal_lm", base="base.gguf")
    export(run, merged=tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    wanted = logits(peft.PeftModel.from_pretrained(plain, run / "adapter"), run / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, tmp_path / "merged"), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gguf_base_is_written_with_the_adapter_in_its_weights_and_nothing_else_changed(
    tmp_path: Path, dtype: Any
) -> None:
    tiny_llama(tmp_path / "model")
    as_gguf(tmp_path / "model", tmp_path / "base.gguf", packed="Q8_0")
    run = trained(tmp_path, "causal_lm", base="base.gguf", target_modules=["q_proj", "down_proj"])
    export(run, merged=tmp_path / "merged.gguf", dtype=dtype)
    export(run, merged=tmp_path / "merged")
    found, wanted = (
        transformers.AutoModelForCausalLM.from_pretrained(**place)
        for place in (
            {"pretrained_model_name_or_path": tmp_path, "gguf_file": "merged.gguf"},
            {"pretrained_model_name_or_path": tmp_path / "merged"},
        )
    )
    for name, tensor in wanted.state_dict().items():
        near = 1e-6 if dtype == "fp32" else 2**-8  # bfloat16 has 8 digits
        assert torch.allclose(found.state_dict()[name], tensor, rtol=near, atol=1e-6), name

    before, after = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("base", "merged"))
    changed = []
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.tensor_type != new.tensor_type:
            changed.append(new.name)
            assert new.tensor_type.name == {"fp32": "F32", "bf16": "BF16"}[dtype]
        else:
            assert (old.name, old.data.tobytes()) == (new.name, new.data.tobytes())
    assert changed == [f"blk.{n}.{part}.weight" for n in (0, 1) for part in ("attn_q", "ffn_down")]
    told, kept = (
        {k: v.contents() for k, v in one.fields.items() if not k.startswith("GGUF.")}
        for one in (before, after)
    )
    assert told == {**kept, "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0}


def test_an_adapter_is_not_merged_into_a_gguf_file_that_has_no_place_for_it(
    tmp_path: Path,
) -> None:
    run = trained(tmp_path, "causal_lm")
    with pytest.raises(ConfigError, match="'model' is not a GGUF file"):
        export(run, merged=tmp_path / "merged.gguf")
    export(run, gguf=tmp_path / "adapter.gguf")  # a file with other tensors than the base's
    loaded, adapter, _ = load_trained(run, {}, None, [])
    lacking, out = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    with pytest.raises(ConfigError, match=r"is not in 'adapter\.gguf'"):
        write_merged_gguf(loaded.base, adapter, lacking, out, "fp32")
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
def test_llama_cpp_itself_continues_a_text_as_peft_does(tmp_path: Path, dtype: Any) -> None:
    llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp's code, is missing")
    tiny_llama(tmp_path / "model")
    as_gguf(tmp_path / "model", tmp_path / "base.gguf")
    run = trained(tmp_path, "causal_lm", base="base.gguf")
    export(run, gguf=tmp_path / "adapter.gguf", merged=tmp_path / "merged.gguf", dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "adapter")
    rows = [tokenizer(text)["input_ids"] for text in TEXTS[:4]]

    def by_llama_cpp(name: str, *adapters: str) -> list[str]:
        settings = llama_cpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.warmup = str(tmp_path / name), 64, False
        settings.lora_adapters = [
            llama_cpp.CommonAdapterLoraInfo(str(tmp_path / one), 1.0) for one in adapters
        ]
        server = llama_cpp.Server(settings)
        wanted = {"max_tokens": 8, "temperature": 0.0}
        answers = [server.handle_completions({"prompt": row, **wanted}) for row in rows]
        return [answer["choices"][0]["text"] for answer in answers]

    model: Any = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), run / "adapter"
    )
    by_peft = []
    for row in rows:
        ids = model.generate(input_ids=torch.tensor([row]), max_new_tokens=8, do_sample=False)[0]
        by_peft.append(tokenizer.decode(ids[len(row) :], skip_special_tokens=True))
    assert by_llama_cpp("base.gguf", "adapter.gguf") == by_peft
    assert by_llama_cpp("merged.gguf") == by_peft
    assert by_llama_cpp("base.gguf") != by_peft


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_a_merged_model_has_a_card_that_says_how_to_load_it(tmp_path: Path, kind: str) -> None:
    run = trained(tmp_path, kind)
    export(run, merged=tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "\nlibrary_name: transformers\n" in card
    assert "A model that 3 clients fine-tuned with LoRA without pooling their rows; " in card
    assert "| base model | model, weights" in card
    made: dict[str, Any] = {}
    snippet = card.split("```")[1].removeprefix("python")
    exec(snippet.replace("MODEL_FOLDER", str(tmp_path / "merged")), made)
    name = {"classification": "SequenceClassification", "causal_lm": "CausalLM"}[kind]
    plain = getattr(transformers, f"AutoModelFor{name}").from_pretrained(tmp_path / "merged")
    found, wanted = (logits(model, tmp_path / "merged") for model in (made["model"], plain))
    assert found.equal(wanted)
    (run / "adapter").rename(tmp_path / "adapter")  # without its run, whose results are in a card
    export(tmp_path / "adapter", merged=tmp_path / "bare", model=str(tmp_path / "model"))
    assert not (tmp_path / "bare" / "README.md").exists()


def test_no_damage_to_what_a_run_says_of_itself_stops_an_export(tmp_path: Path) -> None:
    run = trained(tmp_path, "causal_lm")
    config, rounds = run / "config.toml", run / "rounds.jsonl"
    whole, lines = config.read_text(), rounds.read_text()

    def said(name: str, path: Path = run) -> list[str]:
        told: list[str] = []
        export(path, merged=tmp_path / name, model=str(tmp_path / "model"), notify=told.append)
        assert (tmp_path / name / "model.safetensors").is_file()
        assert (tmp_path / name / "README.md").exists() == (not told and path == run)
        return told

    assert said("whole") == []
    rounds.write_text(lines[:-30])
    (note,) = said("cut")
    assert note.startswith("no model card is written: ")
    assert "line 4 is not valid JSON" in note
    rounds.write_text(lines)
    config.write_text(whole.replace("[method]", "[other]"))
    assert "config.toml or partition.json is damaged" in said("keys")[0]
    config.write_text(whole.replace("[lora]", "[other]"))
    assert f"{run} is damaged (KeyError('lora'))" in said("lora")[0]
    rounds.unlink()
    (run / "partition.json").unlink()
    config.write_text("[tool]\n")  # of some other program
    assert said("other", run / "adapter") == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("model_config.json", "{", "model_config.json is missing or damaged: JSONDecodeError"),
        ("model_config.json", "[]", "model_config.json is missing or damaged: TypeError"),
        ("model_config.json", None, "model_config.json is missing or damaged: FileNotFoundError"),
        ("rolora.json", "task", "rolora.json is damaged: KeyError('task')"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str | None, fault: str
) -> None:
    run = trained(tmp_path, "causal_lm")
    file = run / "adapter" / name
    if text is None:
        file.unlink()
    elif text == "task":
        notes = json.loads(file.read_text())
        del notes["config"]["model"]["task"]
        file.write_text(json.dumps(notes))
    else:
        file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(fault)):
        export(run, gguf=tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
