"""Is the engine exact? Real prompts, float32, greedy: five laws on a real backbone.

1. all gates open: the tokens of transformers `generate`
2. routed: the tokens of the routed model run without a cache
3. a batch of mixed routes: each row as alone
4. cached against recomputed scores for random routes
5. with drafts: the tokens without

Where tokens differ, the gap between the two candidates' logits is printed: a gap near rounding is a tie that float32
sums in another order break differently; a wide one is a defect. Ends in one table, or one JSON document with --json.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerroute.config import KINDS
from layerroute.data.sources import load_conversations
from layerroute.data.steps import cut_steps
from layerroute.inference import Engine, Request, Sampling, Weights
from layerroute.machine import commit, describe_machine
from layerroute.models.attaching import RoutedModel, attach
from layerroute.models.loading import load_backbone
from layerroute.routing.route import Route

TIE = 1e-3
"""A gap of logits below this is called a tie, and scores that far apart are called equal."""

GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}  # whatever a model's own settings say


def prompts_of(data: str, tokenizer: Any, count: int, longest: int) -> list[list[int]]:
    """Return `count` contexts, half of each kind, from conversations that no adapter was trained on."""
    conversations, _ = load_conversations(data, split="test")
    random.Random(0).shuffle(conversations)
    steps, _ = cut_steps(conversations[: 8 * count], tokenizer, max_length=2 * longest)
    chosen: list[list[int]] = []
    for kind in KINDS:
        fitting = [s for s in steps if s.kind == kind and s.context_length <= longest]
        chosen += [list(step.input_ids[: step.context_length]) for step in fitting[: count // 2]]
        if len(fitting) < count // 2:
            print(f"only {len(fitting)} {kind} steps of at most {longest} tokens", file=sys.stderr)
    if not chosen:
        sys.exit(f"--longest {longest}: no step of {data} is so short. Give more.")
    return chosen


class Checks:
    """Counts what agreed, and keeps every difference with its gap."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def note(self, law: str, equal: bool, where: str = "", gap: float | None = None) -> None:
        """Count one comparison."""
        row = self.rows.setdefault(law, {"compared": 0, "equal": 0, "differences": []})
        row["compared"] += 1
        row["equal"] += equal
        if not equal:
            row["differences"].append({"where": where, "gap": gap, "tie": gap is not None and gap < TIE})


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the first position where `a` and `b` differ."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def compare(checks: Checks, law: str, ours: Sequence[int], theirs: Sequence[int], scores: Callable, where: str) -> None:
    """Note whether two answers agree; `scores(tokens)` gives the twin's logits after those tokens."""
    at = first_difference(ours, theirs)
    if at is None:
        checks.note(law, len(ours) == len(theirs), where)
        return
    logits = scores(list(theirs[:at]))
    gap = float((logits[theirs[at]] - logits[ours[at]]).abs())
    checks.note(law, False, f"{where}, token {at}", gap)


@torch.inference_mode()
def twin_scores(routed: RoutedModel, ids: Sequence[int], route: Sequence[bool]) -> torch.Tensor:
    """Return the logits (tokens, vocab) after every token of `ids` under `route`: one pass, no cache."""
    context = torch.ones(1, len(ids), dtype=torch.bool)
    logits, _ = routed.token_logits(torch.tensor([list(ids)]), context, forced=Route(tuple(route)))
    return logits[0].float()


def random_route(blocks: int, draw: random.Random, share: float = 0.25) -> tuple[bool, ...]:
    """Return a route whose blocks are each closed with probability `share`."""
    return tuple(draw.random() >= share for _ in range(blocks))


def check_open(checks: Checks, engine: Engine, model: Any, prompts: Sequence[list[int]], count: int) -> None:
    """Law 1, and law 5 on the same prompts. Both stop where transformers does, at its end-of-text tokens."""
    ends = model.generation_config.eos_token_id
    stops = frozenset(ends if isinstance(ends, list) else [ends])
    for number, prompt in enumerate(prompts):
        inputs = torch.tensor([prompt])
        mask = torch.ones_like(inputs)
        with torch.inference_mode():
            out = model.generate(inputs, attention_mask=mask, max_new_tokens=count, **GREEDY)
        wanted = out[0, len(prompt) :].tolist()

        def scores(tokens: list[int], prompt: list[int] = prompt) -> torch.Tensor:
            with torch.inference_mode():
                return model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1]

        plain, drafted = (
            engine.generate([Request(prompt_ids=prompt, max_new_tokens=count, stop_ids=stops, draft=draft)])[0]
            for draft in (0, 8)
        )
        compare(checks, "open = transformers generate", plain.token_ids, wanted, scores, f"prompt {number}")
        compare(checks, "drafted = not drafted", drafted.token_ids, plain.token_ids, scores, f"prompt {number}")
        tell(number, len(prompts), "open")


