"""Decoding in one native call per token: hands pointers to the kernel of native.cpp. Torch is the fallback."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from layerroute.inference.native_library import Unavailable, compiled
from layerroute.inference.quantised import CMatrix, Matrix, Quantised
from layerroute.inference.requests import Row
from layerroute.inference.weights import BITS, Weights

ROWS = 64
LANES, LINE = 32, 64
DTYPES = (torch.float32, torch.bfloat16)
HEAD_DIMS = (32, 64, 96, 128, 256)
MATRICES = ("qkv", "out", "gate_up", "down")
BYPASS = ("down", "up")
VECTORS = (
    *("norm_attention", "qkv_bias", "query_norm", "key_norm"),
    *("out_bias", "norm_mlp", "gate_up_bias", "down_bias"),
)


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("blocks", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("intermediate", "vocab", "gelu", "bypass")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, CMatrix) for name in (*MATRICES, *(f"bypass_{name}" for name in BYPASS))),
        *((name, ctypes.c_void_p) for name in (*VECTORS, "cos", "sin")),
        ("window", ctypes.c_int64),
    )


class _Ends(ctypes.Structure):
    _fields_ = (("embedding", CMatrix), ("head", CMatrix), ("norm", ctypes.c_void_p), ("head_bias", ctypes.c_void_p))


class _Rows(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "capacity", "runs")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "owed", "owed_start")),
    )


class _Room(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scratch", "logits", "entered")),
        *((name, ctypes.c_int64) for name in ("rows", "longest", "threads")),
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
            torch.tensor([[address(t) if runs else 0 for t, runs in zip(side[n], row.route, strict=True)]
                          for side, row in zip(sides, rows, strict=True)]) for n in (0, 1)
        )  # fmt: skip
        self.residuals = torch.tensor([[address(p.residual) if p else 0 for p in row] for row in pieces])
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

    name, note = "native", "compiled for this machine"

    def __init__(self, weights: Weights) -> None:
        if reason := unfit(weights):
            raise Unavailable(reason)
        self.weights = weights
        self._library = compiled()
        shape = weights.shape
        self._bits = BITS.get(weights.precision or "", 8 * weights.dtype.itemsize)
        self._shape = _Shape(
            shape.blocks, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate, shape.vocab,
            int(shape.activation != "silu"), max(len(b.bypass.down) if b.bypass else 0 for b in weights.blocks),
            shape.eps, shape.scale,
        )  # fmt: skip
        self._ends = _Ends(
            _pointers(weights.embedding), _pointers(weights.head), address(weights.norm), address(weights.head_bias)
        )
        self._length = 0
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._blocks = (_Block * shape.blocks)()
        self._room = _Room()
        self._scratch = self._logits = torch.empty(0)

    def plan(self, rows: Sequence[Row]) -> NativePlan:
        """Gather the pointers of `rows`, whose caches must have room for the blocks of their routes."""
        plan = NativePlan(rows, self.weights)
        if plan.longest > self._length:
            self._point(plan.longest)
        return plan

    def decode(self, plan: NativePlan, ids: Sequence[int], entered: Tensor | None = None) -> Tensor:
        """Run one token of each row of `plan`.

        Effects: the rows' caches grow by one token; `entered` (blocks, rows, hidden) float32, contiguous, is set.

        Returns:
            Next-token scores (rows, vocab) float32, valid until the next call.
        """
        for number, (row, token) in enumerate(zip(plan.rows, ids, strict=True)):
            plan.ids[number], plan.positions[number] = token, row.cache.length
        self._make_room(len(plan.rows), plan.longest, torch.get_num_threads())
        assert entered is None or (entered.dtype == torch.float32 and entered.is_contiguous())
        self._room.entered = address(entered) or None
        self._library.layerroute_decode(
            self._bits,
            ctypes.byref(self._shape),
            self._blocks,
            ctypes.byref(self._ends),
            ctypes.byref(plan.struct),
            ctypes.byref(self._room),
        )
        for row, kept, owed in zip(plan.rows, plan.kept, plan.owed, strict=True):
            row.cache.ran(kept)
            for piece in owed:
                piece.count += 1
            row.cache.advance(1)
        return self._logits[: len(plan.rows)]

    def _point(self, length: int) -> None:
        tables = [rope.table(length) for rope in self.weights.ropes]
        self._tables = [(cos.float().contiguous(), sin.float().contiguous()) for cos, sin in tables]
        self._length = min(cos.shape[0] for cos, _ in self._tables)
        for slot, block in zip(self._blocks, self.weights.blocks, strict=True):
            for name in MATRICES:
                setattr(slot, name, _pointers(getattr(block, name)))
            for name in BYPASS if block.bypass else ():
                setattr(slot, f"bypass_{name}", _pointers(getattr(block.bypass, name)))
            for name in VECTORS:
                setattr(slot, name, address(getattr(block, name)) or None)
            cos, sin = self._tables[block.rope]
            slot.cos, slot.sin, slot.window = cos.data_ptr(), sin.data_ptr(), block.window or 0

    def _make_room(self, rows: int, longest: int, threads: int) -> None:
        room = self._room
        if rows <= room.rows and longest <= room.longest and threads == room.threads:
            return
        room.rows, room.longest, room.threads = max(rows, room.rows), max(longest, room.longest), threads
        size = self._library.layerroute_room(ctypes.byref(self._shape), ctypes.byref(room))
        self._scratch = torch.zeros(size + LINE, dtype=torch.uint8)
        self._logits = torch.empty(room.rows, self.weights.shape.vocab, dtype=torch.float32)
        room.scratch = -(-self._scratch.data_ptr() // LINE) * LINE
        room.logits = self._logits.data_ptr()


def unfit(weights: Weights) -> str:
    """Return why the kernel can't run `weights`, or nothing if it can."""
    shape = weights.shape
    plain = all(b.norm_after_attention is None and b.norm_after_mlp is None for b in weights.blocks)
    widths = (shape.hidden, shape.head_dim, shape.query_size, shape.intermediate)
    checks = {
        f"the weights are {weights.dtype}, the kernel takes {' and '.join(map(str, DTYPES))}": weights.dtype in DTYPES,
        f"the weights are on {weights.device}, the kernel runs on cpu": weights.device.type == "cpu",
        f"the kernel has no block for {shape.family}": plain and not shape.gain_in_float and shape.logit_cap is None,
        f"a width of the model is not a multiple of {LANES}": all(width % LANES == 0 for width in widths),
        f"a head is {shape.head_dim} wide, the kernel has {', '.join(map(str, HEAD_DIMS))}": shape.head_dim
        in HEAD_DIMS,
        "only a part of each head is rotated": all(2 * r.cos.shape[1] == shape.head_dim for r in weights.ropes),
        "matrices are not contiguous": all(
            isinstance(m, Quantised) or m.is_contiguous() for b in weights.blocks for m in b.matrices
        ),
    }
    return next((reason for reason, holds in checks.items() if not holds), "")


def address(tensor: Tensor | None) -> int:
    """Return where the data of `tensor` lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _pointers(matrix: Matrix) -> CMatrix:
    return matrix.pointers() if isinstance(matrix, Quantised) else CMatrix(matrix.data_ptr(), None)
