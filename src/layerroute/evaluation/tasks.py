"""Tasks, top to bottom: an adapter answers held-out steps by generating, blocks really skipped, and is judged.

The same questions are answered under the adapter's own routes, with every gate open, and perhaps by another adapter,
so that accuracies are paired.
"""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layerroute.config import KINDS
from layerroute.data.conversation import Conversation
from layerroute.errors import ConfigError, DataError
from layerroute.evaluation.answering import Answer, answer
from layerroute.evaluation.asking import Asked, Loop, Question, questions_of
from layerroute.evaluation.metrics import Bootstrap, Interval, accuracy
from layerroute.evaluation.options import EvaluationConfig
from layerroute.inference.engine import Engine
from layerroute.inference.graphs import GraphDecoder
from layerroute.inference.loading import load_engine
from layerroute.inference.measuring import record_graphs
from layerroute.inference.requests import Request
from layerroute.models.adapter import read_manifest

TIMED_TOKENS = 32
SHOWN = 5  # wrong answers kept for reading

Say = Callable[[str], None]


def run_tasks(
    adapter: str | Path,
    conversations: Sequence[Conversation],
    options: EvaluationConfig,
    *,
    model: str | None = None,
    device: str = "cpu",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Return {"tasks": ..., "seconds_per_token": ..., "seconds_per_loop": ..., "tasks_dtype": ...}, ready for JSON.

    Args:
        adapter: the adapter.
        conversations: held-out conversations.
        options: which tasks, how many steps, and against which adapter.
        model: a backbone to use instead of the one the adapter names.
        device: a torch device.
        say: called with lines of progress.

    Raises:
        ConfigError: `against` is an adapter of another backbone.
        DataError: no step suits a task.
    """
    if options.against is not None:
        _check_same_backbone(adapter, options.against)
    engine, backbone = load_engine(adapter, model=model, dtype=options.dtype, device=device, fallback=options.fallback)
    dtype = str(engine.weights.dtype).removeprefix("torch.")
    asked = questions_of(conversations, backbone.tokenizer, options)
    for task, questions in asked.items():
        if not questions:
            raise DataError(f"tasks: no step of {', '.join(options.data)} suits {task!r}. Leave it out, or add data.")
    everything = [question for questions in asked.values() for question in questions]
    longest = max(len(turn.prompt_ids) for question in everything for turn in question.turns)
    if longest >= (room := engine.weights.shape.positions):
        raise ConfigError(
            f"--max-length: a context of {longest} tokens leaves no room for an answer in the {room} positions of "
            f"{backbone.name}. Give at most {room - 1}."
        )
    ways = {"routed": answer(engine, backbone.tokenizer, everything, options, opened=False, name="routed")}
    ways["open"] = answer(engine, backbone.tokenizer, everything, options, opened=True, name="gates open")
    timed = {
        "seconds_per_token": time_kinds(engine, [one for one in everything if isinstance(one, Question)], options, say),
        "seconds_per_loop": time_loops(engine, [one for one in everything if isinstance(one, Loop)], options, say),
    }
    del engine
    if options.against is not None:
        other, backbone = load_engine(options.against, model=model, dtype=options.dtype, device=device)
        ways["against"] = answer(other, backbone.tokenizer, everything, options, opened=False, name="against")
    found, start = {}, 0
    for task, questions in asked.items():
        own = {way: answers[start : start + len(questions)] for way, answers in ways.items()}
        found[task] = judge_task(questions, own, options)
        start += len(questions)
    return {"tasks": found, **timed, "tasks_dtype": dtype}


def judge_task(
    questions: Sequence[Asked], ways: Mapping[str, Sequence[Answer]], options: EvaluationConfig
) -> dict[str, Any]:
    """Return how well each way answers, and how routing compares with the others on the same questions."""
    bootstrap = Bootstrap.over([question.conversation for question in questions], options.bootstrap, options.seed)
    right = {way: torch.tensor([not each.wrong for each in answers]) for way, answers in ways.items()}
    routed = ways["routed"]
    wrong = [(q, a) for q, a in zip(questions, routed, strict=True) if a.wrong]
    return {
        "steps": len(questions),
        "conversations": len({question.conversation for question in questions}),
        "accuracy": {way: _plain(accuracy(each, bootstrap)) for way, each in right.items()},
        "routed_minus": {
            way: _plain(accuracy(right["routed"], bootstrap, each)) for way, each in right.items() if way != "routed"
        },
        "wrong": {way: dict(Counter(a.wrong for a in answers if a.wrong)) for way, answers in ways.items()},
        "skip_rate": {way: statistics.fmean(a.skip_rate for a in answers) for way, answers in ways.items()},
        "tokens": {way: statistics.fmean(a.tokens for a in answers) for way, answers in ways.items()},
        "fallback_tokens": {way: statistics.fmean(a.fallback_tokens for a in answers) for way, answers in ways.items()},
        "cut_off": {way: statistics.fmean(a.cut_off for a in answers) for way, answers in ways.items()},
        "answers": {
            "questions": digest_of(questions),
            "groups": bootstrap.groups.tolist(),
            "right": {way: "".join("01"[bool(one)] for one in each) for way, each in right.items()},
        },
        "examples": [{"wrong": a.wrong, "expected": q.expected, "said": a.text} for q, a in wrong[:SHOWN]],
    }


def digest_of(questions: Sequence[Asked]) -> str:
    """Return what tells these questions, in this order, from others."""
    told = [[(turn.prompt_ids, turn.expected) for turn in question.turns] for question in questions]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def time_kinds(engine: Engine, questions: Sequence[Question], options: EvaluationConfig, say: Say) -> dict[str, Any]:
    """Return seconds a context token and a decoded token for each kind, routed and open, one row at a time.

    The two take turns on the same contexts, and each decodes the same number of tokens, so that only the blocks
    that run differ. Medians over steps; the speed-up is the median of the steps' own ratios.
    """
    found: dict[str, Any] = {}
    count, blocks, room = options.timed_steps, engine.weights.shape.blocks, engine.weights.shape.positions
    for kind in KINDS:
        fits = [q for q in questions if q.kind == kind and len(q.prompt_ids) + TIMED_TOKENS < room][:count]
        if not fits:
            continue
        say(f"timing {len(fits)} steps of kind {kind}, routed against open")
        taken: dict[str, list[tuple[float, float]]] = {"routed": [], "open": []}
        for number, question in enumerate(fits):
            for way in ("routed", "open") if number % 2 else ("open", "routed"):
                route = (True,) * blocks if way == "open" else None
                request = Request(prompt_ids=question.prompt_ids, max_new_tokens=TIMED_TOKENS + 1, route=route)
                record_graphs(engine, [[request]])
                (result,) = engine.generate([request])
                context, new = len(question.prompt_ids), TIMED_TOKENS
                taken[way].append((result.prefill_seconds / context, result.decode_seconds / new))
        found[kind] = {"steps": len(fits)}
        for place, part in enumerate(("prefill", "decode")):
            own, opened = ([pair[place] for pair in taken[way]] for way in ("routed", "open"))
            found[kind][part] = {
                "routed": statistics.median(own),
                "open": statistics.median(opened),
                "speedup": statistics.median(b / a for a, b in zip(own, opened, strict=True)),
            }
    return found


def time_loops(engine: Engine, loops: Sequence[Loop], options: EvaluationConfig, say: Say) -> dict[str, Any]:
    """Return the seconds that whole loops take, routed and open, one at a time, each in a session of its own.

    The two take turns on the same loops. Each turn reads what the transcript adds, owed keys and values included, and
    decodes as many tokens as the transcript's own. Medians over loops; the speed-up is the median of their own ratios.
    """
    chosen = loops[: options.timed_steps]
    if not chosen:
        return {}
    say(f"timing {len(chosen)} loops, routed against open")
    taken: dict[str, list[float]] = {"routed": [], "open": []}
    for number, loop in enumerate(chosen):
        for way in ("routed", "open") if number % 2 else ("open", "routed"):
            route = (True,) * engine.weights.shape.blocks if way == "open" else None
            if engine.decoder == GraphDecoder.name:
                _play(engine, loop, route)  # records the graphs
            taken[way].append(_play(engine, loop, route))
    return {
        "loops": len(chosen),
        "turns": sum(len(loop.turns) for loop in chosen),
        **{way: statistics.median(seconds) for way, seconds in taken.items()},
        "speedup": statistics.median(b / a for a, b in zip(taken["routed"], taken["open"], strict=True)),
    }


def _play(engine: Engine, loop: Loop, route: tuple[bool, ...] | None) -> float:
    """Return the seconds of prefill and decode that all turns of `loop` take in a session of their own."""
    session, seconds = engine.session(), 0.0
    for turn in loop.turns:
        request = Request(prompt_ids=turn.prompt_ids, max_new_tokens=turn.length, route=route, session=session)
        (result,) = engine.generate([request])
        seconds += result.prefill_seconds + result.decode_seconds
    session.close()
    return seconds


def _check_same_backbone(adapter: str | Path, other: str | Path) -> None:
    own, against = read_manifest(adapter), read_manifest(other)
    if own.fingerprint != against.fingerprint:
        raise ConfigError(
            f"--against: {other} was trained on {against.base!r} and {adapter} on {own.base!r}; their answers are not "
            "paired. Give an adapter of the same backbone."
        )


def _plain(found: Interval) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high}