def check_routed(
    checks: Checks, engine: Engine, routed: RoutedModel, prompts: Sequence[list[int]], count: int, draw: random.Random
) -> None:
    """Law 2: one random route a prompt, as deep as 25 % closed."""
    for number, prompt in enumerate(prompts):
        route = random_route(engine.weights.shape.blocks, draw)
        (got,) = engine.generate([Request(prompt_ids=prompt, max_new_tokens=count, route=route)])
        # If every token is the likeliest after those before it, greedy decoding without a cache gives the same ones.
        logits = twin_scores(routed, [*prompt, *got.token_ids[:-1]], route)[len(prompt) - 1 :]
        wanted = logits.argmax(-1).tolist()

        def scores(tokens: list[int], logits: torch.Tensor = logits) -> torch.Tensor:
            return logits[len(tokens)]

        compare(checks, "routed = routed model, no cache", got.token_ids, wanted, scores, f"prompt {number}")
        tell(number, len(prompts), "routed")


def check_batch(
    checks: Checks, engine: Engine, routed: RoutedModel, prompts: Sequence[list[int]], count: int, draw: random.Random
) -> None:
    """Law 3: sixteen rows of mixed routes together against each alone."""
    for start in range(0, len(prompts) - 15, 16):
        requests = [
            Request(prompt_ids=prompt, max_new_tokens=count, route=random_route(engine.weights.shape.blocks, draw))
            for prompt in prompts[start : start + 16]
        ]
        for number, (request, got) in enumerate(zip(requests, engine.generate(requests), strict=True)):
            (alone,) = engine.generate([request])

            def scores(tokens: list[int], request: Request = request) -> torch.Tensor:
                return twin_scores(routed, [*request.prompt_ids, *tokens], request.route or ())[-1]

            where = f"row {number} of batch {start // 16}"
            compare(checks, "batch of 16 = rows alone", got.token_ids, alone.token_ids, scores, where)
            tell(start + number, len(prompts), "batch")


def check_cache(
    checks: Checks,
    engine: Engine,
    routed: RoutedModel,
    prompts: Sequence[list[int]],
    routes: int,
    draw: random.Random,
) -> float:
    """Law 4: the last of four cached tokens' scores against recomputed ones. Return the largest difference seen."""
    widest = 0.0
    sampling = Sampling(logprobs=engine.weights.shape.vocab)
    for number in range(routes):
        prompt = prompts[number % len(prompts)][:64]
        route = random_route(engine.weights.shape.blocks, draw, draw.choice((0.1, 0.3, 0.6)))
        (got,) = engine.generate([Request(prompt_ids=prompt, max_new_tokens=4, route=route, sampling=sampling)])
        assert got.logprobs is not None
        wanted = torch.log_softmax(twin_scores(routed, [*prompt, *got.token_ids[:3]], route)[-1], -1)
        tokens, values = zip(*got.logprobs[3].top, strict=True)
        off = float((wanted[torch.tensor(tokens)] - torch.tensor(values)).abs().max())
        widest = max(widest, off)
        checks.note("cached = recomputed, random routes", off < TIE, f"route {number}", off)
        tell(number, routes, "cache")
    return widest


def tell(number: int, total: int, what: str) -> None:
    """Print progress now and then."""
    if number % 10 == 9:
        print(f"{what}: {number + 1} of {total}", file=sys.stderr, flush=True)


def main() -> None:
    """Check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--longest", type=int, default=160, help="context tokens")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--routes", type=int, default=200)
    parser.add_argument("--laws", default="open,routed,batch,cache")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    laws = options.laws.split(",")
    if unknown := set(laws) - {"open", "routed", "batch", "cache"}:
        parser.error(f"--laws: {', '.join(sorted(unknown))} is unknown; choose from open,routed,batch,cache")
    backbone = load_backbone(options.model, dtype="float32")
    prompts = prompts_of(options.data, backbone.tokenizer, options.prompts, options.longest)
    if "batch" in laws and len(prompts) < 16:
        parser.error(
            f"--prompts: {len(prompts)} are too few for a batch of 16; give more, or leave batch out of --laws"
        )
    # The engine shares the backbone's tensors; with LoRA at birth the routed model is the backbone.
    engine = Engine(Weights.from_model(backbone.model))
    checks, draw = Checks(), random.Random(0)
    if "open" in laws:
        check_open(checks, engine, backbone.model, prompts, options.new_tokens)
    routed = attach(backbone.model).eval()
    if "routed" in laws:
        check_routed(checks, engine, routed, prompts, options.new_tokens, draw)
    if "batch" in laws:
        check_batch(checks, engine, routed, prompts, options.new_tokens, draw)
    widest = check_cache(checks, engine, routed, prompts, options.routes, draw) if "cache" in laws else None
    document = {
        "model": options.model,
        "prompts": len(prompts),
        "new_tokens": options.new_tokens,
        "laws": checks.rows,
        "widest_logprob_difference": widest,
        "commit": commit(),
        "machine": describe_machine(),
    }
    if options.json:
        print(json.dumps(document))
        return
    for law, row in checks.rows.items():
        print(f"{law:<36} {row['equal']:>4} of {row['compared']}")
        for difference in row["differences"]:
            kind = "tie" if difference["tie"] else "NOT A TIE"
            gap = "other length" if difference["gap"] is None else f"gap {difference['gap']:.2e}"
            print(f"    {difference['where']}: {gap}, {kind}")
    if widest is not None:
        print(f"widest difference of a log-probability: {widest:.2e}")


if __name__ == "__main__":
    main()
