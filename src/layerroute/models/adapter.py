"""The adapter on disk: a folder with the routers, the LoRA part as plain PEFT has it, and where they belong.

layerroute.json           format version, backbone name and fingerprint, options, measured table
routers.safetensors       weight (blocks, hidden) and bias (blocks,), float32
bypasses.safetensors      with bypass.rank: N.down (rank, hidden) and N.up (hidden, rank) of each block N that has one
adapter_config.json       \\ the LoRA part; `PeftModel.from_pretrained(base, folder)` reads it
adapter_model.safetensors /
README.md                 model card
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerroute.config import AdapterConfig, build, to_dict
from layerroute.errors import AdapterError, ConfigError, LayerRouteError, ModelError
from layerroute.files import replacing, unwritten, write_json, write_text
from layerroute.models.attaching import RoutedModel, attach
from layerroute.models.card import model_card
from layerroute.models.finding import MANIFEST, find_adapter, is_adapter
from layerroute.models.loading import Backbone, load_backbone

FORMAT = 2  # 2: bypasses
ROUTERS, BYPASSES = "routers.safetensors", "bypasses.safetensors"
LORA, PEFT = "adapter_model.safetensors", "adapter_config.json"
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations of PEFT that move weight into LoRA
# What may differ in a PEFT configuration from which LoRA is taken: where it came from, how it was trained, and what its
# tensors' names say anyway. All else, what later versions add included, makes another layer of it.
FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
    "velora_config",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an adapter says about itself."""

    base: str  # the backbone's name as it was given in training
    fingerprint: str
    blocks: int
    hidden: int
    config: AdapterConfig
    measured: Mapping[str, Any]  # the evaluation summary, or empty


def save_adapter(folder: str | Path, routed: RoutedModel, backbone: Backbone) -> None:
    """Write the adapter into `folder`: all of it to a folder within, then file by file, the manifest last.

    Parts of an adapter that was there before and that this one lacks are removed.

    Raises:
        LayerRouteError: the disk is full or the folder can't be written; an adapter that was there is as before.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving") as within:
            _write_adapter(Path(within), routed, backbone)
            written = sorted(Path(within).iterdir(), key=lambda path: path.name == MANIFEST)
            for path in written:
                path.replace(folder / path.name)
        for name in {LORA, PEFT, BYPASSES} - {path.name for path in written}:  # PEFT would load them
            (folder / name).unlink(missing_ok=True)
    except Exception as error:
        if (reason := unwritten(error)) is None:
            raise
        raise LayerRouteError(f"{folder}: the adapter could not be written ({reason}). Free some space.") from error


def _write_adapter(folder: Path, routed: RoutedModel, backbone: Backbone) -> None:
    from safetensors.torch import save_file

    weights, biases = zip(*(router.folded() for router in routed.routers), strict=True)
    tensors = {
        "weight": torch.stack(weights).cpu().contiguous(),
        "bias": torch.stack(biases).cpu().contiguous(),
    }
    with replacing(folder / ROUTERS) as temporary:
        save_file(tensors, temporary)
    if routed.config.bypass.rank:
        with replacing(folder / BYPASSES) as temporary:
            save_file(bypass_tensors(routed), temporary)
    if routed.config.lora.rank:
        with replacing(folder / LORA) as temporary:
            save_file(lora_tensors(routed), temporary, metadata={"format": "pt"})
        write_json(folder / PEFT, _peft_document(routed, backbone))
    document = {
        "format": FORMAT,
        "base": backbone.name,
        "fingerprint": backbone.fingerprint,
        "blocks": len(routed.blocks),
        "hidden": tensors["weight"].shape[1],
        "config": to_dict(routed.config),
        "measured": {},
    }
    write_text(folder / "README.md", model_card(document))
    write_json(folder / MANIFEST, document)


def save_measured(folder: Path, measured: Mapping[str, Any]) -> None:
    """Write an evaluation into the manifest and the card of the adapter in `folder`; all else stays as it is.

    The wrong answers that a report shows stay out of it: they quote transcripts, and an adapter is made to be shared.

    Raises:
        AdapterError: no adapter there, or a damaged one.
    """
    path, config = folder / MANIFEST, read_manifest(folder).config
    tasks = {
        task: {key: value for key, value in row.items() if key != "examples"}
        for task, row in measured.get("tasks", {}).items()
    }
    document = json.loads(path.read_text(encoding="utf-8")) | {"measured": dict(measured) | {"tasks": tasks}}
    write_json(path, document)
    write_text(folder / "README.md", model_card(document | {"config": to_dict(config)}))  # an older one lacks options


def read_manifest(name: str | Path) -> Manifest:
    """Read what an adapter (`find_adapter`) says about itself; no weights are read.

    Raises:
        AdapterError: no adapter there, or one of a newer format.
    """
    folder = find_adapter(name)
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] > FORMAT:
            raise AdapterError(f"{path}: format {document['format']} is newer than {FORMAT}. Upgrade layerroute.")
        config = build(AdapterConfig, document["config"])
        return Manifest(
            document["base"],
            document["fingerprint"],
            document["blocks"],
            document["hidden"],
            config,
            dict(document["measured"]),
        )
    except FileNotFoundError:
        raise AdapterError(f"{folder}: no adapter here ({MANIFEST} is missing).") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise AdapterError(
            f"{path}: damaged ({type(error).__name__}: {error}). Save or fetch the adapter again."
        ) from error


def bypassed_blocks(name: str | Path) -> tuple[int, ...]:
    """Return the blocks of an adapter that have a bypass, in order; no weights are read.

    Raises:
        AdapterError: no adapter there, or its bypasses are missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    folder = find_adapter(name)
    if not read_manifest(folder).config.bypass.rank:
        return ()
    try:
        with safe_open(folder / BYPASSES, "pt") as file:
            names = file.keys()
        return tuple(sorted({int(name.partition(".")[0]) for name in names}))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{folder / BYPASSES}: missing or damaged ({error}). Save or fetch it again.") from error


