"""Decoding by CUDA graphs: one launch a token where the GPU would wait for hundreds.

A graph belongs to the routes of the rows that decode together, not to the rows: their tokens, positions and the
addresses of their caches are data that it reads. So few graphs serve many conversations, the more so with route
classes. The first tokens under new routes run without a graph, which also warms the kernels up.
"""

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerroute.inference import blocks
from layerroute.inference.native import address
from layerroute.inference.native_library import Unavailable
from layerroute.inference.requests import Row
from layerroute.inference.routers import Route
from layerroute.inference.weights import Weights

GRAPHS = 32
"""Graphs kept, the least recently used dropped first; each takes some MiB and a moment to record. Drafts need one for
each of their lengths."""
EAGER = 2
"""Tokens that run under new routes before a graph is recorded."""
NUMBERS = itertools.count(1)
"""Numbers of plans: an address tells nothing about whose it is."""


class Signature(NamedTuple):
    """What a graph is for: the route of each row, whether its session keeps what skipped blocks are owed, and whether
    it hands out what enters every block."""

    routes: tuple[Route, ...]
    owing: tuple[bool, ...]
    telling: bool = False


class Where(NamedTuple):
    """Where the running rows of one block keep its keys and values, and how far they have come."""

    rows: Tensor  # (running,) int64: their places among all rows
    keys: Tensor  # (rows,) int64: addresses; so are `values`
    values: Tensor
    capacity: Tensor  # (rows,) int64
    positions: Tensor  # (rows,) int64: the position of the row's new token


class GraphPlan:
    """Some rows, ordered by route, and the addresses of their caches; good until the caches grow."""

    def __init__(self, rows: Sequence[Row], count: int) -> None:
        self.number = next(NUMBERS)
        owing = [any(row.cache.writing(block) for block in range(count)) for row in rows]
        self.order = sorted(range(len(rows)), key=lambda n: (rows[n].route, owing[n]))
        self.rows = [rows[n] for n in self.order]
        straight = self.order == list(range(len(rows)))
        self.back = None if straight else sorted(range(len(rows)), key=self.order.__getitem__)
        self.signature = Signature(tuple(row.route for row in self.rows), tuple(owing[n] for n in self.order))
        self.kept = [[block for block, runs in enumerate(row.route) if runs] for row in self.rows]
        # A run of neighbouring skipped blocks owes one residual: what entered its first block.
        self.pieces = [
            {id(piece): (piece, block) for block in reversed(range(count)) if (piece := row.cache.writing(block))}
            for row in self.rows
        ]
        sides = [(row.cache.keys, row.cache.values) for row in self.rows]
        self.addresses = torch.tensor(
            [
                [[address(side[part][block]) if row.route[block] else 0
                  for side, row in zip(sides, self.rows, strict=True)] for part in (0, 1)]
                for block in range(count)
            ]
        )  # fmt: skip
        self.capacity = torch.tensor([row.cache.capacity for row in self.rows])


class Recorded:
    """The tensors that a graph reads and writes, and the graph once it is recorded."""

    def __init__(self, signature: Signature, weights: Weights) -> None:
        count, device = len(signature.routes), weights.device
        self.input = torch.zeros(2, count, dtype=torch.int64, device=device)  # tokens, positions
        self.addresses = torch.zeros(weights.shape.blocks, 2, count, dtype=torch.int64, device=device)
        self.capacity = torch.zeros(count, dtype=torch.int64, device=device)
        self.running = [
            torch.tensor(
                [n for n, route in enumerate(signature.routes) if route[block]], dtype=torch.int64, device=device
            )
            for block in range(weights.shape.blocks)
        ]
        owed = any(signature.owing)
        changed = [True, *(block.bypass is not None for block in weights.blocks)]  # what entered the block before
        first = [
            signature.telling or (owed and any(not r[b] and (changed[b] or r[b - 1]) for r in signature.routes))
            for b in range(weights.shape.blocks)
        ]
        size = (count, weights.shape.hidden)
        self.entered = {
            b: torch.empty(size, dtype=weights.dtype, device=device) for b, kept in enumerate(first) if kept
        }
        self.scores = torch.empty(0)
        self.graph: Any = None
        self.plan = 0  # the number of the plan whose addresses it holds; the plan itself would keep closed caches alive
        self.tokens = 0


