"""Tasks, top to bottom: an adapter answers held-out steps by generating, blocks really skipped, and is judged.

The same questions are answered under the adapter's own routes, with every gate open, and perhaps by another adapter,
so that accuracies are paired.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerroute.config import KINDS
from layerroute.data.conversation import Conversation
from layerroute.data.rendering import stop_ids
from layerroute.errors import ConfigError, DataError
from layerroute.evaluation.asking import Question, questions_of
from layerroute.evaluation.metrics import Bootstrap, Interval, accuracy, mean
from layerroute.evaluation.options import EvaluationConfig
from layerroute.inference.engine import Engine
from layerroute.inference.loading import load_engine
from layerroute.inference.requests import Request, Result
from layerroute.models.adapter import read_manifest

CHUNK = 32  # questions given to the engine at once; it batches them
TIMED_TOKENS = 32
SHOWN = 5  # wrong answers kept for reading

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one way of running said to a question."""

    text: str
    wrong: str  # what is wrong with it; empty: nothing
    skip_rate: float
    tokens: int
    cut_off: bool


def run_tasks(
    adapter: str | Path,
    conversations: Sequence[Conversation],
    options: EvaluationConfig,
    *,
    model: str | None = None,
    device: str = "cpu",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Return {"tasks": ..., "seconds_per_token": ...} of the adapter in `adapter`, ready for JSON.

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
    engine, backbone = load_engine(adapter, model=model, dtype=options.dtype, device=device)
    asked = questions_of(conversations, backbone.tokenizer, options)
    for task, questions in asked.items():
        if not questions:
            raise DataError(f"tasks: no step of {', '.join(options.data)} suits {task!r}. Leave it out, or add data.")
    everything = [question for questions in asked.values() for question in questions]
    ways = {"routed": answer(engine, backbone.tokenizer, everything, options, opened=False, name="routed")}
    ways["open"] = answer(engine, backbone.tokenizer, everything, options, opened=True, name="gates open")
    timed = time_kinds(engine, everything, options, say)
    del engine
    if options.against is not None:
        other, backbone = load_engine(options.against, model=model, dtype=options.dtype, device=device)
        ways["against"] = answer(other, backbone.tokenizer, everything, options, opened=False, name="against")
    found, start = {}, 0
    for task, questions in asked.items():
        own = {way: answers[start : start + len(questions)] for way, answers in ways.items()}
        found[task] = judge_task(questions, own, options)
        start += len(questions)
    return {"tasks": found, "seconds_per_token": timed}


def answer(
    engine: Engine, tokenizer: Any, questions: Sequence[Question], options: EvaluationConfig, *, opened: bool, name: str
) -> list[Answer]:
    """Answer `questions` greedily, in order; `opened` runs every block."""
    from tqdm.auto import tqdm

    ends, route = stop_ids(tokenizer), (True,) * engine.weights.shape.blocks if opened else None
    room = engine.weights.shape.positions
    answers: list[Answer] = []
    with tqdm(total=len(questions), desc=f"answering, {name}", unit="step", dynamic_ncols=True) as bar:
        for start in range(0, len(questions), CHUNK):
            chunk = questions[start : start + CHUNK]
            requests = [
                Request(
                    prompt_ids=question.prompt_ids,
                    max_new_tokens=min(options.task_tokens, room - len(question.prompt_ids)),
                    stop_ids=ends,
                    route=route,
                )
                for question in chunk
            ]
            for question, result in zip(chunk, engine.generate(requests), strict=True):
                answers.append(_answer(question, result, tokenizer))
            bar.update(len(chunk))
    return answers


def judge_task(
    questions: Sequence[Question], ways: Mapping[str, Sequence[Answer]], options: EvaluationConfig
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
        "cut_off": {way: statistics.fmean(a.cut_off for a in answers) for way, answers in ways.items()},
        "answers": {
            "conversations": bootstrap.groups.tolist(),
            "right": {way: "".join("01"[bool(one)] for one in each) for way, each in right.items()},
        },
        "examples": [{"wrong": a.wrong, "expected": q.expected, "said": a.text} for q, a in wrong[:SHOWN]],
    }


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


def _answer(question: Question, result: Result, tokenizer: Any) -> Answer:
    ids = result.token_ids[:-1] if result.finish_reason == "stop" else result.token_ids
    text = tokenizer.decode(ids, skip_special_tokens=False)  # some tokenizers count <tool_call> among the special ones
    skipped = mean(~torch.tensor(result.route)) or 0.0
    return Answer(text, question.judge(text), skipped, len(result.token_ids), result.finish_reason == "length")


def _check_same_backbone(adapter: str | Path, other: str | Path) -> None:
    own, against = read_manifest(adapter), read_manifest(other)
    if own.fingerprint != against.fingerprint:
        raise ConfigError(
            f"--against: {other} was trained on {against.base!r} and {adapter} on {own.base!r}; their answers are not "
            "paired. Give an adapter of the same backbone."
        )


def _plain(found: Interval) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high}
