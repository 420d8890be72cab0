"""What a step costs: FLOPs and weight bytes from a transformers config alone; no weights are needed.

Conventions: a multiply-add is 2 FLOPs; matrix products only (no norms, activations, rotary positions); LoRA is
merged. Attention counts the full QK^T and its product with V over all tokens, as `torch.utils.flop_counter`
counts scaled dot-product attention: neither the causal half nor a sliding window is taken off. The LM head
runs once for each response token. A skipped block still owes its keys and values to later steps, so filling
them is counted (`kv_fill`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerroute.config import AdapterConfig, Scope
from layerroute.routing.route import Route

Gates = Route | Sequence[bool]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that cost anything."""

    blocks: int
    hidden: int
    queries: int  # width of all query heads
    keys: int  # width of all key heads; values are as wide
    inner: int  # width of the MLP
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read the sizes from a transformers config of a supported family."""
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            heads * width,
            groups * width,
            config.intermediate_size,
            config.vocab_size,
        )

    @property
    def key_values(self) -> int:
        """Weights of a block's key and value projections."""
        return 2 * self.hidden * self.keys

    @property
    def block(self) -> int:
        """Weights of a block's seven projections (Q, K, V, O and the gated MLP's three)."""
        return 2 * self.hidden * self.queries + self.key_values + 3 * self.hidden * self.inner

    @property
    def head(self) -> int:
        """Weights of the LM head."""
        return self.hidden * self.vocabulary

    def bypass(self, rank: int) -> int:
        """Weights of a bypass of `rank`."""
        return 2 * rank * self.hidden

    def block_flops(self, tokens: int) -> int:
        """FLOPs of one block over a sequence of `tokens`."""
        return 2 * self.block * tokens + 4 * self.queries * tokens**2


def step_flops(
    config: Any, context: int, response: int, gates: Gates, scope: Scope = "step", bypass: int = 0
) -> dict[str, float]:
    """Return the FLOPs of one step under a route, by part, and their total.

    Args:
        config: a transformers config.
        context: context tokens.
        response: response tokens.
        gates: the route, or one bool a block (True runs).
        scope: what a closed block skips: the whole step, its response, or all of that but its first token.
        bypass: the rank of what stands in for a closed block.
    """
    shape = Shape.of(config)
    runs = gates.gates if isinstance(gates, Route) else gates
    if len(runs) != shape.blocks:
        raise ValueError(f"{len(runs)} gates for {shape.blocks} blocks")
    opened = sum(bool(gate) for gate in runs)
    closed = shape.blocks - opened
    owed = tokens_skipped(context, response, scope)
    kept = context + response - owed
    parts = {
        "blocks": float(opened * shape.block_flops(context + response) + closed * shape.block_flops(kept)),
        "bypasses": float(closed * 2 * shape.bypass(bypass) * owed),
        "kv_fill": float(closed * 2 * shape.key_values * owed),
        "routers": float(2 * shape.hidden * shape.blocks),
        "head": float(2 * shape.head * response),
    }
    return parts | {"total": sum(parts.values())}


def tokens_skipped(context: int, response: int, scope: Scope) -> int:
    """Return how many tokens of a step a closed block skips, each token of the response counted as run once."""
    return {"step": context + response, "response": response, "continuation": max(response - 1, 0)}[scope]


def weight_bytes_per_token(
    config: Any, gates: Gates, bytes_per_weight: float = 2.0, bypass: int = 0
) -> dict[str, float]:
    """Return the weight bytes read to decode one token of one sequence: open blocks, bypasses of rank `bypass` of
    closed ones, the LM head, their total.

    Routers are not read: the route is fixed by then. Keys and values of closed blocks are filled when a later
    step needs them, all tokens at once, so they are not read either. Norms and biases (below 0.1 %) are left out.
    """
    shape = Shape.of(config)
    runs = gates.gates if isinstance(gates, Route) else gates
    parts = {
        "blocks": sum(bool(gate) for gate in runs) * shape.block * bytes_per_weight,
        "bypasses": sum(not gate for gate in runs) * shape.bypass(bypass) * bytes_per_weight,
        "head": shape.head * bytes_per_weight,
    }
    return parts | {"total": sum(parts.values())}


def parameter_counts(config: Any, adapter: AdapterConfig, bypassed: int | None = None) -> dict[str, int]:
    """Count parameters: `routers`, `lora`, `bypasses`, their `total`, the frozen `backbone`; on the meta device.

    Bypasses are counted at `bypassed` blocks; without it at every block, as training begins.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from layerroute.models.attaching import attach

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    backbone = sum(parameter.numel() for parameter in model.parameters())
    routed = attach(model, adapter)
    routers = sum(parameter.numel() for router in routed.routers for parameter in router.parameters())
    lora = sum(parameter.numel() for name, parameter in routed.named_parameters() if ".lora_" in name)
    bypasses = sum(parameter.numel() for name, parameter in routed.named_parameters() if ".bypass." in name)
    if bypassed is not None:
        bypasses = bypasses // len(routed.blocks) * bypassed
    total = routers + lora + bypasses
    return {"routers": routers, "lora": lora, "bypasses": bypasses, "total": total, "backbone": backbone}