class GraphDecoder:
    """Runs one token of several rows in one replay of a recorded graph.

    Raises:
        Unavailable: not a GPU of CUDA's, or no Triton that works.
    """

    name = "graphs"

    def __init__(self, weights: Weights, kernels: Any = None) -> None:
        self.records, self.note = weights.device.type == "cuda", "CUDA graphs, recorded for each route"
        self.weights, self.kernels = weights, kernels or _kernels(weights)
        self._recorded: OrderedDict[Signature, Recorded] = OrderedDict()
        self._pool: Any = None
        for rope in weights.ropes:  # at full length now: a table that grew would leave the graphs with the old one
            rope.table(weights.shape.positions)

    def plan(self, rows: Sequence[Row]) -> GraphPlan:
        """Gather the addresses of `rows`, whose caches must have room for the blocks of their routes."""
        return GraphPlan(rows, self.weights.shape.blocks)

    def decode(self, plan: GraphPlan, ids: Sequence[int], entered: Tensor | None = None) -> Tensor:
        """Run one token of each row of `plan`. Effects: the rows' caches grow by one token; sets `entered`."""
        # Kernels and graphs go to the current GPU, which need not be the one of the weights.
        device = self.weights.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._decode(plan, ids, entered)

    def _decode(self, plan: GraphPlan, ids: Sequence[int], entered: Tensor | None) -> Tensor:
        signature = plan.signature._replace(telling=entered is not None)
        recorded = self._for(plan, signature)
        tokens = [ids[n] for n in plan.order]
        recorded.input.copy_(torch.tensor([tokens, [row.cache.length for row in plan.rows]]))
        recorded.tokens += 1
        if recorded.graph is None and recorded.tokens > EAGER and self.records:
            self._record(recorded, signature)
        if recorded.graph is None:
            recorded.scores = self._token(recorded, signature)
        else:
            recorded.graph.replay()
        for number, (row, kept, pieces) in enumerate(zip(plan.rows, plan.kept, plan.pieces, strict=True)):
            row.cache.ran(kept)
            for piece, block in pieces.values():
                piece.residual[piece.count] = recorded.entered[block][number]
                piece.count += 1
            row.cache.advance(1)
        if entered is not None:
            for block, residual in recorded.entered.items():
                entered[block] = residual if plan.back is None else residual[plan.back]
        return recorded.scores if plan.back is None else recorded.scores[plan.back]

    def _for(self, plan: GraphPlan, signature: Signature) -> Recorded:
        recorded = self._recorded.get(signature)
        if recorded is None:
            if len(self._recorded) >= GRAPHS:
                self._recorded.popitem(last=False)
            recorded = self._recorded[signature] = Recorded(signature, self.weights)
        self._recorded.move_to_end(signature)
        if recorded.plan != plan.number:
            recorded.addresses.copy_(plan.addresses)
            recorded.capacity.copy_(plan.capacity)
            recorded.plan = plan.number
        return recorded

    def _record(self, recorded: Recorded, signature: Signature) -> None:
        """Record the graph. Where the GPU refuses, a warning and `note` say why, and tokens go on without."""
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                scores = self._token(recorded, signature)
        except RuntimeError as error:
            self.records = False
            self.note = f"no CUDA graph can be recorded, decoding goes on without: {str(error).partition(chr(10))[0]}"
            warnings.warn(self.note, stacklevel=2)
            torch.cuda.set_stream(stream)  # a recording that breaks off can leave its own behind
            return
        recorded.graph, recorded.scores = graph, scores

    def _token(self, recorded: Recorded, signature: Signature) -> Tensor:
        """Return next-token scores (rows, vocab) of the tokens in `recorded.input`, reading nothing but its tensors."""
        weights, count = self.weights, len(signature.routes)
        ids, positions = recorded.input
        turns = blocks.rotary(weights, positions, weights.shape.positions)
        x = blocks.embed(weights, ids)
        for index, (block, rows) in enumerate(zip(weights.blocks, recorded.running, strict=True)):
            if index in recorded.entered:
                recorded.entered[index].copy_(x)
            if not len(rows):
                x = blocks.pass_by(x, block, weights.shape)
                continue
            part = len(rows) < count
            inside = x[rows] if part else x
            cos, sin = turns[block.rope]
            turn = (cos[rows], sin[rows]) if part else (cos, sin)
            q, k, v = blocks.queries_keys_values(inside, block, weights.shape, turn)
            keys, values = recorded.addresses[index]
            where = Where(rows, keys, values, recorded.capacity, positions)
            self.kernels.store(k, v, where)
            out = blocks.finish(inside, self.kernels.attend(q, where, block, weights.shape), block, weights.shape)
            x = blocks.pass_by(x, block, weights.shape).index_copy(0, rows, out) if part else out
        return blocks.logits(weights, x)


def _kernels(weights: Weights) -> Any:
    if weights.device.type != "cuda":
        raise Unavailable(f"the weights are on {weights.device}, graphs run on cuda")
    try:
        from layerroute.inference import graph_kernels

        with torch.cuda.device(weights.device):
            graph_kernels.try_out(weights)
    except Exception as error:  # Triton raises what its compiler, the driver or a missing C compiler happen to raise
        raise Unavailable(f"no Triton that works ({str(error).partition(chr(10))[0]})") from error
    return graph_kernels
