"""What a fallback buys and costs: held-out responses, read token by token as the engine would have decoded them.

For each probability of `--fallback`: the share of decoded tokens that every block ran again, the share of blocks' runs
saved in decoding (what was run again taken off), perplexity, its change against open gates with the 95 % interval over
conversations, and the share of tokens that scores put first. Ends in one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from layerroute.config import KINDS
from layerroute.data.sources import load_sources
from layerroute.data.steps import Step, cut_steps
from layerroute.evaluation.metrics import Bootstrap, perplexity, relative_perplexity
from layerroute.inference import Engine, Request, Route, Sampling, Scheduler
from layerroute.inference.loading import load_engine
from layerroute.inference.requests import Row
from layerroute.machine import commit, describe_machine

ROWS = 8


@dataclass(slots=True)
class Told:
    """A response that is known, and what the scores made of it so far."""

    response: Sequence[int]
    nll: float = 0.0
    first: int = 0


class Reader(Scheduler):
    """Draws what it is told, whatever the scores."""

    def __init__(self, own: Scheduler, fallback: float) -> None:
        super().__init__(
            own.weights, own.gates, own.decoder, own.memory, max_rows=ROWS, classes=None, fallback=fallback
        )
        self.told: dict[Row, Told] = {}

    def tell(self, step: Step, route: Route | None) -> Row:
        """Queue a step whose response is known."""
        response = step.input_ids[step.context_length :]
        drawn = Sampling(temperature=1.0)  # greedy rows are not drawn one by one
        context = step.input_ids[: step.context_length]
        row = self.submit(Request(prompt_ids=context, max_new_tokens=len(response), route=route, sampling=drawn))
        self.told[row] = Told(response)
        return row

    def _draw(self, row: Row, scores: Tensor) -> int:
        told = self.told[row]
        token = told.response[len(row.token_ids)]
        told.nll -= float(scores.float().log_softmax(-1)[token])
        told.first += int(scores.argmax()) == token
        return token


def read(engine: Engine, steps: Sequence[Step], fallback: float | None) -> Tensor:
    """Return what became of each step, (steps, 5); `fallback` None is open gates.

    Columns: negative log-likelihood, tokens put first, tokens run in decoding, tokens run again, blocks' runs saved.
    """
    reader, rows = Reader(engine.scheduler, fallback or 0.0), []
    route = (True,) * engine.weights.shape.blocks if fallback is None else None
    name = "gates open" if fallback is None else f"fallback {fallback:g}"
    with tqdm(total=len(steps), desc=name, unit="step", dynamic_ncols=True) as bar:
        for start in range(0, len(steps), ROWS):
            rows += (some := [reader.tell(step, route) for step in steps[start : start + ROWS]])
            while not reader.idle:
                reader.step()
            bar.update(len(some))
    opening = int(not reader.gates.config.reads_context)  # the token that decides runs every block
    found = []
    for row in rows:
        told, ran, skipped = reader.told[row], len(row.token_ids) - 1, 1.0 - sum(row.route) / len(row.route)
        saved = skipped * max(ran - opening, 0) - row.fallback_tokens
        found.append([told.nll, told.first, ran, row.fallback_tokens, saved])
    return torch.tensor(found, dtype=torch.float64)


def main() -> None:
    """Read, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--data", default="builtin:20000-30000", help="transcripts: A,B,...")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="conversations of each source at most")
    parser.add_argument("--max-length", type=int, default=512, help="longest step in tokens; longer ones are left out")
    parser.add_argument("--kind", choices=KINDS, default="tool_call")
    parser.add_argument("--steps", type=int, help="at most so many, the first ones")
    parser.add_argument("--fallback", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8", "int4"], default="bf16")
    options = parser.parse_args()
    if not all(0.0 <= fallback <= 1.0 for fallback in options.fallback):
        parser.error("--fallback: give probabilities, from 0 to 1")
    engine, backbone = load_engine(options.adapter, precision=options.precision, max_rows=ROWS)
    conversations, _ = load_sources(tuple(options.data.split(",")), split=options.split, limit=options.limit)
    steps, _ = cut_steps(conversations, backbone.tokenizer, max_length=options.max_length)
    steps = [step for step in steps if step.kind == options.kind][: options.steps]
    if not steps:
        parser.error(f"no step of kind {options.kind} in {options.data}, split {options.split}")
    tokens = torch.tensor([step.response_length for step in steps])
    bootstrap = Bootstrap.over([step.conversation for step in steps], 2000, seed=0)
    opened = read(engine, steps, None)
    rows: list[dict[str, Any]] = []
    for fallback in [None, *options.fallback]:
        found = opened if fallback is None else read(engine, steps, fallback)
        nll, first, ran, again, saved = found.T
        rows.append(
            {
                "fallback": fallback,
                "run_again": float(again.sum() / ran.sum()),
                "saved": float(saved.sum() / ran.sum()),
                "perplexity": perplexity(nll, tokens),
                "against_open": asdict(relative_perplexity(nll, opened[:, 0], tokens, bootstrap)),
                "put_first": float(first.sum() / tokens.sum()),
            }
        )
        row, change = rows[-1], rows[-1]["against_open"]
        low, high = (100 * (change[end] or 0.0) for end in ("low", "high"))
        print(
            f"{'gates open' if fallback is None else f'fallback {fallback:g}'}: {100 * row['run_again']:.1f} % run "
            f"again, {100 * row['saved']:.1f} % of runs saved, perplexity {row['perplexity']:.4f} "
            f"({100 * change['value']:+.2f} %, {low:+.2f} to {high:+.2f}), {100 * row['put_first']:.2f} % put first",
            file=sys.stderr,
        )
    about = {"adapter": options.adapter, "kind": options.kind, "steps": len(steps), "tokens": int(tokens.sum())}
    machine = {"decoder": engine.decoder, "machine": describe_machine(), "commit": commit()}
    print(json.dumps({"rows": rows, **about, "precision": options.precision, **machine}))


if __name__ == "__main__":
    main()