def load_adapter(
    name: str | Path, backbone: Backbone | None = None, *, dtype: str = "auto", device: str = "cpu"
) -> tuple[RoutedModel, Backbone]:
    """Attach an adapter to `backbone`, or to the backbone that it names.

    Args:
        name: a folder, the name of an adapter that comes with the package, or `hf:owner/name`.
        backbone: what to attach to.
        dtype: precision of the backbone that the adapter names.
        device: where that one is loaded.

    Raises:
        AdapterError: no such adapter, a wrong backbone, or a missing or truncated file.
        ModelError: the backbone that it names can't be loaded.
    """
    folder = find_adapter(name)
    manifest = read_manifest(folder)
    routers = _read_tensors(folder / ROUTERS)
    lora = _read_tensors(folder / LORA) if manifest.config.lora.rank else {}
    bypasses = _read_tensors(folder / BYPASSES) if manifest.config.bypass.rank else {}
    if backbone is None:
        try:
            backbone = load_backbone(manifest.base, dtype=dtype, device=device)
        except ModelError as error:
            raise ModelError(f"{error} Name a copy of the weights that {name} fits with --model.") from error
    _check_backbone(folder, manifest, backbone)
    routed = attach(backbone.model, manifest.config)
    restore(routed, routers, lora, bypasses, folder)
    return routed.eval(), backbone


