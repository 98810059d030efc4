"""Small random models, saved as ``from_pretrained`` reads them: real code paths in milliseconds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as byte_decoders
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EsmConfig,
    EsmForSequenceClassification,
    EsmTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

SENTENCES = [
    "the cat sat on the mat and looked at the dog",
    "a good film with a warm heart and a clever plot",
    "a bad film with a thin plot and no heart at all",
    "what is the capital of France? Paris, of course.",
    "system user assistant: you answer in one short line",
]

HEADS = ("classifier", "pre_classifier", "score", "head.", "sequence_summary", "logits_proj")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A two-layer Llama (width 32, tied to nothing) and a byte-level BPE chat tokenizer.

    Turns are ChatML; the padding token is the end-of-text token, as in many real checkpoints.
    """
    fast = chat_tokenizer()
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # larger than usual, so that a random model has opinions
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    return _save(folder, fast, LlamaForCausalLM, config, seed)


def tiny_bert(folder: Path, seed: int = 0) -> Path:
    """A two-layer BERT classifier (width 32) and a word-level tokenizer with [CLS] and [SEP].

    The classifier is left out of the file, as in a checkpoint that was only pre-trained.
    """
    fast = word_tokenizer()
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=fast.pad_token_id,
    )
    return _save(folder, fast, BertForSequenceClassification, config, seed)


def tiny_roberta(folder: Path, seed: int = 0, pad: str = "[PAD]", **more: Any) -> Path:
    """A two-layer RoBERTa whose head is two linear layers, left out of the file."""
    fast = word_tokenizer()
    fast.pad_token = pad
    config = RobertaConfig(**_SIZES, vocab_size=len(fast), pad_token_id=fast.pad_token_id, **more)
    return _save(folder, fast, RobertaForSequenceClassification, config, seed)


def tiny_gpt2(folder: Path, seed: int = 0) -> Path:
    """A two-layer GPT-2, whose layers are Conv1D: their weights are (in, out)."""
    fast = chat_tokenizer()
    config = GPT2Config(
        vocab_size=len(fast),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    return _save(folder, fast, GPT2LMHeadModel, config, seed)


def tiny_distilbert(folder: Path, seed: int = 0) -> Path:
    """A DistilBERT, for which PEFT knows no default target modules."""
    fast = word_tokenizer()
    config = DistilBertConfig(
        vocab_size=len(fast), dim=32, hidden_dim=64, n_layers=2, n_heads=4, pad_token_id=0
    )
    return _save(folder, fast, DistilBertForSequenceClassification, config, seed)


def tiny_modernbert(folder: Path, seed: int = 0) -> Path:
    """A ModernBERT, whose head has a LayerNorm between its two linear layers."""
    fast = word_tokenizer()
    config = ModernBertConfig(
        **_SIZES,
        vocab_size=len(fast),
        pad_token_id=fast.pad_token_id,
        local_attention=16,
        global_attn_every_n_layers=2,
    )
    return _save(folder, fast, ModernBertForSequenceClassification, config, seed)


def tiny_esm(folder: Path, seed: int = 0) -> Path:
    """A protein model, whose tokenizer is written in Python."""
    tokens = esm_tokenizer()
    config = EsmConfig(
        **_SIZES,
        vocab_size=len(tokens),
        pad_token_id=tokens.pad_token_id,
        mask_token_id=tokens.mask_token_id,
        position_embedding_type="rotary",
    )
    return _save(folder, tokens, EsmForSequenceClassification, config, seed)


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "initializer_range": 0.2,
}


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = byte_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=128,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def esm_tokenizer() -> EsmTokenizer:
    """Amino acids as words."""
    words = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<mask>"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(words))
        file.flush()
        return EsmTokenizer(file.name)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The words of a few sentences, with [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _save(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model_class: type, config: object, seed: int
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(HEADS)}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    return folder
