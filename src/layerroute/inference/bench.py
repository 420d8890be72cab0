"""How fast the engine is, and how near to what the machine's memory and the route's arithmetic allow."""

import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from layerroute.inference.engine import Engine
from layerroute.inference.requests import Request
from layerroute.inference.routers import Route
from layerroute.inference.weights import Weights

STREAM_BYTES = 256 * 2**20


def bench(
    model: nn.Module,
    prompt_ids: Sequence[int] | None = None,
    *,
    skip: float = 0.25,
    prompt_tokens: int = 512,
    new_tokens: int = 48,
    repeats: int = 7,
    baseline: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Time prefill and decode of one row, all gates open against a route that skips evenly spread blocks.

    Open, routed and (if `baseline`) transformers `generate` take turns, so that a busy machine hits all alike. A
    speed-up is the median over turns of the ratio within the turn. `share_of_ideal` divides it by what the bytes
    (decode) or the FLOPs (prefill) allow. Below a minute on a 135M model and two cores.

    Args:
        model: a plain Hugging Face causal LM; its own dtype is what the baseline runs in.
        prompt_ids: the context; seeded random tokens when None. Cut or repeated to `prompt_tokens`.
        skip: share of blocks the route skips.

    Returns:
        One document ready for JSON: seconds, tokens per second, bytes, ratios.
    """
    weights = Weights.from_model(model, dtype=dtype)
    engine = Engine(weights)
    ids = _context(prompt_ids, prompt_tokens, weights.shape.vocab)
    blocks = weights.shape.blocks
    routes = {"open": (True,) * blocks, "routed": even_route(blocks, skip)}
    requests = {n: Request(prompt_ids=ids, max_new_tokens=new_tokens, route=route) for n, route in routes.items()}
    engine.generate([Request(prompt_ids=ids[:64], max_new_tokens=2)])  # the first run touches all memory
    prefills: list[dict[str, float]] = []
    decodes: list[dict[str, float]] = []
    for turn in range(repeats):
        results = {name: engine.generate([request])[0] for name, request in requests.items()}
        prefills.append({name: result.prefill_seconds for name, result in results.items()})
        decodes.append({name: result.decode_seconds / (new_tokens - 1) for name, result in results.items()})
        if baseline and turn < max(3, repeats // 2):
            prefills[-1]["transformers"], decodes[-1]["transformers"] = _transformers(model, ids, new_tokens)
    stream = stream_bandwidth()
    moved = {name: bytes_per_token(weights, route, len(ids) + new_tokens / 2) for name, route in routes.items()}
    work = {name: prefill_flops(weights, route, len(ids)) for name, route in routes.items()}
    decode = _compare(decodes, 1, moved)
    return {
        **_setting(engine, dtype),
        "skipped": [index for index, runs in enumerate(routes["routed"]) if not runs],
        "prompt_tokens": len(ids),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "stream_bytes_per_second": stream,
        "prefill": {**_compare(prefills, len(ids), work), "flops": work},
        "decode": {
            **decode,
            "bytes_per_token": moved,
            "share_of_stream": moved["open"] / decode["open"]["seconds"] / stream,
        },
    }


def _setting(engine: Engine, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "decoder": engine.decoder,
        "decoder_note": engine.decoder_note,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "blocks": engine.weights.shape.blocks,
    }


def even_route(blocks: int, skip: float) -> Route:
    """Return a route that skips `skip` of the blocks, spread evenly."""
    count = round(blocks * skip)
    closed = {int((index + 0.5) * blocks / count) for index in range(count)}
    return tuple(index not in closed for index in range(blocks))


def bytes_per_token(weights: Weights, route: Route, length: float) -> float:
    """Return the bytes that one decoded token reads: kept blocks, their keys and values, and the LM head."""
    kept = [block for block, runs in zip(weights.blocks, route, strict=True) if runs]
    cached = 2 * weights.shape.kv_size * length * weights.embedding.element_size()
    return sum(block.nbytes for block in kept) + len(kept) * cached + weights.head.nbytes


def prefill_flops(weights: Weights, route: Route, tokens: int) -> float:
    """Return the multiply-adds, times two, of a prefill: kept blocks with causal attention, and one LM head."""
    matrices = sum(matrix.numel() for matrix in weights.blocks[0].matrices)
    block = 2.0 * matrices * tokens + 2.0 * weights.shape.query_size * tokens * tokens
    return sum(route) * block + 2.0 * weights.head.numel()


def stream_bandwidth() -> float:
    """Return the bytes per second at which all threads together read memory: the best of seven."""
    buffer = torch.ones(STREAM_BYTES // 4)
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - began)
    return STREAM_BYTES / best


@torch.inference_mode()
def _transformers(model: Any, ids: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """Return seconds of a prefill and seconds per decoded token of transformers `generate`, greedy."""
    inputs = torch.tensor([list(ids)])
    mask = torch.ones_like(inputs)
    took = []
    for count in (1, new_tokens):
        began = time.perf_counter()
        model.generate(
            inputs, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        took.append(time.perf_counter() - began)
    return took[0], (took[1] - took[0]) / (new_tokens - 1)


def _context(prompt_ids: Sequence[int] | None, count: int, vocab: int) -> list[int]:
    if not prompt_ids:
        return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return (list(prompt_ids) * (count // len(prompt_ids) + 1))[:count]


def _compare(turns: list[dict[str, float]], tokens: int, cost: dict[str, float]) -> dict[str, Any]:
    ideal = cost["open"] / cost["routed"]
    speedup = median(turn["open"] / turn["routed"] for turn in turns)
    table: dict[str, Any] = {name: _spread([turn[name] for turn in turns if name in turn], tokens) for name in turns[0]}
    if "transformers" in turns[0]:
        table["vs_transformers"] = median(t["transformers"] / t["open"] for t in turns if "transformers" in t)
    return {**table, "speedup": speedup, "ideal_speedup": ideal, "share_of_ideal": speedup / ideal}


def _spread(seconds: list[float], tokens: int) -> dict[str, float]:
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "seconds": middle,
        "seconds_low_quartile": low,
        "seconds_high_quartile": high,
        "tokens_per_second": tokens / middle,
    }
