"""How fast one row is, and how near to what the machine's memory and the route's arithmetic allow."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from layerroute.inference.engine import Engine
from layerroute.inference.measuring import (
    bytes_per_token,
    compare,
    even_route,
    prefill_flops,
    record_graphs,
    share_of_stream,
    stream_bandwidth,
)
from layerroute.inference.peers import time_peer, transformers
from layerroute.inference.requests import Request
from layerroute.inference.weights import Weights


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
    ids = stretch(prompt_ids, prompt_tokens, weights.shape.vocab)
    routes = {n: even_route(weights.shape.blocks, share) for n, share in {"open": 0.0, "routed": skip}.items()}
    requests = {n: Request(prompt_ids=ids, max_new_tokens=new_tokens, route=route) for n, route in routes.items()}
    engine.generate([Request(prompt_ids=ids[:64], max_new_tokens=2)])  # the first run touches all memory
    record_graphs(engine, [[request] for request in requests.values()])
    prefills: list[dict[str, float]] = []
    decodes: list[dict[str, float]] = []
    streams: list[float] = []
    for turn in range(repeats):
        results = {name: engine.generate([request])[0] for name, request in requests.items()}
        prefills.append({name: result.prefill_seconds for name, result in results.items()})
        decodes.append({name: result.decode_seconds / (new_tokens - 1) for name, result in results.items()})
        streams.append(stream_bandwidth(weights.device))
        if baseline and turn < max(3, repeats // 2):
            prefill, decode = time_peer(transformers(model), [ids], new_tokens)
            prefills[-1]["transformers"], decodes[-1]["transformers"] = prefill, decode / (new_tokens - 1)
    moved = {name: bytes_per_token(weights, route, len(ids) + new_tokens / 2) for name, route in routes.items()}
    work = {name: prefill_flops(weights, route, len(ids)) for name, route in routes.items()}
    decoded = compare(decodes, 1, moved)
    return {
        **setting(engine),
        "skipped": [index for index, runs in enumerate(routes["routed"]) if not runs],
        "prompt_tokens": len(ids),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "stream_bytes_per_second": median(streams),
        "prefill": {**compare(prefills, len(ids), work), "flops": work},
        "decode": {
            **decoded,
            "bytes_per_token": moved,
            "share_of_stream": share_of_stream(decodes, streams, moved)["open"],
        },
    }


def setting(engine: Engine) -> dict[str, Any]:
    """Return what was timed: decoder, dtype, threads and blocks."""
    return {
        "decoder": engine.decoder,
        "decoder_note": engine.decoder_note,
        "dtype": str(engine.weights.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "blocks": engine.weights.shape.blocks,
    }


def stretch(prompt_ids: Sequence[int] | None, count: int, vocab: int) -> list[int]:
    """Return `prompt_ids` cut or repeated to `count` tokens; seeded random ones if there are none."""
    if not prompt_ids:
        return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return (list(prompt_ids) * (count // len(prompt_ids) + 1))[:count]
