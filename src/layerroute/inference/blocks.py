"""The block program: what one block does to packed tokens. No cache, no routes, no batching.

Attention is torch's, and so are products of matrices that are not packed. What lies between them is the compiled
library's where it takes the shape (native_rows.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from layerroute.inference import native_rows
from layerroute.inference.quantised import linear
from layerroute.inference.weights import Block, Shape, Weights

Rotary = tuple[Tensor, Tensor]


def embed(weights: Weights, ids: Tensor) -> Tensor:
    """Return the residual stream of `ids` (tokens,) as (tokens, hidden)."""
    table = weights.embedding
    x = F.embedding(ids, table) if isinstance(table, Tensor) else table.take(ids)
    scale = weights.shape.embed_scale
    # The scale is rounded to the residual's dtype first, as the family's own embedding does.
    return x if scale is None else x * float(torch.tensor(scale, dtype=x.dtype))


def norm(x: Tensor, gain: Tensor, shape: Shape) -> Tensor:
    """RMS-normalise the last dimension of `x` and multiply by `gain`; the dtype of `x` is kept."""
    if shape.gain_in_float:
        return F.rms_norm(x.to(gain.dtype), (x.shape[-1],), gain, shape.eps).to(x.dtype)
    if x.ndim == 2 and native_rows.fits(x):
        return native_rows.normalise(x, gain, shape.eps)
    return F.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), shape.eps)


def rotary(weights: Weights, positions: Tensor, length: int) -> list[Rotary]:
    """Return cosines and sines at `positions` (tokens,), all below `length`, one pair per frequency set."""
    pairs = []
    for rope in weights.ropes:
        cos, sin = rope.table(length)
        pairs.append((cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)))
    return pairs


def rotate(x: Tensor, pair: Rotary) -> Tensor:
    """Rotate the first features of every head of `x` (tokens, heads, head_dim); the rest passes through."""
    cos, sin = pair
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    both = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return both if rest.shape[-1] == 0 else torch.cat((both, rest), dim=-1)


def turned(heads: Tensor, gain: Tensor | None, shape: Shape, pair: Rotary) -> Tensor:
    """Return `heads` (tokens, heads, head_dim) normalised if there is a `gain`, then rotated. May overwrite `heads`."""
    if native_rows.fits_heads(heads, pair[0]) and (gain is None or not shape.gain_in_float):
        return native_rows.turn(heads, gain, *pair, shape.eps)
    return rotate(heads if gain is None else norm(heads, gain, shape), pair)


def queries_keys_values(x: Tensor, block: Block, shape: Shape, pair: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries (tokens, heads, head_dim), rotated keys and values (tokens, kv_heads, head_dim)."""
    fused = linear(norm(x, block.norm_attention, shape), block.qkv, block.qkv_bias)
    heads = fused.view(x.shape[0], -1, shape.head_dim)
    turning = shape.heads + shape.kv_heads
    if block.query_norm is None:
        both = turned(heads[:, :turning], None, shape, pair)
        return both[:, : shape.heads], both[:, shape.heads :], heads[:, turning:]
    q = turned(heads[:, : shape.heads], block.query_norm, shape, pair)
    return q, turned(heads[:, shape.heads : turning], block.key_norm, shape, pair), heads[:, turning:]


def keys_values(x: Tensor, block: Block, shape: Shape, pair: Rotary) -> tuple[Tensor, Tensor]:
    """Return the keys and values alone: what a block that is skipped still owes to later steps."""
    bias = None if block.qkv_bias is None else block.qkv_bias[shape.query_size :]
    matrix = block.qkv
    part = matrix[shape.query_size :] if isinstance(matrix, Tensor) else matrix.below(shape.query_size)
    fused = linear(norm(x, block.norm_attention, shape), part, bias)
    heads = fused.view(x.shape[0], -1, shape.head_dim)
    return turned(heads[:, : shape.kv_heads], block.key_norm, shape, pair), heads[:, shape.kv_heads :]


