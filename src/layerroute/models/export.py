"""Leave our format: a plain Hugging Face checkpoint with LoRA merged, all blocks or one fixed route."""

import copy
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from layerroute.errors import LayerRouteError, ModelError
from layerroute.files import open_up, unwritten
from layerroute.models.attaching import RoutedModel
from layerroute.models.families import Family
from layerroute.models.loading import Backbone
from layerroute.routing.route import Route


def merged(routed: RoutedModel) -> Any:
    """Unwrap `routed` in place: return its transformers model, LoRA merged into the weights, routers left out.

    `routed` can't be used any more afterwards.
    """
    family, model = routed.family, routed.base
    blocks = family.blocks_of(model)
    for index, block in enumerate(routed.blocks):
        blocks[index] = block.block
    if hasattr(routed.inner, "merge_and_unload"):
        model = routed.inner.merge_and_unload()
    model.config.use_cache = True
    return model


def with_route(model: Any, family: Family, route: Route) -> Any:
    """Keep only the blocks that `route` runs, in place: a smaller model whose logits equal the routed one's.

    Raises:
        ModelError: the route runs no block.
    """
    kept = [index for index, runs in enumerate(route.gates) if runs]
    if not kept:
        raise ModelError("this route runs no block, so there is no model to export. Keep a block.")
    blocks = family.blocks_of(model)
    owner = family.decoder_of(model)
    owner.layers = nn.ModuleList(blocks[index] for index in kept)
    for position, block in enumerate(owner.layers):
        attention: Any = block.self_attn
        attention.layer_idx = position  # the cache is indexed by position
    model.config = _narrowed(model.config, kept)
    owner.config = model.config
    return model


def export(folder: Path, routed: RoutedModel, backbone: Backbone, route: Route | None = None) -> None:
    """Write a checkpoint that plain transformers loads, whole or not at all; with `route`, that route's smaller model.

    `routed` can't be used any more afterwards.

    Raises:
        LayerRouteError: the disk is full or the folder can't be written.
        ModelError: the route closes a block that has a bypass, for which a plain checkpoint has no place, or the
            context runs every block (scopes `response` and `continuation`), which a plain checkpoint does not.
    """
    family, scope = routed.family, routed.config.router.scope
    if route is not None and route.skipped and scope != "step":
        raise ModelError(
            f"this adapter was trained for scope {scope!r}, where the context runs every block; a plain checkpoint "
            "would skip blocks there too. Export without a route, or serve it with layerroute."
        )
    for index in routed.bypasses:
        if route is not None and not route.gates[index]:
            raise ModelError(
                f"block {index} has a bypass, which a plain checkpoint can't hold. Export without a route, or serve "
                "the adapter by LayerRoute's engine."
            )
    model = merged(routed)
    if route is not None:
        model = with_route(model, family, route)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            whole = Path(beside) / "model"
            model.save_pretrained(whole)
            backbone.tokenizer.save_pretrained(whole)
            open_up(whole)
            whole.replace(folder)
    except Exception as error:
        if (reason := unwritten(error)) is None:
            raise
        raise LayerRouteError(f"{folder}: could not be written ({reason}). Free some space or give another.") from error


def _narrowed(config: Any, kept: list[int]) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    if hasattr(config, "max_window_layers"):  # Qwen2: counts blocks from the bottom
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    return config
