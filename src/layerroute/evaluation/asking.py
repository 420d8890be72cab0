"""The tasks: which held-out steps are asked, and what counts as right."""

import random
import re
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
LOOP: Task = "agent_loop"
SOLVED = re.compile(r"####[ \t]*([-$\d.,]+)\s*$")


@dataclass(frozen=True, slots=True)
class Question:
    """One step to answer: its context, and what is wrong with an answer (empty: nothing)."""

    task: Task
    kind: Kind
    conversation: str
    prompt_ids: tuple[int, ...]
    expected: str
    length: int  # tokens of `expected`
    judge: Judge

    @property
    def turns(self) -> tuple["Question"]:
        """The question itself: a loop of one turn."""
        return (self,)


@dataclass(frozen=True, slots=True)
class Loop:
    """A conversation that calls tools and talks, to be answered turn by turn in one session.

    Each turn follows on what the transcript says before it, whatever was answered: the tools' results would not fit
    other calls. It is right if every turn is: the calls where it calls, no call where it talks.
    """

    turns: tuple[Question, ...]

    @property
    def conversation(self) -> str:
        """Which conversation it is."""
        return self.turns[0].conversation

    @property
    def expected(self) -> str:
        """What the transcript says in all its turns."""
        return "\n".join(turn.expected for turn in self.turns)


Asked = Question | Loop


def questions_of(
    conversations: Sequence[Conversation], tokenizer: Any, options: EvaluationConfig
) -> dict[Task, list[Asked]]:
    """Return up to `task_limit` questions, or loops, of each task that `options` ask for, drawn by the seed.

    A step may be asked in several tasks. Steps longer than `max_length` are left out, as everywhere in an evaluation,
    and with them the loops that they are part of.
    """
    render = Renderer(tokenizer)
    pools: dict[Task, list[list[tuple[Turn, Judge]]]] = {task: [] for task in get_args(Task) if task in options.tasks}
    for conversation, turns in zip(conversations, turns_of(conversations, render), strict=True):
        judged = [(turn, _judges(turn)) for turn in turns]
        for turn, judges in judged:
            for task, judge in judges.items():
                if task in pools and task != LOOP:
                    pools[task].append([(turn, judge)])
        whole = len(judged) == sum(message.role == "assistant" for message in conversation.messages[1:])
        mixed = {turn.kind for turn, _ in judged} == set(KINDS)
        if LOOP in pools and whole and mixed and all(LOOP in judges for _, judges in judged):
            pools[LOOP].append([(turn, judges[LOOP]) for turn, judges in judged])
    found: dict[Task, list[Asked]] = {}
    for task, pool in pools.items():
        order = random.Random(f"{options.seed}/{task}").sample(range(len(pool)), len(pool))
        found[task] = []
        for judged_turns in (pool[index] for index in order):
            if len(found[task]) == options.task_limit:
                break
            asked = [_question(task, turn, judge, tokenizer) for turn, judge in judged_turns]
            if all(one.prompt_ids and len(one.prompt_ids) + one.length <= options.max_length for one in asked):
                found[task].append(Loop(tuple(asked)) if task == LOOP else asked[0])
    return found


def _question(task: Task, turn: Turn, judge: Judge, tokenizer: Any) -> Question:
    context, response = tokenizer([turn.context, turn.response], add_special_tokens=False)["input_ids"]
    return Question(task, turn.kind, turn.digest, tuple(context), turn.response, len(response), judge)


def _judges(turn: Turn) -> dict[Task, Judge]:
    message, tools = turn.message, turn.conversation.tools
    judges: dict[Task, Judge] = {}
    if message.tool_calls:
        expected = [ExpectedCall.like(call, tools) for call in message.tool_calls]
        judges["tool_calls"] = lambda text: judge_calls(text, expected)
    elif tools:
        judges["irrelevance"] = lambda text: RIGHT if calls_nothing(text) else "a call"
    if judges:
        judges[LOOP] = next(iter(judges.values()))
    solved = SOLVED.search(message.content) if turn.kind == KINDS[1] else None
    if solved and (answer := last_number(solved[1])) is not None:
        judges["gsm8k"] = lambda text: _judge_number(text, answer)
    return judges


def _judge_number(text: str, answer: Any) -> str:
    said = last_number(text)
    return "no number" if said is None else RIGHT if said == answer else "wrong number"
