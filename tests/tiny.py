"""Tiny random models of every supported family, made in memory."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 5  # shorter than the test sequences, so that sliding windows matter

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, sliding_window=WINDOW)),
    "gemma3_text": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZES, sliding_window=WINDOW)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES)),
}


def tiny(family: str, seed: int = 0) -> Any:
    """Return a tiny float32 model with weights large enough that every block matters."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def bypasses(hidden: int, *blocks: int, rank: int = 3) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return a bypass for each of `blocks`, large enough to matter: down (rank, hidden) and up (hidden, rank)."""
    draw = torch.Generator().manual_seed(7)
    sizes = (rank, hidden), (hidden, rank)
    return {b: tuple(torch.randn(size, generator=draw) * 0.4 / rank**0.5 for size in sizes) for b in blocks}


def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer with ChatML markers and no merges: 256 bytes and 3 markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(markers + alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(markers)
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")  # no pad: none is needed


def save_tiny_backbone(folder: Any, family: str = "llama", blocks: int = 4) -> str:
    """Write a tiny backbone with its tokenizer to `folder` and return its path as a name to load."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 260, "num_hidden_layers": blocks, "max_position_embeddings": 1024}
    config = {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config}[family](**sizes)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
