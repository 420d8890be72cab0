"""What a benchmark measures with: seconds of a run, and the bytes, arithmetic and bandwidth to hold them against."""

import time
from collections.abc import Iterable, Sequence
from statistics import median, quantiles
from typing import Any

import torch

from layerroute.inference.engine import Engine
from layerroute.inference.graphs import EAGER, GraphDecoder
from layerroute.inference.requests import Request, Result
from layerroute.inference.routers import Route
from layerroute.inference.weights import Weights

STREAM_BYTES = 256 * 2**20


def timed(engine: Engine, requests: Sequence[Request]) -> tuple[float, float, list[Result]]:
    """Run `requests` together and return the seconds of all prefills, those of all else, and the results."""
    began = time.perf_counter()
    results = engine.generate(requests)
    took = time.perf_counter() - began
    # Rows prefilled together carry the same seconds: count each prefill once.
    prefill = sum({result.prefill_seconds for result in results})
    return prefill, took - prefill, results


def record_graphs(engine: Engine, asked: Iterable[Sequence[Request]]) -> None:
    """Run what is timed later as often as it takes until the decoder records no graph within the first timing.

    A pass that decides routes is run once a request: its graph is recorded when it has run a few times without.
    """
    if engine.decoder == GraphDecoder.name:
        once = engine.scheduler.gates.config.reads_context
        for requests in asked:
            enough = once and min(request.max_new_tokens for request in requests) > EAGER + 1
            for _ in range(1 if enough else EAGER + 1):
                engine.generate(requests)


def even_route(blocks: int, skip: float) -> Route:
    """Return a route that skips `skip` of the blocks, spread evenly."""
    count = round(blocks * skip)
    closed = {int((index + 0.5) * blocks / count) for index in range(count)}
    return tuple(index not in closed for index in range(blocks))


def bytes_per_pass(weights: Weights, routes: Sequence[Route], length: float) -> float:
    """Return the bytes that decoding one token of every row reads: each kept block and each bypass once, the LM head.

    Keys and values are read by each row that runs the block, `length` tokens each or the block's window.
    """
    token = 2 * weights.shape.kv_size * weights.dtype.itemsize
    total = float(weights.head.nbytes)
    for block, gates in zip(weights.blocks, zip(*routes, strict=True), strict=True):
        total += block.nbytes * any(gates) + token * min(length, block.window or length) * sum(gates)
        total += 0 if block.bypass is None else block.bypass.nbytes * (not all(gates))
    return total


def bytes_per_token(weights: Weights, route: Route, length: float) -> float:
    """Return the bytes that one decoded token of a row alone reads."""
    return bytes_per_pass(weights, [route], length)


def decode_flops(weights: Weights, routes: Sequence[Route]) -> float:
    """Return the multiply-adds, times two, of decoding one token of every row; attention is left out."""
    block = sum(matrix.numel() for matrix in weights.blocks[0].matrices)
    return 2.0 * sum(sum(route) * block + _bypassed(weights, route) + weights.head.numel() for route in routes)


def prefill_flops(weights: Weights, route: Route, tokens: int) -> float:
    """Return the multiply-adds, times two, of a prefill: kept blocks with causal attention, and one LM head.

    Of the last block only the last token is finished; the others leave keys and values there, and queries for nothing.
    """
    qkv, *others = (matrix.numel() for matrix in weights.blocks[0].matrices)
    total = weights.head.numel()
    for number, (block, runs) in enumerate(zip(weights.blocks, route, strict=True), start=1):
        window = min(block.window or tokens, tokens)
        every = window * (window + 1) // 2 + window * (tokens - window)
        finished, seen = (tokens, every) if number < len(route) else (1, window)
        if runs:
            total += qkv * tokens + sum(others) * finished + 2 * weights.shape.query_size * seen
        elif block.bypass is not None:
            total += block.bypass.numel() * finished
    return 2.0 * total


def _bypassed(weights: Weights, route: Route) -> int:
    """Return the multiply-adds of one token in the bypasses of the blocks that `route` skips."""
    pairs = zip(weights.blocks, route, strict=True)
    return sum(block.bypass.numel() for block, runs in pairs if block.bypass is not None and not runs)


def stream_bandwidth(device: torch.device) -> float:
    """Return the bytes per second at which all threads of `device` together read memory: the best of seven."""
    size = STREAM_BYTES * (8 if device.type == "cuda" else 1)  # so long that a launch does not count
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        float(buffer.sum())  # a GPU is waited for
        best = min(best, time.perf_counter() - began)
    return size / best


def share_of_stream(
    turns: Sequence[dict[str, float]], streams: Sequence[float], moved: dict[str, float]
) -> dict[str, float]:
    """Return the share of the machine's stream that each way of decoding reads, the median over turns.

    Bandwidth can swing twofold within minutes, so each turn is held against the stream measured within it.
    """
    pairs = list(zip(turns, streams, strict=True))
    return {name: median(size / turn[name] / stream for turn, stream in pairs) for name, size in moved.items()}


def spread(seconds: Sequence[float], tokens: float) -> dict[str, float]:
    """Return the median and quartiles of `seconds`, and the tokens per second at the median."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return {
        "seconds": middle,
        "seconds_low_quartile": low,
        "seconds_high_quartile": high,
        "tokens_per_second": tokens / middle,
    }


def against(turns: Sequence[dict[str, float]], first: str, second: str) -> dict[str, float]:
    """Return how many times faster `second` is than `first`: median and quartiles of the ratio within each turn."""
    ratios = [turn[first] / turn[second] for turn in turns if first in turn and second in turn]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"speedup": median(ratios), "speedup_low_quartile": low, "speedup_high_quartile": high}


def compare(turns: Sequence[dict[str, float]], tokens: float, cost: dict[str, float]) -> dict[str, Any]:
    """Return spreads of `open` and `routed` and their speed-up, beside the one that their `cost` allows."""
    ideal = cost["open"] / cost["routed"]
    ratio = against(turns, "open", "routed")
    table: dict[str, Any] = {name: spread([turn[name] for turn in turns if name in turn], tokens) for name in turns[0]}
    if "transformers" in turns[0]:
        table["vs_transformers"] = against(turns, "transformers", "open")["speedup"]
    return {**table, **ratio, "ideal_speedup": ideal, "share_of_ideal": ratio["speedup"] / ideal}
