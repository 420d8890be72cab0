"""Do our judgement of function calls and BFCL's own checker agree on the same outputs?

Needs the checker and its questions, and nothing that they need: pip install --no-deps bfcl-eval

Outputs are made from each question's accepted answer: as it is, in other order, with text in capitals, and with one
thing wrong. With --model a backbone's own answers to some questions are judged too. A question whose accepted
arguments are nested alternatives, or none, is left out and counted. Ends in one table, or in one JSON document.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from layerroute.data.conversation import Conversation, Message, ToolCall
from layerroute.data.rendering import Renderer, parse_tool_calls, stop_ids, with_calls
from layerroute.data.steps import turns_of
from layerroute.evaluation.matching import OMITTED, ExpectedCall, judge_calls
from layerroute.inference import Engine, Request, Weights
from layerroute.machine import commit
from layerroute.models.loading import load_backbone

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple")
SHOWN = 3  # disagreements kept of each change

Calls = list[ToolCall]


@dataclass(frozen=True, slots=True)
class Question:
    """A question of BFCL: what is asked, the tools, and for each call the values that are allowed."""

    name: str
    category: str
    text: str
    tools: list[dict[str, Any]]
    answer: list[dict[str, dict[str, list[Any]]]]  # "" among the values: the argument may be left out

    @property
    def expected(self) -> list[ExpectedCall]:
        """The answer in our own words."""
        return [
            ExpectedCall(name, {k: [OMITTED if v == "" else v for v in values] for k, values in each.items()}, {})
            for call in self.answer
            for name, each in call.items()
        ]

    @property
    def calls(self) -> Calls:
        """The accepted calls, every argument given its first value."""
        return [
            ToolCall(name, {k: values[0] for k, values in each.items() if values[0] != ""})
            for call in self.answer
            for name, each in call.items()
        ]


def checker() -> tuple[Callable[..., dict[str, Any]], Any, Path]:
    """Return BFCL's checker, its name for Python, and where its questions are."""
    # Its table of models imports the client of every vendor; the checker asks it only whether a model may say ".".
    stub = ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = {"ours": argparse.Namespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
    sys.modules[stub.__name__] = stub
    try:
        import bfcl_eval
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    except ImportError as error:
        raise SystemExit(f"{error}. Install it with: pip install --no-deps bfcl-eval") from error
    return ast_checker, Language.PYTHON, Path(bfcl_eval.__path__[0]) / "data"


def read_questions(folder: Path, category: str, left_out: Counter[str]) -> Iterator[Question]:
    """Yield the questions of one category."""
    asked, answers = (
        [json.loads(line) for line in (folder / part / f"BFCL_v4_{category}.json").read_text("utf-8").splitlines()]
        for part in ("", "possible_answer")
    )
    truth = {row["id"]: row["ground_truth"] for row in answers}
    for row in asked:
        answer = truth[row["id"]]
        lists = [allowed for call in answer for each in call.values() for allowed in each.values()]
        if any(not allowed or any(_nested(value) for value in allowed) for allowed in lists):
            left_out[category] += 1
            continue
        text = " ".join(message["content"] for message in row["question"][0])
        yield Question(row["id"], category, text, row["function"], answer)


def _nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(_nested(each) for each in value))


def changed(calls: Calls) -> Iterator[tuple[str, Calls]]:
    """Yield outputs made from accepted calls, each with the name of what was done to them."""
    yield "as accepted", calls
    yield "no call", []
    yield "a call twice", [*calls, calls[0]]
    if len(calls) > 1:
        yield "other order", calls[::-1]
        yield "a call left out", calls[:-1]
    first, *rest = calls
    yield "other name", [ToolCall(first.name + "_2", first.arguments), *rest]
    yield "argument too many", [ToolCall(first.name, {**first.arguments, "extra_argument": 1}), *rest]
    for name, value in first.arguments.items():
        for change, new in _other_values(value):
            yield change, [ToolCall(first.name, {**first.arguments, name: new}), *rest]
        left = {k: v for k, v in first.arguments.items() if k != name}
        yield "argument left out", [ToolCall(first.name, left), *rest]


