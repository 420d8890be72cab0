"""Load a backbone: a hub id, a local folder, a GGUF file, or the embedded default."""

import hashlib
import json
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from layerroute.errors import LayerRouteError, ModelError, near
from layerroute.files import expanded
from layerroute.machine import dtype_for
from layerroute.models import embedded
from layerroute.models.families import family_of
from layerroute.models.spelling import spell_unlearned

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Names in a multimodal checkpoint's files, of its language model alone: as they were and as they are saved.
TEXT_PART = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
ADDED = ("lora_", "router.", "bypass.")  # in the names of what is attached
WAYS = f"a hub id (owner/name), a folder, a .gguf file, or the embedded default {embedded.NAME!r}"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen causal LM and its tokenizer."""

    name: str  # as the user gave it
    model: Any  # None where an engine holds its weights
    tokenizer: Any
    spelt: tuple[str, ...] = ()  # text tokens that it never learned, which its tokenizer spells in pieces

    @property
    def fingerprint(self) -> str:
        """Identify the weights, whatever dtype they are held in."""
        return fingerprint(self.model)


def load_backbone(name: str, *, dtype: str = "auto", device: str = "cpu") -> Backbone:
    """Load weights and tokenizer; text tokens that the backbone never learned are spelt out (`spelling`).

    Args:
        name: a hub id, a folder, a .gguf file, or `smollm2`.
        dtype: `bfloat16`, `float32`, or `auto`: bfloat16 where the device is quick at it, else float32.
        device: a torch device.

    Raises:
        ModelError: nothing of that name, the hub can't be reached, an unsupported family, weights that are missing or
            don't fit the configuration, or no such device here.
    """
    from transformers import AutoModelForCausalLM

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ModelError(f"device {device!r} can't be used ({error}). Give cpu, or cuda where there is one.") from error
    if dtype == "auto":
        dtype = dtype_for(device)
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown.{near(dtype, DTYPES)}")
    source = resolve(name)
    cached = only_cached(source)
    with _loading(name):
        config, multimodal = _config(source, cached)
        family_of(config)
        tokenizer = _tokenizer(source, cached)
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=DTYPES[dtype],
            local_files_only=cached,
            key_mapping=TEXT_PART if multimodal else None,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{name}: {len(missing)} of the model's tensors are not in its files, {missing[0]!r} among them; "
            "they would be random. Fetch it again, or give another checkpoint."
        )
    spelt = spell_unlearned(tokenizer, model.get_output_embeddings().weight)
    return Backbone(name, model.to(device).eval(), tokenizer, spelt)


def load_config(name: str) -> Any:
    """Load the configuration alone: no weights are read. A folder with just a config.json will do.

    Raises:
        ModelError: as for `load_backbone`.
    """
    source = resolve(name)
    with _loading(name):
        config = _config(source, only_cached(source))[0]
    family_of(config)
    return config


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer alone, as it is: what a backbone never learned is not spelt out, which takes its weights.

    Raises:
        ModelError: as for `load_backbone`.
    """
    source = resolve(name)
    with _loading(name):
        return _tokenizer(source, only_cached(source))


def resolve(name: str) -> str:
    """Return what transformers can load: a folder, or the hub id as it is."""
    if name == embedded.NAME:
        return str(embedded.dequantised(embedded.embedded_gguf(), embedded.SHA256))
    path = expanded(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such file.")
        return str(embedded.dequantised(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: this folder has no config.json, so it is no Hugging Face model.")
        return str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such model. Give {WAYS}.")
    return name


def fingerprint(model: Any) -> str:
    """Return 16 hex digits of a sample of the backbone's weights: four rows of the embedding and of three blocks.

    It tells backbones and quantisations of one apart, whatever dtype they are held in; it is no check of the files.
    """
    config = model.config
    family = family_of(config)
    blocks = family.blocks_of(model)
    digest = hashlib.sha256(
        json.dumps([config.model_type, len(blocks), config.hidden_size, config.vocab_size]).encode()
    )
    tensors = [model.get_input_embeddings().weight]
    for block in (blocks[0], blocks[len(blocks) // 2], blocks[-1]):
        tensors += [p for n, p in sorted(block.named_parameters()) if not any(part in n for part in ADDED)]
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        if tensor.device.type != "meta":
            sample = tensor.detach()[:4].to(torch.bfloat16).contiguous().cpu()
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def only_cached(source: str) -> bool:
    """Return whether to look in the local cache alone, because the hub does not answer.

    Asking first takes a moment; letting the hub's client find out takes half a minute of retries.
    """
    if Path(source).is_dir() or urllib.request.getproxies():
        return False
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=3).close()
    except OSError:
        return True
    return False


def _config(source: str, cached: bool) -> tuple[Any, bool]:
    """Return the language model's options, and whether they are one part of a multimodal checkpoint's (Gemma 3)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=cached)
    text = getattr(config, "text_config", None)
    return (config, False) if text is None else (text, True)


def _tokenizer(source: str, cached: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=cached)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one where files lack
        raise ModelError(f"{source}: it has no tokenizer (tokenizer.json and the like). Save its own beside it.")
    return tokenizer


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except LayerRouteError:
        raise
    except Exception as error:  # whatever transformers meets in files that are not as it expects
        raise _unloadable(name, error) from error


def _unloadable(name: str, error: Exception) -> ModelError:
    local = expanded(name).exists() or name == embedded.NAME
    if local or not isinstance(error, (OSError, ValueError)):  # what the hub's client raises
        return ModelError(f"{name}: transformers can't load this model ({type(error).__name__}: {error}).")
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return ModelError(
        f"{name}: the model hub can't be reached or has no such model, and no copy is cached ({reason}). "
        f"Work offline with a folder, a .gguf file, or the embedded default {embedded.NAME!r}."
    )
