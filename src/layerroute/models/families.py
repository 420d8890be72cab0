"""The only module that knows where Hugging Face keeps things inside a model."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import nn

from layerroute.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """Where one model family keeps its blocks, what inside a block LoRA may wrap, and what a bypass reads."""

    decoder: str = "model"  # token ids -> last residual, after the final norm
    blocks: str = "model.layers"
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    norm: str = "input_layernorm"  # what the attention of a block reads the residual through

    def decoder_of(self, model: nn.Module) -> nn.Module:
        """Return the part of `model` that maps token ids to residuals, without the LM head."""
        found: nn.Module = attrgetter(self.decoder)(model)
        return found

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """Return the decoder blocks of `model`, in the order they run."""
        found: nn.ModuleList = attrgetter(self.blocks)(model)
        return found


_LLAMA_LIKE = Family()
_PHI3 = Family(attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj"))

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE,  # Llama 2 and 3, SmolLM2
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,  # Qwen2 and Qwen2.5
    "qwen3": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "phi3": _PHI3,
}

FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that turn a token by its place alone, whatever the length."""


def family_of(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        ModelError: the `model_type` is not in the table; the message says how to add it.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ModelError(
            f"model_type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. To add it, put one "
            "line into FAMILIES in layerroute/models/families.py and a tiny config into tests/tiny.py: "
            "the contract suite then proves it."
        )
    return FAMILIES[kind]


def changing_rope(config: Any) -> str | None:
    """Return the rotary embedding of a transformers config that changes with the length: no key outlives that."""
    parameters = config.rope_parameters
    by_layer_type = [each for each in parameters.values() if isinstance(each, dict)]
    return next((p["rope_type"] for p in by_layer_type or [parameters] if p["rope_type"] not in FIXED_ROPES), None)


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head: logits = x @ weight.T + bias, then with a cap c (Gemma 2) c * tanh(logits / c)."""

    weight: nn.Parameter  # (vocab, hidden)
    bias: nn.Parameter | None
    softcap: float | None = field(default=None)

    @classmethod
    def of(cls, model: Any) -> "Head":
        """Return the LM head of a causal LM."""
        linear = model.get_output_embeddings()
        return cls(linear.weight, linear.bias, getattr(model.config, "final_logit_softcapping", None))
