"""The RoLoRA paper's two-layer network on pictures: logits = W_out ReLU(s · B A x).

x holds the pixels of one picture, in [0, 1]. Only the LoRA factors A (rank, pixels) and
B (hidden, rank) are learned: the layer that carries them has a zero weight, and W_out
(labels, hidden) stays random. Chen et al., arXiv:2502.01755, the experiment on MNIST.

It is an ordinary transformers model, so that everything here and in PEFT works on it: its
"vocabulary" is the 256 values of a pixel, token id k is the value k, and a row's text is
"0 0 12 255 ...". :func:`register` makes it known to transformers' Auto classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

VALUES = 256  # of a pixel; the id after the last is padding, which is black


class PixelNetworkConfig(PreTrainedConfig):  # type: ignore[misc]
    """``num_pixels`` of a picture, ``hidden_size`` of the one hidden layer.

    ``initializer_range`` is the standard deviation of W_out, 1/√hidden_size; ``lora_b_std`` that of
    B at the start, 1/√rank for rank 16. With B = 0 no gradient would pass the ReLU.
    """

    model_type = "pixel_network"

    def __init__(
        self,
        num_pixels: int = 784,
        hidden_size: int = 200,
        initializer_range: float = 0.07,
        lora_b_std: float = 0.25,
        **more: Any,
    ) -> None:
        self.num_pixels = num_pixels
        self.hidden_size = hidden_size
        self.initializer_range = initializer_range
        self.lora_b_std = lora_b_std
        self.vocab_size = VALUES + 1
        super().__init__(**{"pad_token_id": VALUES, **more})


class ZeroLinear(nn.Linear):
    """A linear layer without bias that computes no product for as long as its weight is zero."""

    def forward(self, x: Tensor) -> Tensor:
        # an adapter may have been merged into it; a plan's weight has a shape and no values
        if isinstance(self.weight, FakeTensor) or not self.weight.any():
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return super().forward(x)


class Hidden(nn.Module):
    """The layer that carries LoRA, and its ReLU: (rows, num_pixels) to (rows, hidden_size)."""

    def __init__(self, config: PixelNetworkConfig) -> None:
        super().__init__()
        self.linear = ZeroLinear(config.num_pixels, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.linear(x))


class PixelNetwork(PreTrainedModel):  # type: ignore[misc]
    """The network; ``input_ids`` (rows, up to num_pixels) are pixel values from 0 to 255.

    What is left out or padded at a row's end is black. Without an adapter all logits are 0.
    """

    config_class = PixelNetworkConfig
    base_model_prefix = "hidden"

    def __init__(self, config: PixelNetworkConfig) -> None:
        super().__init__(config)
        self.hidden = Hidden(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    def forward(self, input_ids: Tensor, **unused: Any) -> SequenceClassifierOutput:
        x = input_ids.to(self.dtype).div_(VALUES - 1).masked_fill_(input_ids == VALUES, 0)
        missing = self.config.num_pixels - x.shape[1]
        hidden = self.hidden(functional.pad(x, (0, missing)) if missing else x)
        return SequenceClassifierOutput(logits=self.classifier(hidden))


def write_pixel_network(folder: Path, config: PixelNetworkConfig | None = None) -> None:
    """A model and its tokenizer in an existing folder, as ``from_pretrained`` reads them.

    W_out is left out, so that each run draws its own from its seed.
    """
    config = config or PixelNetworkConfig()
    config.save_pretrained(folder)
    weight = torch.zeros(config.hidden_size, config.num_pixels)
    save_file({"hidden.linear.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    vocab = {str(value): value for value in range(VALUES)} | {"[PAD]": VALUES}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": VALUES, "content": "[PAD]", "special": True, **flags}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        # there is no token for unknown words: anything but a pixel is an error
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="[PAD]",
        model_max_length=config.num_pixels,
    ).save_pretrained(folder)


def register() -> None:
    """Make the model type known to transformers' Auto classes; may be called again."""
    AutoConfig.register(PixelNetworkConfig.model_type, PixelNetworkConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(PixelNetworkConfig, PixelNetwork, exist_ok=True)
