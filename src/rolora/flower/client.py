"""For a ClientApp of one's own: which part of a PEFT model a round trains, and which part travels.

The strategy says it in the message's ConfigRecord, as ``trainable``: ``"B,head"`` or ``"A,head"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rolora.algorithm.adapter import role_of
from rolora.errors import ConfigError

TRAINABLE = "trainable"


def freeze(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Let gradients reach what this round trains of a PEFT model's active adapter, nothing else.

    ``config`` is the message's ConfigRecord. To be called before the first backward pass; an
    optimiser over all parameters may exist already, since it passes over those without a gradient.
    Raises ConfigError where the message names nothing to train, or the model has nothing of it.
    """
    roles, active = _trainable(config), getattr(model, "active_adapter", "default")
    parts = {
        "A": f".lora_A.{active}.",
        "B": f".lora_B.{active}.",
        "head": f".modules_to_save.{active}.",
    }
    trained = [part for role, part in parts.items() if role in roles]
    found = 0
    for name, parameter in model.named_parameters():
        wanted = any(part in name for part in trained)
        parameter.requires_grad_(wanted)
        found += wanted
    if not found:
        raise ConfigError(
            f"this round trains {','.join(sorted(roles))}, and the model has no such parameter: is "
            "it what peft.get_peft_model returned?"
        )


def moving(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``peft.get_peft_model_state_dict(model)`` that this round trains and averages.

    They are all that the strategy needs: half of the adapter, and the head. Raises ConfigError
    where the message names nothing to train.
    """
    roles = _trainable(config)
    return {name: tensor for name, tensor in state.items() if role_of(name) in roles}


def _trainable(config: Mapping[str, Any]) -> set[str]:
    named = config.get(TRAINABLE)
    if not isinstance(named, str) or not named:
        raise ConfigError(
            f"the message's config has no {TRAINABLE!r}: does the server use "
            "rolora.flower.strategy(), and is this a message to train?"
        )
    return set(named.split(","))
