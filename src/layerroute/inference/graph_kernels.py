"""Attention over caches that a graph finds by their addresses, so that one graph serves every conversation.

Triton kernels. A row's keys and values lie in its own cache, (kv_heads, capacity, head_dim) a block; the kernels read
where from tables of addresses that are filled in before each replay.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerroute.inference.graphs import Where
from layerroute.inference.weights import Block, Shape, Weights

TILE = 64


def store(keys: Tensor, values: Tensor, where: Where) -> None:
    """Write the new keys and values, both (running, kv_heads, head_dim), into the rows' caches."""
    running, kv_heads, head_dim = keys.shape
    _store[(running, kv_heads)](
        keys, values, *where, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
    )  # fmt: skip


def attend(q: Tensor, where: Where, block: Block, shape: Shape) -> Tensor:
    """Attend from one new token of each running row, q (running, heads, head_dim), to all its cache holds.

    Returns:
        (running, heads * head_dim). Scores and sums are float32.
    """
    running, heads, head_dim = q.shape
    out = torch.empty(running, heads * head_dim, dtype=q.dtype, device=q.device)
    _attend[(running, heads)](
        q, out, *where, q.stride(0), q.stride(1), shape.scale, float(shape.attention_cap or 0.0),
        HEADS=heads, GROUP=heads // shape.kv_heads, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        WINDOW=block.window or 0, CAPPED=shape.attention_cap is not None, TILE=TILE,
    )  # fmt: skip
    return out


def try_out(weights: Weights) -> None:
    """Run both kernels on one token of a row, so that what doesn't work here fails now."""
    shape, device = weights.shape, weights.device
    room = torch.zeros(2, shape.kv_heads, 1, shape.head_dim, dtype=weights.dtype, device=device)
    heads = torch.zeros(1, shape.heads + shape.kv_heads, shape.head_dim, dtype=weights.dtype, device=device)
    q, new = heads[:, : shape.heads], heads[:, shape.heads :]
    numbers = ([0], [room[0].data_ptr()], [room[1].data_ptr()], [1], [0])
    where = Where(*(torch.tensor(each, device=device) for each in numbers))
    store(new, new, where)
    attend(q, where, weights.blocks[0], shape).tolist()  # a GPU is waited for


@triton.jit
def _store(
    keys, values, rows, key_table, value_table, capacity, positions, key_row, key_head, value_row, value_head,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    place, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(rows + place)
    at = (head * tl.load(capacity + row) + tl.load(positions + row)) * HEAD_DIM
    feature = tl.arange(0, WIDTH)
    inside = feature < HEAD_DIM
    kind: tl.constexpr = tl.pointer_type(keys.dtype.element_ty)
    key = tl.load(keys + place * key_row + head * key_head + feature, mask=inside)
    value = tl.load(values + place * value_row + head * value_head + feature, mask=inside)
    tl.store(tl.load(key_table + row).to(kind) + at + feature, key, mask=inside)
    tl.store(tl.load(value_table + row).to(kind) + at + feature, value, mask=inside)


@triton.jit
def _attend(
    q, out, rows, key_table, value_table, capacity, positions, q_row, q_head, scale, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    place, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(rows + place)
    length = tl.load(positions + row) + 1
    first = tl.maximum(length - WINDOW, 0) if WINDOW else length * 0
    start = (head // GROUP) * tl.load(capacity + row) * HEAD_DIM
    kind: tl.constexpr = tl.pointer_type(q.dtype.element_ty)
    keys = tl.load(key_table + row).to(kind) + start
    values = tl.load(value_table + row).to(kind) + start
    feature = tl.arange(0, WIDTH)
    inside = feature < HEAD_DIM
    query = tl.load(q + place * q_row + head * q_head + feature, mask=inside, other=0.0).to(tl.float32) * scale
    best = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((WIDTH,), tl.float32)
    for tile in range(first, length, TILE):
        token = tile + tl.arange(0, TILE)
        seen = token < length
        spot, mask = token[:, None] * HEAD_DIM + feature[None, :], seen[:, None] & inside[None, :]
        score = tl.sum(tl.load(keys + spot, mask=mask, other=0.0).to(tl.float32) * query[None, :], axis=1)
        if CAPPED:
            score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)  # tanh
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, axis=0))
        share, fade = tl.exp(score - higher), tl.exp(best - higher)
        value = tl.load(values + spot, mask=mask, other=0.0).to(tl.float32)
        mixed = mixed * fade + tl.sum(share[:, None] * value, axis=0)
        total = total * fade + tl.sum(share, axis=0)
        best = higher
    answer = (mixed / total).to(q.dtype.element_ty)
    tl.store(out + place * HEADS * HEAD_DIM + head * HEAD_DIM + feature, answer, mask=inside)
