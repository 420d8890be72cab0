"""The full benchmark, part by part: rows, skip rates, route classes, drafts and peers, all on the same steps."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from layerroute.inference.batching import PREFILL_TOKENS
from layerroute.inference.classes import RouteClasses
from layerroute.inference.drafting import replay
from layerroute.inference.engine import Engine
from layerroute.inference.measuring import (
    against,
    bytes_per_pass,
    compare,
    decode_flops,
    even_route,
    prefill_flops,
    record_graphs,
    share_of_stream,
    spread,
    stream_bandwidth,
    timed,
)
from layerroute.inference.peers import Generate, Missing, time_peer
from layerroute.inference.requests import Request
from layerroute.inference.routers import Route

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
CLASSES = 3
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Example:
    """A step as token ids: its context, and the response that was really given."""

    context: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bench:
    """One engine, steps of each kind, and how much to run.

    `skip` is the share of blocks that evenly spread routes skip, None to let the routers decide. All contexts of a
    measurement are cut from the left to one length, so that rows and engines do the same work.
    """

    engine: Engine
    examples: Mapping[str, Sequence[Example]]
    skip: float | None
    new_tokens: int
    repeats: int
    say: Say

    @property
    def open(self) -> Route:
        """The route that runs every block."""
        return (True,) * self.engine.weights.shape.blocks

    def mean_pass(self, cost: Callable[[Sequence[Route]], float], routes: Sequence[Route]) -> float:
        """Return the mean `cost` of the passes that decode rows on `routes`; one of them may run every block."""
        first, passes = not self.engine.scheduler.gates.config.reads_context, self.new_tokens - 1
        return (first * cost([self.open] * len(routes)) + (passes - first) * cost(routes)) / passes

    def contexts(self, kind: str, rows: int, most: int | None = None) -> list[tuple[int, ...]]:
        """Return `rows` contexts of `kind`, steps repeated if need be, all as long as the shortest of them.

        They are never longer than can be prefilled together: else some would decode while others are still read.
        """
        steps = self.examples[kind]
        chosen = [steps[number % len(steps)].context for number in range(rows)]
        length = min([len(context) for context in chosen] + ([most] if most else []) + [PREFILL_TOKENS // rows])
        return [context[-length:] for context in chosen]

    def ask(self, contexts: Sequence[Sequence[int]], routes: Sequence[Route | None]) -> list[Request]:
        """Return one request for each context under its route; None lets the routers decide."""
        return [
            Request(prompt_ids=context, max_new_tokens=self.new_tokens, route=route)
            for context, route in zip(contexts, routes, strict=True)
        ]


def time_rows(bench: Bench, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Time prefill and decode of each kind at each batch size, all gates open against routed."""
    weights, blocks = bench.engine.weights, len(bench.open)
    cells = []
    for kind in bench.examples:
        for rows in batches:
            bench.say(f"rows: {kind}, {rows} together")
            contexts = bench.contexts(kind, rows)
            length = len(contexts[0])
            forced = None if bench.skip is None else even_route(blocks, bench.skip)
            asked = {"open": bench.ask(contexts, [bench.open] * rows), "routed": bench.ask(contexts, [forced] * rows)}
            record_graphs(bench.engine, asked.values())
            prefills: list[dict[str, float]] = []
            decodes: list[dict[str, float]] = []
            streams: list[float] = []
            routes = {"open": [bench.open] * rows}
            contexts_by = {"open": [bench.open] * rows}  # contexts follow the route under scope `step` alone
            for _ in range(bench.repeats):
                took = {name: timed(bench.engine, requests) for name, requests in asked.items()}
                streams.append(stream_bandwidth(weights.device))
                routes["routed"] = [result.route for result in took["routed"][2]]
                contexts_by["routed"] = [result.context_route for result in took["routed"][2]]
                prefills.append({name: part[0] for name, part in took.items()})
                decodes.append({name: part[1] / (bench.new_tokens - 1) for name, part in took.items()})
            middle = length + bench.new_tokens / 2
            moved = {
                name: bench.mean_pass(partial(bytes_per_pass, weights, length=middle), those)
                for name, those in routes.items()
            }
            work = {name: sum(prefill_flops(weights, r, length) for r in those) for name, those in contexts_by.items()}
            flops = {name: bench.mean_pass(partial(decode_flops, weights), those) for name, those in routes.items()}
            decode = compare(decodes, rows, moved)
            skipped = sum(not gate for route in routes["routed"] for gate in route) / rows / blocks
            cells.append(
                {
                    "kind": kind,
                    "rows": rows,
                    "context_tokens": length,
                    "skip_rate": skipped,
                    "prefill": {**compare(prefills, rows * length, work), "flops": work},
                    "decode": {
                        **decode,
                        "bytes_per_token": {name: size / rows for name, size in moved.items()},
                        "ideal_speedup_by_flops": flops["open"] / flops["routed"],
                        "share_of_stream": share_of_stream(decodes, streams, moved),
                    },
                }
            )
    return cells


