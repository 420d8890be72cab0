"""How well a linear router can tell tool calls from planning with tools on offer, on conversations it has not seen.

For each number of fitting steps and each `router.window`: the area under the curve, and the share of tool calls that
would skip a block where 1 to 6 % of such planning may (the mean of the six), both averaged over blocks. Then, for each
window, how much of that planning is mistaken where `--tolerance` of the left-out steps may be: on a third of the
training conversations, held out of the fit, and on the test split. Contexts run every block. Ends in one JSON line.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerroute.config import BATCH_TOKENS
from layerroute.data.batches import by_length, collate
from layerroute.data.sources import load_conversations
from layerroute.data.steps import Step, cut_steps
from layerroute.machine import commit, describe_machine, dtype_for
from layerroute.models.adapter import load_adapter
from layerroute.models.attaching import RoutedModel
from layerroute.routing.router import RMS_EPSILON
from layerroute.training.logistic import fit_logistic
from layerroute.training.run import fitting_steps
from layerroute.training.settling import lean

LONGEST = 16  # tokens kept of each context
ALLOWED = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)


@torch.inference_mode()
def last_tokens(routed: RoutedModel, steps: Sequence[Step], blocks: Sequence[int]) -> Tensor:
    """Return what enters `blocks` at the last context tokens, normalised: (blocks, steps, LONGEST, dim), last first."""
    count = len(routed.blocks)
    found = torch.zeros(len(blocks), len(steps), LONGEST, routed.base.config.hidden_size, dtype=torch.bfloat16)
    done = 0
    for rows in by_length(steps, BATCH_TOKENS):
        contexts = [steps[i] for i in rows]
        batch = collate(contexts).to(routed.device)
        every = torch.ones(1, count, dtype=torch.bool, device=routed.device)
        span = routed.begin(
            batch.context_mask, batch.response_mask, forced=every, until=max(blocks) + 1, keep_residuals=True
        )
        with routed.precision():
            routed.residuals(batch.input_ids, span)
        ends = torch.tensor([step.context_length for step in contexts], device=routed.device)
        places = (ends[:, None] - 1 - torch.arange(LONGEST, device=routed.device)).clamp(min=1)
        for index, block in enumerate(blocks):
            hidden = span.residuals[block]
            tokens = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[-1])).float()
            tokens *= torch.rsqrt(tokens.square().mean(dim=-1, keepdim=True) + RMS_EPSILON)
            found[index, rows] = tokens.to(found)
        done += len(rows)
        print(f"{done} of {len(steps)} contexts read", file=sys.stderr, flush=True)
    return found


def judged(known: Tensor, y: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Fit `known` (steps, dim) to `y` and return its left-out scores, and the scores of `asked`."""
    shift, scale = known.mean(dim=0), 1.0 / (known.std(dim=0) + 1e-6)
    fit = fit_logistic((known - shift) * scale, y)
    return fit.left_out, (asked - shift) * scale @ fit.weight + fit.bias


def separation(known: Tensor, y: Tensor, asked: Tensor, calls: Tensor) -> tuple[float, float]:
    """Return area under the curve and mean share of `calls` (steps,) bool beyond ALLOWED shares of the others."""
    _, score = judged(known, y, asked)
    above = (score[calls][:, None] > score[~calls][None]).float().mean()
    shares = [(score[calls] > torch.quantile(score[~calls], 1 - share)).float().mean() for share in ALLOWED]
    return float(above), float(torch.stack(shares).mean())


def mistaken(known: Tensor, y: Tensor, inside: Tensor, offered: Tensor, asked: Tensor, tolerance: float) -> list[float]:
    """Return the share of planning scored as tool calls: held-out steps of `known` (planning `offered` tools), `asked`.

    Fitted on the steps of `known` that are `inside` (steps,) bool; the bias is where training puts it
    for a budget that asks for every call.
    """
    held_out = known[~inside & offered]
    left_out, score = judged(known[inside], y[inside], torch.cat([held_out, asked]))
    rise = lean(-left_out, y[inside] < 0, tolerance, counted=offered[inside])
    return [float((part > rise).float().mean()) for part in score.split([len(held_out), len(asked)])]


