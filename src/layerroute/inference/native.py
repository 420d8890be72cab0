"""Decoding in one native call per token: compiles native.cpp once and hands it pointers. Torch is the fallback."""

import ctypes
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from layerroute.files import replacing
from layerroute.inference.requests import Row
from layerroute.inference.weights import Block, Weights

SOURCE = Path(__file__).with_suffix(".cpp")
# -ffast-math only at the compile step: at the link step it would change the rounding mode of the whole process.
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp", "-std=c++17")
ROWS = 64
LANES = 32
POINTERS = (
    *("norm_attention", "qkv", "qkv_bias", "query_norm", "key_norm", "out", "out_bias"),
    *("norm_mlp", "gate_up", "gate_up_bias", "down", "down_bias"),
)


class Unavailable(Exception):
    """The native decoder can't serve this model on this machine; the message says why."""


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("blocks", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("intermediate", "vocab", "gelu")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*POINTERS, "cos", "sin")),
        ("window", ctypes.c_int64),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "capacity", "runs")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "owed", "owed_start")),
    )


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "wide", "normed", "fused", "scores", "logits")),
        ("longest", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class NativePlan:
    """The pointers of some rows. Holds the tensors behind them; good until the rows' caches grow."""

    def __init__(self, rows: Sequence[Row], weights: Weights) -> None:
        shape = weights.shape
        self.rows = tuple(rows)
        self.kept = [[block for block, runs in enumerate(row.route) if runs] for row in rows]
        pieces = [[cache.writing(block) for block in range(shape.blocks)] for cache in (row.cache for row in rows)]
        self.owed = [{id(piece): piece for piece in row if piece}.values() for row in pieces]
        sides = [(row.cache.keys, row.cache.values) for row in rows]
        self.tensors = [*sides, pieces]
        self.ids, self.positions = (torch.zeros(len(rows), dtype=torch.int64) for _ in "ip")
        self.capacity = torch.tensor([row.cache.capacity for row in rows])
        self.runs = torch.tensor([row.route for row in rows], dtype=torch.uint8)
        self.keys, self.values = (
            torch.tensor([[_address(t) if runs else 0 for t, runs in zip(side[n], row.route, strict=True)]
                          for side, row in zip(sides, rows, strict=True)]) for n in (0, 1)
        )  # fmt: skip
        self.residuals = torch.tensor([[_address(p.residual) if p else 0 for p in row] for row in pieces])
        self.starts = torch.tensor([next((p.start for p in row if p), 0) for row in pieces])
        self.longest = int(self.capacity.max())
        self.struct = _Rows(len(rows), *(
            tensor.data_ptr()
            for tensor in (self.ids, self.positions, self.capacity, self.runs, self.keys, self.values)
        ), self.residuals.data_ptr(), self.starts.data_ptr())  # fmt: skip


class NativeDecoder:
    """Runs one token of several rows in one call.

    Raises:
        Unavailable: no compiler, another dtype or device, or a family whose block the kernel doesn't know.
    """

    name = "native"

    def __init__(self, weights: Weights) -> None:
        if reason := unfit(weights):
            raise Unavailable(reason)
        self.weights = weights
        self._library = ctypes.CDLL(str(compiled()))
        self._decode = self._library.layerroute_decode
        self._decode.restype = None
        shape = weights.shape
        self._shape = _Shape(
            shape.blocks, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate, shape.vocab,
            int(shape.activation != "silu"), shape.eps, shape.scale,
        )  # fmt: skip
        self._length = 0
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._blocks = (_Block * shape.blocks)()
        self._room = (0, 0, 0)
        self._work = _Work()
        self._buffers: dict[str, Tensor] = {}

    def plan(self, rows: Sequence[Row]) -> NativePlan:
        """Gather the pointers of `rows`, which must have begun their response."""
        plan = NativePlan(rows, self.weights)
        if plan.longest > self._length:
            self._point(plan.longest)
        return plan

    def decode(self, plan: NativePlan, ids: Sequence[int]) -> Tensor:
        """Run one token of each row of `plan`.

        Effects: the rows' caches grow by one token.

        Returns:
            Next-token scores (rows, vocab) float32, valid until the next call.
        """
        for number, (row, token) in enumerate(zip(plan.rows, ids, strict=True)):
            plan.ids[number], plan.positions[number] = token, row.cache.length
        self._make_room(len(plan.rows), plan.longest, torch.get_num_threads())
        head, bias = self.weights.head, self.weights.head_bias
        self._decode(
            ctypes.byref(self._shape),
            self._blocks,
            *(ctypes.c_void_p(t.data_ptr()) for t in (self.weights.embedding, self.weights.norm, head)),
            ctypes.c_void_p(_address(bias)),
            ctypes.byref(plan.struct),
            ctypes.byref(self._work),
        )
        for row, kept, owed in zip(plan.rows, plan.kept, plan.owed, strict=True):
            row.cache.ran(kept)
            for piece in owed:
                piece.count += 1
            row.cache.advance(1)
        return self._buffers["logits"][: len(plan.rows)]

    def _point(self, length: int) -> None:
        tables = [rope.table(length) for rope in self.weights.ropes]
        self._tables = [(cos.float().contiguous(), sin.float().contiguous()) for cos, sin in tables]
        self._length = min(cos.shape[0] for cos, _ in self._tables)
        for slot, block in zip(self._blocks, self.weights.blocks, strict=True):
            for name in POINTERS:
                setattr(slot, name, _address(getattr(block, name)) or None)
            cos, sin = self._tables[block.rope]
            slot.cos, slot.sin, slot.window = cos.data_ptr(), sin.data_ptr(), block.window or 0

    def _make_room(self, rows: int, longest: int, threads: int) -> None:
        if all(have >= want for have, want in zip(self._room[:2], (rows, longest), strict=True)) and (
            self._room[2] == threads
        ):
            return
        rows, longest = max(rows, self._room[0]), max(longest, self._room[1])
        shape = self.weights.shape
        widest = max(shape.hidden, shape.query_size, shape.intermediate)
        sizes = {
            "x": ((rows, shape.hidden), torch.float32),
            "wide": ((rows, widest), torch.bfloat16),
            "normed": ((threads, rows, shape.hidden), torch.bfloat16),
            "fused": ((rows, shape.query_size + 2 * shape.kv_size), torch.float32),
            "scores": ((threads, longest), torch.float32),
            "logits": ((rows, shape.vocab), torch.float32),
        }
        self._buffers = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes.items()}
        self._work = _Work(*(tensor.data_ptr() for tensor in self._buffers.values()), longest, threads)
        self._room = (rows, longest, threads)


