"""From an adapter on disk to an engine."""

from dataclasses import replace
from pathlib import Path

import torch

from layerroute.config import Precision, dtype_of
from layerroute.inference.engine import Engine
from layerroute.inference.routers import Routers
from layerroute.inference.weights import Weights
from layerroute.models.adapter import load_adapter
from layerroute.models.attaching import RoutedModel
from layerroute.models.export import merged
from layerroute.models.loading import Backbone, load_backbone


def load_engine(
    adapter: str | Path,
    *,
    model: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    precision: Precision | None = None,
    max_rows: int = 16,
    fallback: float = 0.0,
) -> tuple[Engine, Backbone]:
    """Load an adapter into an engine, LoRA merged, and return it with its backbone's name and tokenizer.

    The backbone's `model` is None: the engine has its own copy of the weights, and needs no second.

    Args:
        adapter: a folder, the name of an adapter that comes with the package, or `hf:owner/name`.
        model: a backbone to use instead of the one the adapter names.
        dtype: what the backbone is loaded in; `auto` is bfloat16, since decoding takes as long as reading the weights.
        precision: what the engine computes in: `fp32`, `bf16`, or matrices packed into `int8` or `int4`. Takes the
            place of `dtype`.
        device: where the engine runs.
        max_rows: how many rows decode together.
        fallback: probability of the likeliest next token below which a token is run again by every block.

    Raises:
        AdapterError: a wrong backbone or a damaged adapter.
        ModelError: the backbone can't be loaded or can't be quantised.
    """
    if precision is not None:
        dtype = dtype_of(precision)
    elif dtype == "auto":
        dtype = "bfloat16"
    backbone = load_backbone(model, dtype=dtype, device=device) if model else None
    routed, backbone = load_adapter(adapter, backbone, dtype=dtype, device=device)
    return engine_of(routed, precision, max_rows, fallback), replace(backbone, model=None)


def engine_of(
    routed: RoutedModel, precision: Precision | None = None, max_rows: int = 16, fallback: float = 0.0
) -> Engine:
    """Return an engine for `routed`, whose LoRA is merged: it can't be used any more afterwards."""
    folded = [router.folded() for router in routed.routers]
    weight, bias = (torch.stack(parts).detach() for parts in zip(*folded, strict=True))
    config = routed.config.router
    bypasses = {block: (bypass.down.weight, bypass.up.weight) for block, bypass in routed.bypasses.items()}
    weights = Weights.from_model(merged(routed), precision=precision, bypasses=bypasses)
    return Engine(weights, Routers(weight, bias), config, max_rows=max_rows, fallback=fallback)
