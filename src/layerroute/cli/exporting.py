"""`layerroute export`."""

from pathlib import Path

from layerroute.cli.generating import read_route
from layerroute.config import KINDS
from layerroute.data.rendering import Renderer
from layerroute.errors import ConfigError, near
from layerroute.models.adapter import Manifest, load_adapter, read_manifest
from layerroute.models.export import export
from layerroute.models.loading import load_backbone
from layerroute.routing.route import Route


def export_adapter(
    adapter: str, output: Path, *, skip: str | None, kind: str | None, model: str | None, dtype: str
) -> None:
    """Write the checkpoint: all blocks, the blocks `skip` leaves, or those that `kind` runs most.

    Raises:
        ConfigError: both routes given, an unknown kind, or an output folder that is not empty.
    """
    if skip is not None and kind is not None:
        raise ConfigError("--skip and --kind both name a route; give one of them.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: not an empty folder. Give a new one.")
    manifest = read_manifest(adapter)
    route = read_route(skip, manifest.blocks) if kind is None else _usual_route(adapter, manifest, kind)
    backbone = load_backbone(model, dtype=dtype) if model else None
    routed, backbone = load_adapter(adapter, backbone, dtype=dtype)
    backbone.tokenizer.chat_template = Renderer(backbone.tokenizer).chat_template  # servers see what was trained on
    export(output, routed, backbone, route)


def _usual_route(adapter: str, manifest: Manifest, kind: str) -> Route:
    if kind not in KINDS:
        raise ConfigError(f"--kind: {kind!r} is unknown.{near(kind, KINDS)}")
    measured = manifest.measured.get("kinds", {}).get(kind)
    if not measured or None in measured["run_rate"]:
        raise ConfigError(f"{adapter}: no {kind} step measured yet. Run: layerroute evaluate {adapter} --save")
    return Route(tuple(rate >= 0.5 for rate in measured["run_rate"]))
