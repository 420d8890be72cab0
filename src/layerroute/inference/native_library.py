"""The shared library of native.cpp: compiled once for this machine, then loaded."""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
from functools import lru_cache
from pathlib import Path

from layerroute.errors import LayerRouteError
from layerroute.files import replacing

SOURCE = Path(__file__).with_name("native.cpp")
HEADERS = tuple(sorted(SOURCE.parent.glob("native_*.h")))
SIGNATURES = {  # n: a number, p: a pointer, f: a float
    "decode": "nppppp",
    "room": "pp",
    "product": "npnnpnpn",
    "pack": "npnnpn",
    "normalise": "nppnnfpn",
    "turn": "nppppnnnnfn",
    "gate": "npnnnpn",
}
# -ffast-math only at the compile step: at the link step it would change the rounding mode of the whole process.
# Sums are not regrouped: a dot product would come out otherwise in every place that it is inlined.
MATHS = ("-ffast-math", "-fno-finite-math-only", "-fno-associative-math")
FLAGS = ("-O3", "-march=native", *MATHS, "-fPIC", "-fopenmp", "-std=c++17")


class Unavailable(Exception):
    """A quick decoder can't serve this model on this machine; the message says why."""


def compiled() -> ctypes.CDLL:
    """Return the library, compiling it if need be (about ten seconds, once per machine).

    Raises:
        Unavailable: there is no working compiler, or nowhere to keep what it makes.
    """
    library = _library(os.environ.get("CXX") or "g++")
    if isinstance(library, str):
        raise Unavailable(library)
    return library


def at_hand() -> ctypes.CDLL | None:
    """Return the library, or None where it is unavailable."""
    library = _library(os.environ.get("CXX") or "g++")
    return None if isinstance(library, str) else library


@lru_cache(maxsize=4)
def _library(compiler: str) -> ctypes.CDLL | str:
    try:
        path = _compiled(compiler)
    except Unavailable as reason:
        return str(reason)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} can't be loaded ({error}); delete it, or choose another folder by XDG_CACHE_HOME"
    types = {"n": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float}
    for name, arguments in SIGNATURES.items():
        function = getattr(library, f"layerroute_{name}")
        function.argtypes, function.restype = [types[one] for one in arguments], None
    library.layerroute_room.restype = ctypes.c_int64
    return library


def _compiled(compiler: str) -> Path:
    source = b"\0".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    try:
        command = shlex.split(compiler)
        version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(b"\0".join((source, version, " ".join(FLAGS).encode(), _processor()))).hexdigest()[:16]
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        library = Path(base) / "layerroute" / f"decode-{key}.so"
        if not library.exists():
            with replacing(library) as target:
                part = target.with_suffix(".o")
                subprocess.run([*command, *FLAGS, "-c", SOURCE, "-o", part], capture_output=True, check=True)
                # libgomp is not linked: torch's own copy is already loaded, and two pools would fight for the cores.
                subprocess.run([*command, "-shared", part, "-o", target], capture_output=True, check=True)
                part.unlink()
    except LayerRouteError as error:
        raise Unavailable(f"{error} XDG_CACHE_HOME chooses another") from error
    except RuntimeError as error:  # a user without a home
        raise Unavailable(f"nowhere to keep what is compiled ({error}) XDG_CACHE_HOME chooses a folder") from error
    except ValueError as error:
        raise Unavailable(f"CXX is {compiler!r}, which is no command ({error})") from error
    except OSError as error:
        raise Unavailable(f"{compiler} can't be run ({error.strerror}); install it or set CXX") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} failed: {error.stderr.decode(errors='replace').strip()[-300:]}") from error
    return library


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n")
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