def time_skip_rates(bench: Bench) -> list[dict[str, Any]]:
    """Time one row at each skip rate of evenly spread blocks, and say what share of the ideal speed-up it gets."""
    weights, blocks = bench.engine.weights, len(bench.open)
    bench.say("skip rates: " + ", ".join(f"{100 * rate:.0f} %" for rate in RATES))
    context = bench.contexts(next(iter(bench.examples)), 1)
    length = len(context[0])
    routes = {rate: even_route(blocks, rate) for rate in RATES}
    turns: list[dict[float, tuple[float, float]]] = []
    ran: dict[float, Route] = {}  # by the context
    record_graphs(bench.engine, [bench.ask(context, [route]) for route in routes.values()])
    for _ in range(bench.repeats):
        turn = {rate: timed(bench.engine, bench.ask(context, [route])) for rate, route in routes.items()}
        ran |= {rate: results[0].context_route for rate, (*_, results) in turn.items()}
        turns.append({rate: (prefill, decode) for rate, (prefill, decode, _) in turn.items()})
    points = []
    for rate, route in routes.items():
        point: dict[str, Any] = {"asked": rate, "skip_rate": 1 - sum(route) / blocks}
        costs = {
            "prefill": [prefill_flops(weights, those, length) for those in (bench.open, ran[rate])],
            "decode": [
                bench.mean_pass(partial(bytes_per_pass, weights, length=length), [those])
                for those in (bench.open, route)
            ],
        }
        for number, (name, (whole, part)) in enumerate(costs.items()):
            pairs = [{"open": turn[0.0][number], "routed": turn[rate][number]} for turn in turns]
            ratio, ideal = against(pairs, "open", "routed"), whole / part
            point[name] = {**ratio, "ideal_speedup": ideal, "share_of_ideal": ratio["speedup"] / ideal}
        points.append(point)
    return points


def time_classes(bench: Bench, rows: int, most_context: int = 128) -> dict[str, Any]:
    """Decode twice `rows` steps, half of each kind, `rows` at a time: open, exact routes, and route classes.

    Without routers every tool call closes its own random blocks and planning closes none.
    """
    kinds = list(bench.examples)
    weights, count = bench.engine.weights, 2 * rows // len(kinds)
    halves = [bench.contexts(kind, count, most_context) for kind in kinds]
    length = min(len(context) for half in halves for context in half)
    contexts = [context[-length:] for group in zip(*halves, strict=True) for context in group]
    exact = _exact_routes(bench, contexts, kinds)
    classes = RouteClasses.learn(exact, CLASSES)
    engines = {
        "open": (Engine(weights, max_rows=rows), [bench.open] * len(contexts)),
        "exact": (Engine(weights, max_rows=rows), exact),
        "classes": (Engine(weights, max_rows=rows, classes=classes), [classes.round(route) for route in exact]),
    }
    bench.say(
        f"classes: {len(contexts)} steps, {rows} together, {len(set(exact))} routes, {len(classes.routes)} classes"
    )
    for engine, those in engines.values():
        record_graphs(engine, [bench.ask(contexts, those)])
    turns: list[dict[str, float]] = []
    for _ in range(bench.repeats):
        turns.append({n: timed(engine, bench.ask(contexts, routes))[1] for n, (engine, routes) in engines.items()})
    tokens = len(contexts) * (bench.new_tokens - 1)
    table: dict[str, Any] = {name: spread([turn[name] for turn in turns], tokens) for name in engines}
    whole = decode_flops(weights, [bench.open] * len(contexts))
    for name, (_, routes) in engines.items():
        table[name]["skip_rate"] = 1 - sum(map(sum, routes)) / len(routes) / len(bench.open)
        table[name] |= against(turns, "open", name)
        table[name]["ideal_speedup_by_flops"] = whole / decode_flops(weights, routes)
    return {
        "rows": rows,
        "steps": len(contexts),
        "exact_routes": len(set(exact)),
        "route_classes": len(classes.routes),
        **table,
    }