def unfit(weights: Weights) -> str:
    """Return why the kernel can't run `weights`, or nothing if it can."""
    shape = weights.shape
    plain = all(b.norm_after_attention is None and b.norm_after_mlp is None for b in weights.blocks)
    widths = (shape.hidden, shape.head_dim, shape.query_size, shape.intermediate)
    checks = {
        f"the weights are {weights.dtype}, the kernel takes torch.bfloat16": weights.dtype == torch.bfloat16,
        f"the weights are on {weights.device}, the kernel runs on cpu": weights.device.type == "cpu",
        f"the kernel has no block for {shape.family}": plain and not shape.gain_in_float and shape.logit_cap is None,
        f"a width of the model is not a multiple of {LANES}": all(width % LANES == 0 for width in widths),
        "a head is wider than 512": shape.head_dim <= 512,
        "only a part of each head is rotated": all(2 * r.cos.shape[1] == shape.head_dim for r in weights.ropes),
        "matrices are not contiguous": all(m.is_contiguous() for b in weights.blocks for m in _matrices(b)),
    }
    return next((reason for reason, holds in checks.items() if not holds), "")


def compiled() -> Path:
    """Return the shared library for this machine, compiling it if need be (about three seconds, once).

    Raises:
        Unavailable: there is no working compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    source = SOURCE.read_bytes()
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(b"\0".join((source, version, " ".join(FLAGS).encode(), _processor()))).hexdigest()[:16]
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        library = Path(base) / "layerroute" / f"decode-{key}.so"
        if not library.exists():
            with replacing(library) as target:
                part = target.with_suffix(".o")
                subprocess.run([compiler, *FLAGS, "-c", SOURCE, "-o", part], capture_output=True, check=True)
                # libgomp is not linked: torch's own copy is already loaded, and two pools would fight for the cores.
                subprocess.run([compiler, "-shared", part, "-o", target], capture_output=True, check=True)
                part.unlink()
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrices(block: Block) -> tuple[Tensor, ...]:
    return block.matrices