def _other_values(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield "other truth value", not value
        yield "truth value as text", str(value)
    elif isinstance(value, (int, float)):
        yield "other number", value + 7
        yield "number as text", str(value)
        if isinstance(value, float) and value.is_integer():
            yield "whole float as integer", int(value)
        if isinstance(value, int):
            yield "integer as float", float(value)
    elif isinstance(value, str):
        yield "other text", value + " xyz"
        yield "text in capitals", value.upper()
        yield "text with blanks around", f" {value} "
        yield "text without its punctuation", "".join(c for c in value if c not in ",./-_*^")
    elif isinstance(value, list) and value:
        yield "list cut short", value[:-1]
        if value != value[::-1]:
            yield "list reversed", value[::-1]


def answers_of(model: str, questions: Sequence[Question], new_tokens: int) -> Iterator[tuple[Question, str]]:
    """Yield what a backbone says to each question, greedily."""
    from tqdm.auto import tqdm

    backbone = load_backbone(model, dtype="bfloat16")
    engine, render = Engine(Weights.from_model(backbone.model)), Renderer(backbone.tokenizer)
    ends = stop_ids(backbone.tokenizer)
    for question in tqdm(questions, desc="answering", unit="question"):
        messages = (Message("user", question.text), Message("assistant", "", tuple(question.calls)))
        (turn,) = turns_of(Conversation(question.name, messages, tuple(question.tools)), render)
        ids = backbone.tokenizer(turn.context, add_special_tokens=False)["input_ids"]
        (result,) = engine.generate([Request(prompt_ids=ids, max_new_tokens=new_tokens, stop_ids=ends)])
        yield question, backbone.tokenizer.decode([i for i in result.token_ids if i not in ends])


def main() -> None:
    """Judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="also judge this backbone's own answers")
    parser.add_argument("--answers", type=int, default=100, help="questions that it answers, evenly drawn")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    check, language, folder = checker()
    left_out: Counter[str] = Counter()
    questions = [q for category in CATEGORIES for q in read_questions(folder, category, left_out)]
    outputs = [(q, name, with_calls("", calls)) for q in questions for name, calls in changed(q.calls)]
    if options.model:
        drawn = questions[:: max(1, len(questions) // options.answers)][: options.answers]
        outputs += [
            (q, f"said by {options.model}", text) for q, text in answers_of(options.model, drawn, options.new_tokens)
        ]
    rows: dict[str, dict[str, Any]] = {}
    for question, name, text in outputs:
        wrong = judge_calls(text, question.expected)
        said = [{call.name: call.arguments} for call in parse_tool_calls(text)[1]]
        verdict = check(question.tools, said, question.answer, language, question.category, "ours")
        row = rows.setdefault(name, {"outputs": 0, "right": 0, "right for BFCL": 0, "same": 0, "differences": []})
        row["outputs"] += 1
        row["right"] += not wrong
        row["right for BFCL"] += verdict["valid"]
        row["same"] += (not wrong) == verdict["valid"]
        if (not wrong) != verdict["valid"] and len(row["differences"]) < SHOWN:
            own = wrong or "right"
            row["differences"].append({"question": question.name, "said": said, "ours": own, "BFCL": verdict["error"]})
    document = {"questions": len(questions), "left_out": dict(left_out), "rows": rows, "commit": commit()}
    if options.json:
        print(json.dumps(document))
        return
    print(f"{len(questions)} questions; left out: {dict(left_out)}")
    print(f"{'output':<30} {'count':>6} {'right':>6} {'BFCL':>6} {'same':>6}")
    for name, row in rows.items():
        counts = " ".join(f"{row[key]:>6}" for key in ("outputs", "right", "right for BFCL", "same"))
        print(f"{name:<30} {counts}")
    for name, row in rows.items():
        for each in row["differences"]:
            print(f"  {name}: {each['question']}: ours: {each['ours']}, BFCL: {each['BFCL']}, said {each['said']}")


if __name__ == "__main__":
    main()
