"""Whether generated text does what its step asked for: calls compared as trees, answers as numbers.

A call is right if it names the function and gives each argument with the right type and an allowed value, no more
and no less. An argument whose schema declares a default may be left out or given where that changes nothing.
Calls of one turn may come in any order. Values compare as JSON does: 5 and 5.0 are one number, `true` and "5" are
none; lists in order, objects by key. Text compares without case and with blanks collapsed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from layerroute.data.conversation import ToolCall
from layerroute.data.rendering import parse_tool_calls

OMITTED = object()
"""Among the allowed values of an argument: it may be left out."""
NUMBER = re.compile(r"(?<!\d)-?(?:\d[\d,]*\.?\d*|\.\d+)")
RIGHT = ""


@dataclass(frozen=True, slots=True)
class ExpectedCall:
    """A call that is asked for: for each argument the values that are allowed."""

    name: str
    arguments: Mapping[str, Sequence[Any]]
    defaults: Mapping[str, Any]

    @classmethod
    def like(cls, call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> "ExpectedCall":
        """Return what allows exactly `call`, its tool's declared defaults known."""
        spec = next((tool for tool in tools if tool.get("name") == call.name), {})
        parameters = spec.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        declared = properties if isinstance(properties, Mapping) else {}
        defaults = {n: p["default"] for n, p in declared.items() if isinstance(p, Mapping) and "default" in p}
        return cls(call.name, {name: (value,) for name, value in call.arguments.items()}, defaults)


def judge_calls(text: str, expected: Sequence[ExpectedCall]) -> str:
    """Return what is wrong with the calls in generated `text`, in a few words; empty if nothing is."""
    said, calls = parse_tool_calls(text)
    if calls and "<tool_call>" in said:
        return "a call that can't be read"
    return compare_calls(calls, expected)


def compare_calls(calls: Sequence[ToolCall], expected: Sequence[ExpectedCall]) -> str:
    """Return what is wrong with `calls`, whatever their order; empty if nothing is."""
    if not calls:
        return "no call"
    if len(calls) != len(expected):
        return "too few calls" if len(calls) < len(expected) else "too many calls"
    wrongs = [[compare(call, wanted) for wanted in expected] for call in calls]
    if _pairs_up([[not wrong for wrong in row] for row in wrongs]):
        return RIGHT
    # Of a call that fits nothing, say what keeps it from the expected call that is nearest: same name first.
    lost = next((row for row in wrongs if all(row)), wrongs[0])
    return next((wrong for wrong in lost if wrong and wrong != "wrong name"), "wrong name")


def compare(call: ToolCall, expected: ExpectedCall) -> str:
    """Return what is wrong with one call; empty if nothing is."""
    if call.name != expected.name:
        return "wrong name"
    for name, value in call.arguments.items():
        allowed = expected.arguments.get(name)
        if allowed is None:
            if name not in expected.defaults or not same(value, expected.defaults[name]):
                return "argument too many"
        elif not any(same(value, each) for each in allowed):
            return "wrong value" if any(_type(value) == _type(each) for each in allowed) else "wrong type"
    for name, allowed in expected.arguments.items():
        if name in call.arguments or OMITTED in allowed:
            continue
        if name not in expected.defaults or not any(same(expected.defaults[name], each) for each in allowed):
            return "argument missing"
    return RIGHT


def same(a: Any, b: Any) -> bool:
    """Return whether two JSON values are one and the same argument."""
    if _type(a) != _type(b):
        return False
    if isinstance(a, str):
        return " ".join(a.split()).casefold() == " ".join(b.split()).casefold()
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def calls_nothing(text: str) -> bool:
    """Return whether generated `text` neither calls a tool nor tries to."""
    return "<tool_call>" not in text and not parse_tool_calls(text)[1]


def last_number(text: str) -> Decimal | None:
    """Return the last number in `text`, thousands separators left out; None without one."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return {str: "string", list: "array", tuple: "array", dict: "object", type(None): "null"}.get(type(value), "other")


def _pairs_up(fits: Sequence[Sequence[bool]]) -> bool:
    """Return whether each row can have a column of its own that fits it (augmenting paths)."""
    taken: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in seen:
                seen.add(column)
                if column not in taken or place(taken[column], seen):
                    taken[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))
