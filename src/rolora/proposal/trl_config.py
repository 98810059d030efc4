"""The YAML file of ``trl sft``, ``trl dpo`` or ``trl kto``, as keys of rolora's configuration."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rolora.errors import ConfigError, one_line, printable

Taken = tuple[str, Any]  # a key of rolora's, and its value


@dataclass(frozen=True)
class Trainer:
    """A file of TRL: its own values, what rolora uses of them, and notes on what it cannot use.

    ``settings``: key of rolora's configuration -> value and the key of TRL's that it comes from.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def text(self, key: str) -> str:
        """One of TRL's values as text; empty if it is not there."""
        return str(self.values.get(key) or "")

    def rounds(self, rows: int, cohort: int, local_steps: int, batch_size: int) -> int | None:
        """The rounds in which clients see as many rows in all as TRL would; None if it sets none.

        ``rows``: training rows; ``cohort``: clients of a round.
        """
        seen = float(self.values.get("num_train_epochs") or 0) * rows
        if (steps := float(self.values.get("max_steps") or 0)) > 0:
            seen = steps * batch_size
        return max(2, math.ceil(seen / (cohort * local_steps * batch_size))) if seen > 0 else None

    def warmup(self, rounds: int, local_steps: int) -> int | None:
        """The rounds of warm-up; None if it sets none. Steps are those of one client."""
        if (steps := float(self.values.get("warmup_steps") or 0)) >= 1:
            return math.ceil(steps / local_steps)
        share = steps or float(self.values.get("warmup_ratio") or 0)
        return math.ceil(share * rounds) if share > 0 else None


def read_trainer(path: Path) -> Trainer:
    """Read a YAML file of TRL. ConfigError if it is not YAML, or one of its numbers is not one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} has no settings of TRL: write one KEY: VALUE per line")
    values = {key: value for key, value in values.items() if value is not None}
    if SCALE.keys() & values.keys():
        values = {**SCALE, **values}
    for key in sorted(NUMBERS & values.keys()):
        values[key] = _number(path, key, values[key])
    settings: dict[str, tuple[Any, str]] = {}
    notes = []
    for key in sorted(values, key=lambda key: key.startswith("load_in_")):  # outweighs their dtype
        if _is_plain(value := values[key]):
            found = None if key in ELSEWHERE else _taken(key, value, values)
        else:
            found = INSTEAD.get(key, "rolora reads texts, numbers and lists of texts")
            del values[key]
        if isinstance(found, str):
            # a few lines of YAML can stand for more than memory holds
            shown = reprlib.repr(value) if isinstance(value, list | dict) else str(value)[:60]
            notes.append(printable(f"{path.name}: {key}: {shown} is not used: {found}"))
        elif found is not None:
            settings[found[0]] = (found[1], key)
    return Trainer(values, settings, tuple(notes))


def _is_plain(value: Any) -> bool:
    """Whether a value is a text, a number, or a list of texts."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _number(path: Path, key: str, value: Any) -> float:
    """A number, also one such as 1e-4, which is text to YAML."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{path}: {key} is {reprlib.repr(value)}, not a number")
    return int(number) if number.is_integer() else number


SCALE = {"lora_r": 16, "lora_alpha": 32}  # TRL's defaults; both set the size of each step
NUMBERS = {
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("num_train_epochs", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "seed"),
    *("lora_r", "lora_alpha", "lora_dropout", "max_length", "max_seq_length"),
    *("beta", "label_smoothing"),
}
# used where the model, the rows and the rounds are known, or clear from the task
ELSEWHERE = {
    "lora_task_type",
    *("model_name_or_path", "model_revision"),
    *("dataset_train_split", "dataset_test_split"),
    *("num_train_epochs", "max_steps", "warmup_ratio", "warmup_steps"),
}
PLAIN = {
    "learning_rate": "train.lr",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_checkpointing": "train.recompute",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "beta": "preference.beta",
    "label_smoothing": "preference.label_smoothing",
    "seed": "seed",
}
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
WORDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "lr_scheduler_type": (
        "train.schedule",
        {word: word.removesuffix("_with_warmup") for word in SCHEDULES},
    ),
    "loss_type": ("preference.loss", {"sigmoid": "dpo", "ipo": "ipo", "kto": "kto"}),
    "dtype": ("model.dtype", {"bfloat16": "bf16", "float32": "fp32", "auto": "auto"}),
}
WORDS = {**WORDS, "torch_dtype": WORDS["dtype"]}
ON: Mapping[str, Taken] = {
    "bf16": ("model.dtype", "bf16"),
    "load_in_4bit": ("model.dtype", "nf4"),
    "load_in_8bit": ("model.dtype", "int8"),
}
# what rolora always does, or never
ALWAYS = {
    **dict.fromkeys(("use_peft", "completion_only_loss", "assistant_only_loss"), True),
    **dict.fromkeys(("trust_remote_code", "packing", "fp16", "use_dora"), False),
}
INSTEAD = {
    "dataset_name": "the rows are those given to init",
    "dataset_config": "the rows are those given to init",
    "use_peft": "rolora always trains LoRA",
    "completion_only_loss": "rolora trains on completions only",
    "assistant_only_loss": "rolora trains on the assistant's turns only",
    "trust_remote_code": "rolora never runs a model's own code",
    "packing": "rolora neither pads nor joins rows",
    "fp16": "rolora computes in fp32 or bf16",
    "use_dora": "rolora trains plain LoRA",
    "lora_modules_to_save": "rolora trains only LoRA and a classifier's head",
    "max_prompt_length": "data.max_length is the limit of prompt and completion together",
    "output_dir": "name the run's folder with rolora run --out",
    "dataset_text_field": "the columns are found from the rows",
    "eval_strategy": "eval.every counts rounds",
    "eval_steps": "eval.every counts rounds",
    "save_strategy": "rolora saves every round",
    "save_steps": "rolora saves every round",
    "report_to": "rolora writes rounds.jsonl and report.html",
    "push_to_hub": "rolora uploads nothing by itself: rolora export RUN --push NAME does",
}


def _taken(key: str, value: Any, values: Mapping[str, Any]) -> Taken | str | None:
    """What rolora makes of a setting; why it cannot use it; None if rolora always does so."""
    if key in PLAIN:
        return PLAIN[key], value
    if key == "per_device_train_batch_size":
        return "train.batch_size", value * values.get("gradient_accumulation_steps", 1)
    if key == "gradient_accumulation_steps":
        given = "per_device_train_batch_size" in values
        return None if given else "it multiplies per_device_train_batch_size, which is not set"
    if key == "run_name":
        return "name", value
    if key == "lora_target_modules":
        alone = isinstance(value, list) and len(value) == 1 and value[0] == "all-linear"
        return "lora.target_modules", "all-linear" if alone else value
    if key == "optim":
        known = {"adamw": "adamw", "sgd": "sgd"}.get(str(value).partition("_")[0])
        return ("train.optimizer", known) if known else "rolora has adamw and sgd"
    if key in WORDS:
        name, words = WORDS[key]
        words_given = value if isinstance(value, list) else [value]
        if len(words_given) == 1 and (known := words.get(str(words_given[0]))):
            return name, known
        return f"{name} is one of {', '.join(dict.fromkeys(words.values()))}"
    if key in ON:
        return ON[key] if value else None
    if ALWAYS.get(key) is bool(value):
        return None
    return INSTEAD.get(key, "rolora has no such setting")
