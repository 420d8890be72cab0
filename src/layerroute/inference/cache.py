"""Keys and values per block, and what skipped blocks still owe. The cache owns lengths and positions.

A block's keys and values are always complete up to `valid[block]` tokens; what lies between that and `length` was
skipped. A session that may run the block later keeps the residual that entered it for just those tokens: once per
run of neighbouring skipped blocks, which it passes unchanged; a bypass ends a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerroute.errors import LayerRouteError
from layerroute.inference.blocks import keys_values, rotary
from layerroute.inference.routers import Route
from layerroute.inference.weights import Weights

Fill = Literal["lazy", "eager", "never"]
GRAIN = 64
"""Capacities are multiples of this many tokens."""


class OverBudget(LayerRouteError):
    """A request or a session that the memory budget can't hold."""


class Memory:
    """The bytes that caches may hold together. `limit` None is no limit."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.peak, self._used = limit, 0, 0
        self._dropped: list[int] = []  # bytes

    @property
    def used(self) -> int:
        """Bytes promised now."""
        return self._used - sum(tuple(self._dropped))

    def fits(self, nbytes: int) -> bool:
        """Whether `nbytes` more can be promised now."""
        return self.limit is None or self.used + nbytes <= self.limit

    def change(self, nbytes: int) -> None:
        """Promise `nbytes` more, or give back when negative. Does not check the limit."""
        while self._dropped:
            self._used -= self._dropped.pop()
        self._used += nbytes
        self.peak = max(self.peak, self._used)

    def drop(self, cache: "Cache") -> None:
        """Give back what `cache` was promised: nobody uses it any more.

        Python drops things at any moment and in any thread, in the middle of `change` too: it is only noted here.
        """
        self._dropped.append(cache.promised)


@dataclass(eq=False, slots=True)
class Owed:
    """The residual (room, hidden) that entered skipped blocks, for `count` tokens from position `start`."""

    start: int
    count: int
    residual: Tensor


class Cache:
    """One conversation's keys and values. Shapes: (kv_heads, capacity, head_dim) per block."""

    def __init__(self, weights: Weights, memory: Memory, fill: Fill) -> None:
        blocks = weights.shape.blocks
        self.weights, self.memory, self.fill = weights, memory, fill
        self.length = self.capacity = self.promised = 0
        self.keys: list[Tensor | None] = [None] * blocks
        self.values: list[Tensor | None] = [None] * blocks
        self.valid = [0] * blocks
        self.owed: list[list[Owed]] = [[] for _ in range(blocks)]
        self._phase: list[Owed | None] = [None] * blocks

    @property
    def nbytes(self) -> int:
        """Bytes held now: keys, values and owed residuals, shared ones once."""
        stored = sum(tensor.nbytes for tensor in (*self.keys, *self.values) if tensor is not None)
        shared = {id(owed): owed.residual.nbytes for block in self.owed for owed in block}
        return stored + sum(shared.values())

    def worst(self, length: int) -> int:
        """Bytes this cache may hold at most once it has grown to `length` tokens."""
        shape, size = self.weights.shape, self.weights.dtype.itemsize
        stored = 2 * shape.blocks * shape.kv_size * _grain(max(length, self.capacity)) * size
        if self.fill == "never":
            return stored
        # Every second block can start a run of skipped ones, which owes one residual; a bypass ends its run.
        bypasses = sum(block.bypass is not None for block in self.weights.blocks)
        runs = min((shape.blocks + 1) // 2 + bypasses, shape.blocks)
        shared = {id(owed): owed.residual.nbytes for block in self.owed for owed in block}
        return stored + sum(shared.values()) + runs * shape.hidden * max(length - self.length, 0) * size

    def reserve(self, length: int) -> None:
        """Promise memory for `length` tokens and make room for them.

        Raises:
            OverBudget: the budget can't hold it now. Nothing is changed.
        """
        more = self.worst(length) - self.promised
        if not self.memory.fits(more):
            raise OverBudget(
                f"{length} tokens need up to {more / 2**20:.1f} MiB more, and {self.memory.used / 2**20:.1f} of the "
                f"budget of {(self.memory.limit or 0) / 2**20:.1f} MiB are taken. Shorten the request, close a "
                "session, or raise the memory budget."
            )
        self.memory.change(more)
        self.promised += more
        if length > self.capacity:
            try:
                self._grow(_grain(length))
            except BaseException:
                self.settle()
                raise

    def settle(self) -> None:
        """Bring the promise down (or up) to what is held. Call when a step allocates nothing more."""
        held = self.nbytes
        self.memory.change(held - self.promised)
        self.promised = held

    def store(self, block: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (tokens, kv_heads, head_dim) of `block` at `start`, which must be `valid[block]`."""
        assert self.valid[block] == start, "a block's keys must be filled in order"
        held, kept = self.keys[block], self.values[block]
        if held is None or kept is None:
            held, kept = self._allocate(block)
        end = start + keys.shape[0]
        held[:, start:end] = keys.transpose(0, 1)
        kept[:, start:end] = values.transpose(0, 1)
        self.valid[block] = end

    def view(self, block: int) -> tuple[Tensor, Tensor]:
        """Return the valid keys and values of `block`, each (kv_heads, valid, head_dim), without a copy."""
        keys, values, end = self.keys[block], self.values[block], self.valid[block]
        assert keys is not None
        assert values is not None
        return keys[:, :end], values[:, :end]

    def begin_context(self) -> None:
        """Start a stretch of tokens under one route: from here on skipped blocks owe anew."""
        self._phase = [None] * len(self.valid)

    def begin_response(self, route: Route, room: int, *, last: bool, every: bool = False) -> None:
        """Start the response of a step under `route`, with room for `room` tokens, and fill what the route needs.

        `last` says that no step follows, so that nothing need be kept for it; `every` that any block may run before the
        response ends, so that the promise holds the keys and values of all.
        Effects: allocates all that decoding will write, then settles the promise.
        """
        self.begin_context()
        for block, runs in enumerate(route):
            if runs:
                self.complete(block)
            if (runs or every) and self.keys[block] is None:
                self._allocate(block)
            if not runs and room > 0 and not last and self.fill != "never":
                before = self._before(block)
                self._owe(block, before or Owed(self.length, 0, self._residual(room)))
        if last:
            self.fill = "never"
            self.owed = [[] for _ in self.owed]
        self.settle()

    def skip(self, block: int, start: int, x: Tensor) -> None:
        """Note that tokens from `start` with residual `x` (tokens, hidden) passed `block` by.

        Effects: keeps the residual, or fills at once (eager, in the context), or does nothing (never).
        """
        if self.fill == "never":
            return
        owed = self._phase[block]
        if owed is not None:
            # The first block of a run writes; its neighbours find it written.
            if owed.start + owed.count == start:
                owed.residual[owed.count : owed.count + len(x)] = x
                owed.count += len(x)
        elif self.fill == "eager":
            self.complete(block)  # what the end of a step owed and broke off
            self._fill(block, start, x)
        else:
            before = self._before(block)
            self._owe(block, before or Owed(start, len(x), x.to(self.weights.dtype, copy=True)))

    def complete(self, block: int) -> None:
        """Fill the keys and values of all tokens that skipped `block` so far, from the residuals it is owed."""
        if self.valid[block] == self.length:
            return
        assert self.fill != "never", "a block without residuals can't be run later"
        for owed in self.owed[block]:
            end = owed.start + owed.count
            if end > self.valid[block]:
                first = self.valid[block]
                self._fill(block, first, owed.residual[first - owed.start : owed.count])
        self.owed[block] = []
        assert self.valid[block] == self.length, "the residuals of skipped tokens must reach the present"

    def writing(self, block: int) -> Owed | None:
        """Return what the response in progress writes for `block` when it is skipped, or None."""
        return self._phase[block]

    def ran(self, blocks: Sequence[int]) -> None:
        """Count one token more as valid in `blocks`, whose keys and values were written from outside."""
        for block in blocks:
            self.valid[block] += 1

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as run by every block of their route."""
        self.length += tokens

    def retract(self, tokens: int) -> None:
        """Forget the last `tokens` of the response in progress; the step goes on from there."""
        if tokens:
            self.length -= tokens
            self.valid = [min(valid, self.length) for valid in self.valid]
            for owed in {id(owed): owed for owed in self._phase if owed is not None}.values():
                owed.count = min(owed.count, self.length - owed.start)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on. Keeps the capacity; frees residuals that end up unused."""
        assert 0 <= length <= self.length, "a cache can only be cut to a length it had"
        self.length = length
        self.valid = [min(valid, length) for valid in self.valid]
        for block, owed in enumerate(self.owed):
            self.owed[block] = [piece for piece in owed if piece.start < length]
            for piece in self.owed[block]:
                piece.count = min(piece.count, length - piece.start)
        self.end_step()

    @torch.inference_mode()
    def end_step(self) -> None:
        """Fill what an eager cache still owes, release the room that the response did not use, and settle."""
        self.begin_context()
        if self.fill == "eager":
            for block in range(len(self.valid)):
                self.complete(block)
        for piece in {id(piece): piece for block in self.owed for piece in block}.values():
            if piece.count < len(piece.residual):
                piece.residual = piece.residual[: piece.count].clone()
        self.owed = [[piece for piece in block if piece.count] for block in self.owed]
        self.settle()

    def close(self) -> None:
        """Free everything. The cache is empty and can be used again."""
        blocks = len(self.valid)
        self.keys, self.values = [None] * blocks, [None] * blocks
        self.valid, self.owed = [0] * blocks, [[] for _ in range(blocks)]
        self.begin_context()
        self.length = self.capacity = 0
        self.settle()

    def _before(self, block: int) -> Owed | None:
        """Return what the block before owes if the same residual enters `block`."""
        return self._phase[block - 1] if block and self.weights.blocks[block - 1].bypass is None else None

    def _owe(self, block: int, owed: Owed) -> None:
        self._phase[block] = owed
        self.owed[block].append(owed)

    def _residual(self, room: int) -> Tensor:
        return self._empty(room, self.weights.shape.hidden)

    def _fill(self, block: int, start: int, x: Tensor) -> None:
        end = start + len(x)
        where = torch.arange(start, end, device=x.device)
        weights = self.weights.blocks[block]
        pair = rotary(self.weights, where, end)[weights.rope]
        self.store(block, start, *keys_values(x.to(self.weights.prefill_dtype), weights, self.weights.shape, pair))

    def _allocate(self, block: int) -> tuple[Tensor, Tensor]:
        shape = self.weights.shape
        keys, values = (self._empty(shape.kv_heads, self.capacity, shape.head_dim) for _ in "kv")
        self.keys[block], self.values[block] = keys, values
        return keys, values

    def _empty(self, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=self.weights.dtype, device=self.weights.device)

    def _grow(self, capacity: int) -> None:
        self.capacity = 0  # until all have grown: where this breaks off, the next step grows them anew
        for side in (self.keys, self.values):
            for block, old in enumerate(side):
                if old is not None:
                    new = old.new_empty(old.shape[0], capacity, old.shape[2])
                    new[:, : self.valid[block]] = old[:, : self.valid[block]]
                    side[block] = new
        self.capacity = capacity


def _grain(tokens: int) -> int:
    return -(-tokens // GRAIN) * GRAIN
