"""Write trl.json, what TRL's trainers make of a few rows, which tests compare ours with.

Needs trl (1.16.0 wrote the file), which is no dependency of ours: python tests/make_trl.py
"""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

KEPT = Path(__file__).with_name("trl.json")
STEPS, LR, RANK, ALPHA = 4, 0.05, 2, 4
ASKED = ["the cat sat on", "what is the capital of France?", "a good", "you answer in one"]
BETTER = [" the mat", " Paris, of course.", " film with a warm heart", " short line"]
WORSE = [" a bad film and looked at the dog", " the dog", " plot", " thin plot and no heart"]
LABELS = [True, True, False, True]


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text.strip()}


def rows() -> dict[str, list[dict[str, Any]]]:
    """The same preferences in each of the forms that TRL knows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for ask, one, other, label in zip(ASKED, BETTER, WORSE, LABELS, strict=True):
        before = [turn("user", ask)]
        yes, no = [turn("assistant", one)], [turn("assistant", other)]
        forms: dict[str, dict[str, Any]] = {
            "texts": {"prompt": ask, "chosen": one, "rejected": other},
            "whole texts": {"chosen": ask + one, "rejected": ask + other},
            "chats": {"prompt": before, "chosen": yes, "rejected": no},
            "whole chats": {"chosen": before + yes, "rejected": before + no},
            "labelled texts": {"prompt": ask, "completion": one, "label": label},
            "labelled chats": {"prompt": before, "completion": yes, "label": label},
        }
        for name, row in forms.items():
            found.setdefault(name, []).append(row)
    return found


def fixed(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """Values of no particular kind that any version of any library makes alike."""
    places = torch.arange(tensor.numel(), dtype=torch.float64)
    return (0.2 * torch.sin(1.7 * places + number)).to(tensor.dtype).view(tensor.shape)


def fixed_model(folder: Path) -> Path:
    """A tiny Llama whose weights do not hang on a random generator."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(folder))
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            if "norm" not in name:
                weight.copy_(fixed(weight, number))
    model.save_pretrained(folder)
    return folder


def trained(folder: Path, given: list[dict[str, Any]], loss: str, beta: float) -> dict[str, Any]:
    """The tokens, and before each step the loss, and after the last the evaluation."""
    trl: Any = import_module("trl")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        weights = [(n, p) for n, p in sorted(model.named_parameters()) if "lora_A" in n]
        for number, (_, weight) in enumerate(weights):
            weight.copy_(fixed(weight, number))
    pairs = "label" not in given[0]
    kinds = (trl.DPOTrainer, trl.DPOConfig) if pairs else (trl.KTOTrainer, trl.KTOConfig)
    more: dict[str, Any] = {} if pairs else {"train_sampling_strategy": "sequential"}
    args = kinds[1](
        output_dir=str(folder / "out"),
        loss_type=loss,
        beta=beta,
        max_length=None,
        max_steps=STEPS,
        per_device_train_batch_size=len(given),
        per_device_eval_batch_size=len(given),
        learning_rate=LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        logging_first_step=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **more,
    )
    data = Dataset.from_list(given)
    trainer = kinds[0](
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    keys = ("chosen_ids", "rejected_ids") if pairs else ("completion_ids", "KL_completion_ids")
    ids = [
        [" ".join(map(str, row["prompt_ids"] + row[key])) for key in keys]
        for row in trainer.train_dataset
    ]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    end = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    kept = ("loss", "rewards/accuracies", "rewards/margins", "kl")
    return {"ids": ids, "losses": losses, "end": {key: end[key] for key in kept if key in end}}


def main() -> None:
    """Each form of rows with each loss that is for it."""
    cases = []
    with tempfile.TemporaryDirectory() as place:
        folder = fixed_model(Path(place) / "llama")
        for name, given in rows().items():
            for loss, beta in (("sigmoid", 0.1), ("sigmoid", 1.0), ("ipo", 0.5), ("kto", 0.5)):
                if (loss == "kto") == ("label" in given[0]):
                    case = trained(folder, given, loss, beta)
                    cases.append({"rows": name, "loss": loss, "beta": beta, **case})
    KEPT.write_text(json.dumps({"trl": version("trl"), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
