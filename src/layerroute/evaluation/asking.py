"""The tasks: which held-out steps are asked, and what counts as right."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from layerroute.config import KINDS, Kind
from layerroute.data.conversation import Conversation
from layerroute.data.rendering import Renderer
from layerroute.data.steps import Turn, turns_of
from layerroute.evaluation.matching import RIGHT, ExpectedCall, calls_nothing, judge_calls, last_number
from layerroute.evaluation.options import EvaluationConfig, Task

Judge = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Question:
    """One step to answer: its context, and what is wrong with an answer (empty: nothing)."""

    task: Task
    kind: Kind
    conversation: str
    prompt_ids: tuple[int, ...]
    expected: str
    judge: Judge


def questions_of(
    conversations: Sequence[Conversation], tokenizer: Any, options: EvaluationConfig
) -> dict[Task, list[Question]]:
    """Return up to `task_limit` questions of each task that `options` ask for, drawn by the seed.

    A step may be asked in two tasks. Steps longer than `max_length` are left out, as everywhere in an evaluation.
    """
    render = Renderer(tokenizer)
    pools: dict[Task, list[tuple[Turn, Judge]]] = {task: [] for task in get_args(Task) if task in options.tasks}
    for conversation in conversations:
        for turn in turns_of(conversation, render):
            for task, judge in _judges(turn).items():
                if task in pools:
                    pools[task].append((turn, judge))
    found: dict[Task, list[Question]] = {}
    for task, pool in pools.items():
        order = random.Random(f"{options.seed}/{task}").sample(range(len(pool)), len(pool))
        found[task] = []
        for turn, judge in (pool[index] for index in order):
            if len(found[task]) == options.task_limit:
                break
            context, response = tokenizer([turn.context, turn.response], add_special_tokens=False)["input_ids"]
            if context and len(context) + len(response) <= options.max_length:
                found[task].append(Question(task, turn.kind, turn.digest, tuple(context), turn.response, judge))
    return found


def _judges(turn: Turn) -> dict[Task, Judge]:
    message, tools = turn.message, turn.conversation.tools
    judges: dict[Task, Judge] = {}
    if message.tool_calls:
        expected = [ExpectedCall.like(call, tools) for call in message.tool_calls]
        judges["tool_calls"] = lambda text: judge_calls(text, expected)
    elif tools:
        judges["irrelevance"] = lambda text: RIGHT if calls_nothing(text) else "a call"
    if turn.kind == KINDS[1] and "####" in message.content:
        answer = last_number(message.content)
        judges["gsm8k"] = lambda text: _judge_number(text, answer)
    return judges


def _judge_number(text: str, answer: Any) -> str:
    said = last_number(text)
    return "no number" if said is None else RIGHT if said == answer else "wrong number"