def steps_of(sources: str, split: str, limit: int | None, max_length: int, tokenizer: Any) -> list[Step]:
    """Return the steps of one split of comma-separated sources."""
    conversations = []
    for source in sources.split(","):
        conversations += load_conversations(source, split=split, limit=limit)[0]
    return cut_steps(conversations, tokenizer, max_length=max_length)[0]


def main() -> None:
    """Read contexts, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="smollm2-tool25")
    parser.add_argument("--data", default="builtin:6000", help="transcripts to fit on, the training split")
    parser.add_argument("--test", default="builtin:20000-30000", help="transcripts to judge on, the test split")
    parser.add_argument("--limit", type=int, help="conversations of each source at most")
    parser.add_argument("--max-length", type=int, default=200)
    parser.add_argument("--fit", type=int, nargs="+", default=[160, 320, 640], help="fitting steps of each kind")
    parser.add_argument("--tests", type=int, default=200, help="test steps of each kind at most")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8, 16], help=f"at most {LONGEST}")
    parser.add_argument("--tolerance", type=float, default=0.03, help="share of left-out planning that may be mistaken")
    parser.add_argument("--blocks", type=int, nargs="+", default=[9, 12, 15, 18, 21, 24, 27])
    options = parser.parse_args()
    if not all(1 <= window <= LONGEST for window in options.windows):
        parser.error(f"--windows: give numbers from 1 to {LONGEST}")
    routed, backbone = load_adapter(options.adapter, dtype=dtype_for("cpu"), device="cpu")
    cut = (options.limit, options.max_length, backbone.tokenizer)
    known = fitting_steps(steps_of(options.data, "train", *cut), max(options.fit), seed=0)
    offered = [step for step in steps_of(options.test, "test", *cut) if step.tools_offered]
    asked = []
    for calls in (True, False):
        of_kind = [step for step in offered if (step.kind == "tool_call") is calls]
        asked += random.Random(0).sample(of_kind, min(options.tests, len(of_kind)))
    read = [last_tokens(routed.eval(), steps, options.blocks) for steps in (known, asked)]
    is_call = [torch.tensor([step.kind == "tool_call" for step in steps]) for steps in (known, asked)]
    y = torch.where(is_call[0], 1.0, -1.0)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    rows = []
    for count in sorted({min(count, len(known) // 2) for count in options.fit}):
        some = order[: 2 * count]
        for window in options.windows:
            pooled = [tokens[:, :, :window].float().mean(dim=2) for tokens in read]
            found = [
                separation(pooled[0][index, some], y[some], pooled[1][index], is_call[1])
                for index in range(len(options.blocks))
            ]
            area, share = (sum(column) / len(found) for column in zip(*found, strict=True))
            rows.append({"fit": count, "window": window, "area": round(area, 4), "recognised": round(share, 4)})
            print(f"{count} a kind, window {window}: area {area:.3f}, recognised {share:.3f}", file=sys.stderr)
    whole = sorted({step.conversation for step in known})
    chosen = set(random.Random(0).sample(whole, 2 * len(whole) // 3))
    inside = torch.tensor([step.conversation in chosen for step in known])
    planning = torch.tensor([step.kind == "planning" and step.tools_offered for step in known])
    wrong = []
    for window in options.windows:
        pooled = [tokens[:, :, :window].float().mean(dim=2) for tokens in read]
        shares = [
            mistaken(pooled[0][index], y, inside, planning, pooled[1][index, ~is_call[1]], options.tolerance)
            for index in range(len(options.blocks))
        ]
        held_out, test = (sum(column) / len(shares) for column in zip(*shares, strict=True))
        wrong.append({"window": window, "held_out": round(held_out, 4), "test": round(test, 4)})
        print(f"window {window}: {held_out:.3f} of held-out planning mistaken, {test:.3f} of test", file=sys.stderr)
    tests = {"tool_call": int(is_call[1].sum()), "planning": int((~is_call[1]).sum())}
    print(
        json.dumps({"rows": rows, "mistaken": wrong, "tests": tests, "machine": describe_machine(), "commit": commit()})
    )


if __name__ == "__main__":
    main()
