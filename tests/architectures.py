"""Forty architectures as tiny random models, and what becomes of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import SENTENCES, chat_tokenizer, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.errors import RoloraError
from rolora.run.experiment import Experiment

# the names that most configurations share
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# model_type -> what its configuration is given beside SIZES, or in place of a name there
ENCODERS: Mapping[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2},
    "albert": {"embedding_size": 16},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "electra": {"embedding_size": 32},
    "mpnet": {},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 1},
    "roformer": {},
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]},
}
DECODERS: Mapping[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 16},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "qwen3_moe": {**GROUPED, **EXPERTS},
    "gemma": GROUPED,
    "gemma2": {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 8.0},
    "olmo": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "stablelm": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    "mamba": {"state_size": 4, "conv_kernel": 2},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "bart": {
        "d_model": 32,
        **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
    },
}


# decoders that are also tried as classifiers
BOTH_TASKS = ("gpt2", "llama", "gemma2")
CASES = [
    *((name, "classification") for name in ENCODERS),
    *((name, "classification" if name in ("t5", "bart") else "causal_lm") for name in DECODERS),
    *((name, "classification") for name in BOTH_TASKS),
]
# what trains where both PEFT's default and all-linear are refused
OTHERWISE = {"deberta-v2": ["value_proj", "dense"]}
NOT_SHARED = {"xlnet": {"max_position_embeddings"}, "funnel": {"num_hidden_layers"}}


def save(model_type: str, task: str, folder: Path) -> Path:
    """Save one of the models above with a tokenizer, without a head if the task trains one."""
    tokenizer = chat_tokenizer() if task == "causal_lm" else word_tokenizer()
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if task == "causal_lm":
        special |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    else:
        special |= {"bos_token_id": 2, "eos_token_id": 3}
    shared = {k: v for k, v in SIZES.items() if k not in NOT_SHARED.get(model_type, ())}
    own = {**ENCODERS, **DECODERS}[model_type]
    config = AutoConfig.for_model(model_type, **{**shared, **special, **own})
    auto: Any = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if task == "causal_lm" or name.startswith(f"{model.base_model_prefix}.")
    }
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    return folder


def configuration(folder: Path, task: str, targets: str | list[str], **train: Any) -> RunConfig:
    """Two rounds of three clients on the model in ``folder / "model"``; writes the rows."""
    words = " ".join(SENTENCES).split()
    texts = [" ".join(words[start : start + 3 + start % 4]) for start in range(18)]
    if task == "causal_lm":
        rows = ["ask,say", *(f"{text}, {text[::-1]}" for text in texts)]
        columns = {"prompt": "ask", "completion": "say"}
    else:
        rows = ["text,label", *(f"{text},{'xyz'[n % 3]}" for n, text in enumerate(texts))]
        columns = {}
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
    tables = {
        "model": {"path": "model", "task": task, "dtype": "fp32"},
        "lora": {"rank": 2, "target_modules": targets},
        "data": {"train": "rows.csv", "test": 0.2, "max_length": 48, **columns},
        "partition": {"clients": 3, "scheme": "iid"},
        "method": {"name": "fedit"},
        "train": {
            "rounds": 2,
            "local_steps": 2,
            "batch_size": 2,
            "lr": 0.05,
            "optimizer": "sgd",
            "participation": 1.0,
            "cache": "",
            **train,
        },
    }
    return make_config(tables, root=folder)


@dataclass(frozen=True)
class Outcome:
    """What becomes of one architecture: for either choice of layers "" or why it is refused."""

    default: str
    all_linear: str
    packed: bool

    def targets(self, model_type: str) -> str | list[str] | None:
        """Layers that train, as many as can; None if none."""
        if not self.all_linear:
            return "all-linear"
        return OTHERWISE.get(model_type, None if self.default else [])


def outcome(model_type: str, task: str, folder: Path) -> Outcome:
    """Save the model, and see which layers may carry an adapter."""
    save(model_type, task, folder / "model")

    def refusal(targets: str | list[str]) -> tuple[str, bool]:
        run = Experiment(configuration(folder, task, targets))
        try:
            _ = run.task
        except RoloraError as error:
            return str(error).replace(f"{folder}/", ""), False
        return "", run.base.stack is not None

    (default, packed), (all_linear, also) = refusal([]), refusal("all-linear")
    return Outcome(default, all_linear, packed or also)