@torch.no_grad()
def restore(
    routed: RoutedModel,
    routers: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    bypasses: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Copy saved routers, LoRA tensors and bypasses into a freshly attached model.

    Raises:
        AdapterError: names or shapes do not fit.
    """
    shape = (len(routed.routers), routed.routers[0].score.in_features)
    if set(routers) != {"weight", "bias"} or routers["weight"].shape != shape or routers["bias"].shape != shape[:1]:
        raise AdapterError(f"{folder / ROUTERS}: expected weight {shape} and bias {shape[:1]}. Save the adapter again.")
    for router, weight, bias in zip(routed.routers, routers["weight"], routers["bias"], strict=True):
        router.shift.zero_()
        router.scale.fill_(1.0)
        router.score.weight.copy_(weight[None])
        router.score.bias.copy_(bias[None])
    _restore_bypasses(routed, bypasses, folder)
    _restore_lora(routed, lora, folder)


def _restore_bypasses(routed: RoutedModel, bypasses: Mapping[str, Tensor], folder: Path) -> None:
    odd = set(bypasses)
    for index in range(len(routed.blocks)):
        own = _bypass_parameters(routed, index)
        if own.keys() & bypasses.keys():
            if any(name not in bypasses or bypasses[name].shape != tensor.shape for name, tensor in own.items()):
                break
            for name, tensor in own.items():
                tensor.copy_(bypasses[name])
            odd -= own.keys()
    if odd:
        raise AdapterError(
            f"{folder / BYPASSES}: {min(odd)!r} has no counterpart, another shape than (rank, hidden), or no block. "
            "Save or fetch the adapter again."
        )


def bypass_tensors(routed: RoutedModel) -> dict[str, Tensor]:
    """Return the bypasses that change anything, float32 on CPU, under the names they are saved by."""
    return {
        name: tensor.detach().float().cpu().contiguous().clone()
        for index in routed.bypasses
        for name, tensor in _bypass_parameters(routed, index).items()
    }


def _bypass_parameters(routed: RoutedModel, block: int) -> dict[str, Tensor]:
    bypass = routed.blocks[block].bypass
    return {} if bypass is None else {f"{block}.down": bypass.down.weight, f"{block}.up": bypass.up.weight}


def start_from(name: str | Path, routed: RoutedModel, backbone: Backbone) -> None:
    """Copy the LoRA part of `name` into a freshly attached model.

    Args:
        name: an adapter (`find_adapter`), or a folder that plain PEFT saved.
        routed: what it is copied into.
        backbone: what that was attached to.

    Raises:
        AdapterError: no LoRA there, or one of another backbone or another shape.
    """
    folder = find_adapter(name)
    if not routed.config.lora.rank:
        raise AdapterError(f"{folder}: this run has no LoRA that could begin there. Give --lora.rank.")
    if is_adapter(folder):
        _check_backbone(folder, read_manifest(folder), backbone)
    lora = _read_tensors(folder / LORA)
    try:
        theirs = json.loads((folder / PEFT).read_text(encoding="utf-8"))
        if not isinstance(theirs, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{folder / PEFT}: missing or damaged ({error}). Save or fetch the adapter again."
        ) from error
    ours = _peft_document(routed, backbone)
    if str(theirs.get("init_lora_weights")).startswith(CHANGE_BASE):
        raise AdapterError(
            f"{folder / PEFT}: init_lora_weights {theirs['init_lora_weights']!r} changed the backbone it was trained "
            "on. Begin with plain LoRA."
        )
    flags = {"r": "--lora.rank", "lora_alpha": "--lora.alpha"}
    for key in sorted(theirs.keys() - FREE):
        their, our = theirs[key], ours.get(key)
        if their != our and (their or our):  # None, false and {} all say no
            remedy = f"Give {flags[key]} {their}" if key in flags else "Begin with plain LoRA"
            raise AdapterError(f"{folder / PEFT}: {key} is {their}, {our} in this run. {remedy}.")
    _restore_lora(routed, lora, folder)


@torch.no_grad()
def _restore_lora(routed: RoutedModel, lora: Mapping[str, Tensor], folder: Path) -> None:
    own = _lora_parameters(routed)
    if own.keys() != lora.keys():
        odd = sorted(own.keys() ^ lora.keys())[0]
        raise AdapterError(
            f"{folder / LORA}: tensor {odd!r} is missing or unknown. It has another lora.targets than "
            f"{routed.config.lora.targets!r}, or is damaged: then save it again."
        )
    for name, parameter in own.items():
        if parameter.shape != lora[name].shape:
            raise AdapterError(
                f"{folder / LORA}: {name!r} has shape {tuple(lora[name].shape)}, not {tuple(parameter.shape)}."
            )
        parameter.copy_(lora[name])


def _check_backbone(folder: Path, manifest: Manifest, backbone: Backbone) -> None:
    if (found := backbone.fingerprint) != manifest.fingerprint:
        raise AdapterError(
            f"{folder}: made for {manifest.base!r} (fingerprint {manifest.fingerprint}), but {backbone.name!r} has "
            f"fingerprint {found}. Give the backbone it was trained on with --model."
        )


def lora_tensors(routed: RoutedModel) -> dict[str, Tensor]:
    """Return the LoRA weights under the names plain PEFT uses, float32 on CPU."""
    return {name: p.detach().float().cpu().contiguous().clone() for name, p in _lora_parameters(routed).items()}


def _lora_parameters(routed: RoutedModel) -> dict[str, torch.nn.Parameter]:
    """Map PEFT's saved names to the parameters: without our wrapper's `.block.` and the adapter's name."""
    return {
        name.removeprefix("inner.").replace(".block.", ".").replace(".default.", "."): parameter
        for name, parameter in routed.named_parameters()
        if ".lora_" in name
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise AdapterError(f"{path}: missing, so the adapter is incomplete. Save or fetch it again.") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: truncated or damaged ({error}). Save or fetch the adapter again.") from error
    return tensors


def _peft_document(routed: RoutedModel, backbone: Backbone) -> dict[str, Any]:
    document = dict(routed.inner.peft_config["default"].to_dict())
    document |= {"base_model_name_or_path": backbone.name, "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in document.items()}
