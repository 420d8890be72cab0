"""Rows through blocks: prefill decides each row's route as it goes, decode follows it.

Rows are packed: their tokens lie one after the other, so lengths may differ. At each block the tokens of the rows
that run it are gathered, run together and scattered back; attention alone goes row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from layerroute.inference import blocks
from layerroute.inference.requests import Row
from layerroute.inference.routers import Gates, PackedPool, pool_range
from layerroute.inference.weights import Weights


@dataclass(frozen=True, slots=True)
class Share:
    """Which rows run a block. `where` picks their tokens out of the packed ones; None means all."""

    rows: tuple[int, ...]
    where: Tensor | None


def prefill(weights: Weights, gates: Gates, rows: Sequence[Row]) -> Tensor:
    """Run the new context of `rows` and decide their routes; under scope `continuation` the context decides nothing.

    Effects: fills the rows' caches, sets `context_route` and, where routers read the context, `gates` (what they or
    the forced route say).

    Returns:
        Next-token scores (rows, vocab) after each row's last context token.
    """
    ids = [token for row in rows for token in row.new_ids]
    spans, at = [], 0
    for row in rows:
        spans.append((at, at := at + len(row.new_ids)))
        row.cache.begin_context()
    positions = torch.cat([torch.arange(row.start, len(row.request.prompt_ids)) for row in rows]).to(weights.device)
    longest = max(len(row.request.prompt_ids) for row in rows)
    turns = blocks.rotary(weights, positions, longest)
    x = blocks.embed(weights, torch.tensor(ids, device=weights.device)).to(weights.prefill_dtype)
    deciding, skipping = gates.config.reads_context, gates.config.skips_context
    pool = _asking(gates, rows, spans, weights.device) if deciding else None
    ends = torch.tensor([last - 1 for _, last in spans], device=weights.device)
    for index in range(weights.shape.blocks):
        if deciding:
            _decide(gates, index, rows, pool, x)
        running = []
        for number, (row, (first, last)) in enumerate(zip(rows, spans, strict=True)):
            if not skipping or row.gates[index]:
                row.cache.complete(index)
                running.append(number)
            else:
                row.cache.skip(index, row.start, x[first:last])
        only = ends if index == weights.shape.blocks - 1 else None  # nothing reads the others that leave it
        x = _run(weights, index, rows, spans, _share(running, spans, weights.device), x, turns, only)
    for row in rows:
        row.context_route = tuple(row.gates) if skipping else (True,) * weights.shape.blocks
        row.cache.advance(len(row.new_ids))
    return blocks.logits(weights, x)


class Decoder(Protocol):
    """Runs one token of several rows through the blocks of their routes."""

    @property
    def name(self) -> str:
        """What to call it in reports."""

    @property
    def note(self) -> str:
        """Why it is this one, or what holds it back."""

    def plan(self, rows: Sequence[Row]) -> Any:
        """Prepare what is the same for every token of `rows`; good until the set of rows changes."""

    def decode(self, plan: Any, ids: Sequence[int], entered: Tensor | None = None) -> Tensor:
        """Run the tokens `ids`, one a row, and return next-token scores (rows, vocab), good until the next call.

        Effects: the rows' caches grow by one token; `entered`, (blocks, rows, hidden) float32 on the device of the
        weights, is set to the residuals that enter each block.
        """


@dataclass(frozen=True, slots=True)
class Plan:
    """Some rows, and for every block which of them run it."""

    rows: tuple[Row, ...]
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class TorchDecoder:
    """The decoder for every device, dtype and family."""

    weights: Weights
    note: str = "as asked"
    name: str = "torch"

    def plan(self, rows: Sequence[Row]) -> Plan:
        """Note at each block which rows run it."""
        spans = [(number, number + 1) for number in range(len(rows))]
        shares = (
            _share([number for number, row in enumerate(rows) if row.route[index]], spans, self.weights.device)
            for index in range(self.weights.shape.blocks)
        )
        return Plan(tuple(rows), tuple(shares))

    def decode(self, plan: Plan, ids: Sequence[int], entered: Tensor | None = None) -> Tensor:
        """Run one token of each row. Effects: the rows' caches grow by one token; sets `entered`."""
        rows, weights = plan.rows, self.weights
        lengths = [row.cache.length for row in rows]
        turns = blocks.rotary(weights, torch.tensor(lengths, device=weights.device), max(lengths) + 1)
        x = blocks.embed(weights, torch.tensor(ids, device=weights.device))
        spans = [(number, number + 1) for number in range(len(rows))]
        for index, share in enumerate(plan.shares):
            if entered is not None:
                entered[index] = x
            for number, row in enumerate(rows):
                if not row.route[index]:
                    row.cache.skip(index, lengths[number], x[number : number + 1])
            x = _run(weights, index, rows, spans, share, x, turns)
        for row in rows:
            row.cache.advance(1)
        return blocks.logits(weights, x)


def _share(running: list[int], spans: Sequence[tuple[int, int]], device: torch.device) -> Share:
    if len(running) == len(spans) or not running:
        return Share(tuple(running), None)
    return Share(tuple(running), torch.cat([torch.arange(*spans[number]) for number in running]).to(device))


def _asking(
    gates: Gates, rows: Sequence[Row], spans: Sequence[tuple[int, int]], device: torch.device
) -> PackedPool | None:
    """Return what the routers read of the rows whose route is not forced; None where all are."""
    places = []
    for row, (first, _) in zip(rows, spans, strict=True):
        if row.request.route is None:
            chosen = pool_range(row.start, len(row.request.prompt_ids), gates.config)
            places.append(range(first + chosen.start - row.start, first + chosen.stop - row.start))
    return PackedPool.over(places, gates.config, device) if places else None


def _decide(gates: Gates, index: int, rows: Sequence[Row], pool: PackedPool | None, x: Tensor) -> None:
    decided = iter(gates(index, pool, x) if pool else ())
    for row in rows:
        row.gates.append(next(decided) if row.request.route is None else row.request.route[index])


def _run(
    weights: Weights,
    index: int,
    rows: Sequence[Row],
    spans: Sequence[tuple[int, int]],
    share: Share,
    x: Tensor,
    turns: list[blocks.Rotary],
    ends: Tensor | None = None,
) -> Tensor:
    """Return the residuals that leave block `index`, those of each row's last token alone where `ends` says where."""
    block, shape, where = weights.blocks[index], weights.shape, share.where
    if not share.rows:
        return blocks.pass_by(x if ends is None else x[ends], block, shape)
    cos, sin = turns[block.rope]
    inside = x if where is None else x[where]
    turn = (cos, sin) if where is None else (cos[where], sin[where])
    q, k, v = blocks.queries_keys_values(inside, block, shape, turn)
    attended, at = [], 0
    for number in share.rows:
        first, last = spans[number]
        end = at + last - first
        cache = rows[number].cache
        cache.store(index, cache.length, k[at:end], v[at:end])
        begin = at if ends is None else end - 1
        attended.append(blocks.attend(q[begin:end], *cache.view(index), block, shape))
        at = end
    if ends is not None:
        x, where = x[ends], None if where is None else torch.tensor(share.rows, device=x.device)
        inside = x if where is None else x[where]
    out = blocks.finish(inside, attended[0] if len(attended) == 1 else torch.cat(attended), block, shape)
    # To pick the rows that pass by would cost more than to let all of them.
    return out if where is None else blocks.pass_by(x, block, shape).index_copy(0, where, out)