def attend(q: Tensor, keys: Tensor, values: Tensor, block: Block, shape: Shape) -> Tensor:
    """Attend from the last tokens of one row to all of it.

    Args:
        q: (tokens, heads, head_dim), the queries of the row's last `tokens` positions.
        keys: (kv_heads, length, head_dim), as are `values`; `length` counts those tokens too.

    Returns:
        (tokens, heads * head_dim).
    """
    tokens, length = q.shape[0], keys.shape[1]
    if block.window is not None and length - tokens - block.window + 1 > 0:
        # Keys that no query of these tokens can see are not even read.
        first = length - tokens - block.window + 1
        keys, values, length = keys[:, first:], values[:, first:], length - first
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    group = shape.heads // shape.kv_heads
    grouped = q.view(tokens, shape.kv_heads, group, shape.head_dim)
    if shape.attention_cap is not None:
        return _attend_capped(grouped, keys, values, block, shape)
    if tokens == 1:
        # One query: the heads of a group become the query tokens of one shared head, so no key is copied.
        out = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=shape.scale)
        return out.reshape(1, -1)
    mask = _mask(tokens, length, block.window, q.device)
    if q.device.type == "cpu":  # elsewhere grouped heads under a mask have no fused kernel
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=shape.scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).reshape(tokens, -1)
    wide = (shape.kv_heads, group, length, shape.head_dim)
    out = F.scaled_dot_product_attention(
        grouped.permute(1, 2, 0, 3),
        keys[:, None].expand(wide),
        values[:, None].expand(wide),
        attn_mask=mask,
        is_causal=mask is None,
        scale=shape.scale,
    )
    return out.permute(2, 0, 1, 3).reshape(tokens, -1)


def _mask(tokens: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys each query sees (tokens, length), or None when plain causal says it."""
    if tokens == length and (window is None or length <= window):
        return None
    ahead = torch.arange(length, device=device) - torch.arange(length - tokens, length, device=device)[:, None]
    seen = ahead <= 0
    return seen if window is None else seen & (ahead > -window)


def _attend_capped(grouped: Tensor, keys: Tensor, values: Tensor, block: Block, shape: Shape) -> Tensor:
    """Attention with Gemma 2's soft cap on the scores, which the fused kernel can't apply."""
    tokens, length, cap = grouped.shape[0], keys.shape[1], shape.attention_cap
    assert cap is not None
    scores = torch.matmul(grouped.permute(1, 2, 0, 3), keys[:, None].transpose(-1, -2)) * shape.scale
    scores = torch.tanh(scores / cap) * cap
    mask = _mask(tokens, length, block.window, keys.device)
    if mask is None:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=keys.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    shares = torch.softmax(scores, dim=-1, dtype=wide).to(values.dtype)
    return torch.matmul(shares, values[:, None]).permute(2, 0, 1, 3).reshape(tokens, -1)


def finish(x: Tensor, attended: Tensor, block: Block, shape: Shape) -> Tensor:
    """Return the residual leaving the block, given the one that entered and the attention's output."""
    out = linear(attended, block.out, block.out_bias)
    if block.norm_after_attention is not None:
        out = norm(out, block.norm_after_attention, shape)
    x = x + out
    inner = gated(linear(norm(x, block.norm_mlp, shape), block.gate_up, block.gate_up_bias), shape)
    out = linear(inner, block.down, block.down_bias)
    if block.norm_after_mlp is not None:
        out = norm(out, block.norm_after_mlp, shape)
    return x + out


def gated(x: Tensor, shape: Shape) -> Tensor:
    """Return the activation of the first half of `x` (tokens, 2 * intermediate) times the second."""
    if native_rows.fits(x):
        return native_rows.gate(x, shape.activation != "silu")
    gate, up = x.chunk(2, dim=-1)
    active = F.silu(gate) if shape.activation == "silu" else F.gelu(gate, approximate="tanh")
    return active * up


def pass_by(x: Tensor, block: Block, shape: Shape) -> Tensor:
    """Return the residual (tokens, hidden) after a block that is skipped: the one that entered, or its bypass's."""
    if block.bypass is None:
        return x
    low = linear(norm(x, block.norm_attention, shape), block.bypass.down, None)
    return x + linear(low, block.bypass.up, None)


def logits(weights: Weights, x: Tensor) -> Tensor:
    """Return next-token scores (tokens, vocab) in float32 or wider for residuals (tokens, hidden).

    Those of a bfloat16 head are rounded to bfloat16 here, as transformers rounds them, and not by compiled decoders.
    """
    # One token a row: to widen a bfloat16 head would cost more than the product. A packed one multiplies in float32.
    dtype = weights.dtype if isinstance(weights.head, Tensor) else torch.float32
    out = linear(norm(x, weights.norm, weights.shape).to(dtype), weights.head, weights.head_bias)
    cap = weights.shape.logit_cap
    if cap is not None:
        out = torch.tanh(out / cap) * cap
    return out if out.dtype == torch.float64 else out.float()