def time_drafts(bench: Bench, draft: int, stop_ids: frozenset[int]) -> dict[str, Any]:
    """Decode steps of each kind one by one, with and without a draft; and count what a perfect model would gain.

    `tokens_per_pass` is what the engine's own text gave, `replayed_tokens_per_pass` what the real response gives.
    """
    table: dict[str, Any] = {}
    forced = None if bench.skip is None else bench.open
    for kind, steps in bench.examples.items():
        bench.say(f"drafts: {kind}, {len(steps)} steps, up to {draft} tokens")
        plain_seconds, draft_seconds, ratios, tokens, kept, drafted, equal = 0.0, 0.0, [], 0, 0, 0, 0
        for step in steps:
            asked = [
                Request(
                    prompt_ids=step.context,
                    max_new_tokens=bench.new_tokens,
                    stop_ids=stop_ids,
                    route=forced,
                    draft=size,
                )
                for size in (0, draft)
            ]
            record_graphs(bench.engine, [[request] for request in asked])
            plain, quick = (bench.engine.generate([request])[0] for request in asked)
            if len(plain.token_ids) < 2:
                continue
            plain_seconds, draft_seconds = plain_seconds + plain.decode_seconds, draft_seconds + quick.decode_seconds
            ratios.append(plain.decode_seconds / quick.decode_seconds)
            tokens, kept = tokens + len(quick.token_ids) - 1, kept + quick.kept_tokens
            drafted, equal = drafted + quick.drafted_tokens, equal + (plain.token_ids == quick.token_ids)
        told = [step for step in steps if len(step.response) > 1]
        passes = sum(replay(step.context, step.response, draft) for step in told)
        table[kind] = {
            "steps": len(ratios),
            "equal": equal,
            "plain_tokens_per_second": tokens / plain_seconds if ratios else None,
            "draft_tokens_per_second": tokens / draft_seconds if ratios else None,
            "speedup": median(ratios) if ratios else None,
            "drafted_tokens": drafted,
            "kept_tokens": kept,
            "tokens_per_pass": tokens / (tokens - kept) if ratios else None,
            "replayed_tokens_per_pass": sum(len(step.response) - 1 for step in told) / passes if passes else None,
        }
    return {"draft": draft, "kinds": table}


def time_peers(bench: Bench, peers: Mapping[str, Generate | str], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Time the engine with all gates open beside every peer, in turns, on the same contexts."""
    cells = []
    kind = next(iter(bench.examples))
    for rows in batches:
        contexts = bench.contexts(kind, rows)
        requests = bench.ask(contexts, [bench.open] * rows)
        running = {name: peer for name, peer in peers.items() if not isinstance(peer, str)}
        absent = {name: peer for name, peer in peers.items() if isinstance(peer, str)}
        turns: list[dict[str, tuple[float, float]]] = []
        record_graphs(bench.engine, [requests])
        for turn in range(bench.repeats):
            bench.say(f"peers: {rows} together, turn {turn + 1} of {bench.repeats}")
            took = {"layerroute": timed(bench.engine, requests)[:2]}
            for name, generate in list(running.items()):
                try:
                    took[name] = time_peer(generate, contexts, bench.new_tokens)
                except Missing as reason:
                    absent[name] = str(reason)
                    del running[name]
            turns.append(took)
        cell: dict[str, Any] = {"rows": rows, "context_tokens": len(contexts[0])}
        for name in ("layerroute", *running):
            prefill, decode = ([turn[name][part] for turn in turns] for part in (0, 1))
            cell[name] = {
                "prefill": spread(prefill, rows * len(contexts[0])),
                "decode": spread(decode, rows * (bench.new_tokens - 1)),
            }
        cells.append({**cell, "absent": absent})
    return cells


def _exact_routes(bench: Bench, contexts: Sequence[Sequence[int]], kinds: Sequence[str]) -> list[Route]:
    if bench.skip is None:
        asked = [Request(prompt_ids=context, max_new_tokens=2) for context in contexts]
        return [result.route for result in bench.engine.generate(asked)]
    blocks, draw = len(bench.open), random.Random(0)
    routes = []
    for number in range(len(contexts)):
        tool = kinds[number % len(kinds)] == "tool_call"
        closed = set(draw.sample(range(blocks), round(blocks * bench.skip))) if tool else set()
        routes.append(tuple(block not in closed for block in range(blocks)))
    return routes
