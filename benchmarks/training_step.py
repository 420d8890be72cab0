"""What routing costs in training: one step with routers against the same step of plain PEFT LoRA, and peak memory.

Both run the same backbone, steps, precision and loss (on response tokens), in turn within one process; the ratio is
the median over pairs. An update's steps go through in batches, as in `layerroute train` (`--batch 8`: all at once).
`make bench` runs it and ends in one JSON line.
"""

import argparse
import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from peft import get_peft_model

from layerroute.config import KINDS, AdapterConfig, LoraConfig
from layerroute.data.batches import Batch
from layerroute.machine import describe_machine, dtype_for
from layerroute.models.attaching import attach, peft_config
from layerroute.models.families import Head, family_of
from layerroute.models.loading import load_backbone, load_config
from layerroute.models.nll import response_nll
from layerroute.training.options import PRESETS, TrainConfig
from layerroute.training.trainer import Learner, rate_totals, straight_through


def batches_of(rows: int, length: int, size: int, vocabulary: int) -> list[Batch]:
    """Return random steps whose last quarter is the response, half of them tool calls, in batches of `size`."""
    ids = torch.randint(100, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    context = (torch.arange(length) < length * 3 // 4).expand(rows, length)
    columns = (ids, context, ~context, torch.arange(rows) % len(KINDS))
    return [Batch(*parts) for parts in zip(*(column.split(size) for column in columns), strict=True)]


def plain_step(model: str, batches: Sequence[Batch], adapter: AdapterConfig) -> Callable[[], None]:
    """Return the forward and backward passes of an update of PEFT LoRA, loss on the response as in the routed step."""
    base = load_backbone(model).model.requires_grad_(False)
    bf16 = base.dtype == torch.bfloat16
    family = family_of(base.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft = get_peft_model(base, peft_config(adapter, family)).train()

    def step() -> None:
        for batch in batches:
            row, column = batch.response_mask[:, 1:].nonzero(as_tuple=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                hidden = family.decoder_of(base)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
                nll = response_nll(hidden[row, column], batch.input_ids[row, column + 1], Head.of(base))
            nll.mean().backward()
        peft.zero_grad(set_to_none=True)

    return step


def routed_step(model: str, batches: Sequence[Batch], config: TrainConfig) -> Callable[[], None]:
    """Return the forward and backward passes of an update of the routed model under its budget, routers deciding."""
    learner = Learner(attach(load_backbone(model).model, config.adapter), config).train()
    learner.fitted.fill_(True)

    def step() -> None:
        for batch in batches:
            with learner.routed.precision():
                out = learner(batch.input_ids, batch.context_mask, batch.response_mask, batch.kinds)
            skipped = 1.0 - straight_through(out.gates, out.logits).mean(dim=1)
            penalty = learner.controller.penalty(skipped, batch.kinds, rate_totals(skipped, batch.kinds))
            (out.nll.sum() / out.tokens.sum() + penalty).backward()
        learner.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=8, help="steps of an update")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=TrainConfig().batch_size, help="steps that go through together")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    config = TrainConfig(adapter=AdapterConfig(lora=LoraConfig(dropout=0.0)))
    vocabulary = load_config(options.model).vocab_size
    batches = batches_of(options.rows, options.length, options.batch, vocabulary)
    routed = routed_step(options.model, batches, config)
    seconds(routed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    plain = plain_step(options.model, batches, config.adapter)
    seconds(plain)
    pairs = []
    for index in range(options.pairs):
        pairs.append((seconds(routed), seconds(plain)))
        print(f"pair {index + 1}: routed {pairs[-1][0]:.2f} s, plain {pairs[-1][1]:.2f} s", file=sys.stderr)
    ratios = [a / b for a, b in pairs]
    document = {
        "model": options.model,
        "update": [options.rows, options.length],
        "batch": options.batch,
        "dtype": dtype_for("cpu"),
        "routed_seconds": statistics.median(a for a, _ in pairs),
        "plain_seconds": statistics.median(b for _, b in pairs),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "peak_memory_gib": round(peak, 2),
        "preset": dict(PRESETS["budget"]),
        "machine": describe_machine(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
