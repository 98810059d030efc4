"""For the ClientApp of a Flower project: what a round trains of a PEFT model, and what it sends.

The strategy names it in the message's ConfigRecord as ``trainable``: ``"B,head"`` or ``"A,head"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rolora.algorithm.adapter import role_of
from rolora.errors import ConfigError

TRAINABLE = "trainable"


def freeze(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Set ``requires_grad`` for the part of the active adapter that this round trains, only.

    ``config`` is the message's ConfigRecord. Call it before the first backward pass; the optimiser
    may exist already, since it skips parameters without a gradient. Raises ConfigError if the
    message has no ``trainable``, or the model no such parameter.
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
            f"this round trains {','.join(sorted(roles))}, but the model has no such parameter: "
            "was it made by peft.get_peft_model?"
        )


def moving(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``peft.get_peft_model_state_dict(model)`` that this round trains and averages.

    The strategy needs no others. Raises ConfigError if the message has no ``trainable``.
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
