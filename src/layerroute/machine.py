"""What this machine is: for bug reports, and beside every measurement."""

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from layerroute.config import BATCH_TOKENS

PACKAGES = ("layerroute", "torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "gguf")


def describe_machine() -> dict[str, Any]:
    """Return versions, processor and memory, ready for JSON."""
    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts |= {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return facts


def multiplies_bfloat16(device: str) -> bool:
    """Return whether `device` has instructions for products of bfloat16.

    Elsewhere torch multiplies bfloat16 several times slower than float32.
    """
    if device.startswith("cuda"):
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(_flags()))


def default_device() -> Literal["cuda", "cpu"]:
    """Return where to compute if nobody says. `CUDA_VISIBLE_DEVICES=` in the environment hides a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def batch_tokens_for(device: str) -> int:
    """Return how many tokens to measure at once in there: few for a processor's cache, many to fill a GPU."""
    return BATCH_TOKENS if device == "cpu" else 4 * BATCH_TOKENS


def dtype_for(device: str) -> Literal["bfloat16", "float32"]:
    """Return what to compute in there if nobody says: bfloat16 where it is quick, else float32."""
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


@lru_cache(maxsize=1)
def _flags() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    return tuple(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def commit() -> str | None:
    """Return the commit of the package's own source tree, `+` after it if files differ; None outside git."""
    source = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source.parent), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", source.name) is None:  # installed: another project's repository at most
        return None
    name, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    return None if name is None else name + ("+" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    extras = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16") if name in _flags()]
    return f"{names[0] if names else platform.machine()} ({', '.join(extras) or 'no AVX2'})"
