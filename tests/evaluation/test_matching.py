"""What counts as a right call and a right number."""

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerroute.data.conversation import ToolCall
from layerroute.data.rendering import with_calls
from layerroute.evaluation.matching import (
    OMITTED,
    ExpectedCall,
    calls_nothing,
    compare,
    compare_calls,
    judge_calls,
    last_number,
    same,
)

names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6)
scalars = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=5
)
calls = st.builds(ToolCall, names, st.dictionaries(names, values, max_size=4))
OTHER_TYPE = {str: 5, bool: "true", int: "5", float: "5", list: "x", dict: "x", type(None): 0}


def expected(*given_calls, tools=()):
    return [ExpectedCall.like(call, tools) for call in given_calls]


def call(name="get", **arguments):
    return ToolCall(name, arguments)


@given(st.lists(calls, min_size=1, max_size=4), st.randoms())
def test_the_calls_of_a_turn_match_themselves_in_any_order(turn, draw):
    shuffled = draw.sample(turn, len(turn))
    assert compare_calls(shuffled, expected(*turn)) == ""


@given(st.lists(calls, min_size=1, max_size=3))
def test_what_the_model_is_taught_to_say_is_judged_right(turn):
    assert judge_calls(with_calls("", turn), expected(*turn)) == ""
    assert judge_calls(with_calls("Let me see.", turn), expected(*turn)) == ""


@given(calls.filter(lambda each: each.arguments), st.data())
def test_another_type_or_a_missing_or_an_added_argument_is_wrong(right, data):
    name = data.draw(st.sampled_from(sorted(right.arguments)))
    (wanted,) = expected(right)
    other = right.arguments | {name: OTHER_TYPE[type(right.arguments[name])]}
    assert compare(ToolCall(right.name, other), wanted) == "wrong type"
    without = {key: value for key, value in right.arguments.items() if key != name}
    assert compare(ToolCall(right.name, without), wanted) == "argument missing"
    assert compare(ToolCall(right.name, right.arguments | {"another_one": 1}), wanted) == "argument too many"
    assert compare(ToolCall(right.name + "s", right.arguments), wanted) == "wrong name"


@given(values, values)
def test_same_is_symmetric_and_survives_json(a, b):
    assert same(a, b) == same(b, a)
    assert same(a, json.loads(json.dumps(a)))


@pytest.mark.parametrize(
    ("a", "b", "alike"),
    [
        (5, 5.0, True),
        (5, 6, False),
        (1, True, False),
        ("5", 5, False),
        ("New York", " new  york", True),
        ("New York", "Newark", False),
        ([1, 2], [2, 1], False),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
        (None, "", False),
    ],
)
def test_values_compare_as_json_does(a, b, alike):
    assert same(a, b) is alike


def test_allowed_values_are_alternatives_and_may_allow_leaving_out():
    wanted = ExpectedCall("get", {"city": ("Oslo", "Oslo, Norway"), "unit": ("C", OMITTED)}, {})
    assert compare(call(city="Oslo, Norway", unit="C"), wanted) == ""
    assert compare(call(city="Oslo"), wanted) == ""
    assert compare(call(city="Bergen"), wanted) == "wrong value"
    assert compare(call(city="Oslo", unit="F"), wanted) == "wrong value"
    assert compare(call(unit="C"), wanted) == "argument missing"


def test_a_declared_default_may_be_given_or_left_out_and_nothing_else():
    tools = [{"name": "get", "parameters": {"properties": {"city": {}, "unit": {"default": "C"}}}}]
    (bare,), (full,) = expected(call(city="Oslo"), tools=tools), expected(call(city="Oslo", unit="C"), tools=tools)
    assert compare(call(city="Oslo", unit="C"), bare) == ""
    assert compare(call(city="Oslo"), full) == ""
    assert compare(call(city="Oslo", unit="F"), bare) == "argument too many"
    (other,) = expected(call(city="Oslo", unit="F"), tools=tools)
    assert compare(call(city="Oslo"), other) == "argument missing"


def test_parallel_calls_are_paired_up_and_not_just_each_found():
    a, b = ExpectedCall("get", {"n": (1, 2)}, {}), ExpectedCall("get", {"n": (1,)}, {})
    assert compare_calls([call(n=1), call(n=2)], [a, b]) == ""  # the first must give way to the second
    assert compare_calls([call(n=2), call(n=2)], [a, b]) == "wrong value"
    assert compare_calls([call(n=1), call(n=1), call(n=2)], [a, b]) == "too many calls"
    assert compare_calls([call(n=1)], [a, b]) == "too few calls"
    assert compare_calls([], [a]) == "no call"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "get", "arguments": {"n": 1}}\n</tool_call>',
        '<tool_call>{"name": "get", "arguments": {"n": 1}}',
        '```json\n{"name": "get", "arguments": {"n": 1}}\n```',
        '[{"name": "get", "parameters": {"n": 1}}]',
        '{"name": "get", "arguments": "{\\"n\\": 1}"}',
    ],
)
def test_calls_are_read_from_tags_fences_and_bare_json(text):
    assert judge_calls(text, expected(call(n=1))) == ""
    assert judge_calls(text, expected(call(n=2))) == "wrong value"
    assert not calls_nothing(text)


@pytest.mark.parametrize("broken", ['<tool_call>{"name": "drop", "argum', "<tool_call>{x: 1}</tool_call>"])
def test_a_right_call_beside_one_that_cannot_be_read_is_wrong(broken):
    right = '<tool_call>{"name": "get", "arguments": {"n": 1}}</tool_call>'
    assert judge_calls(right, expected(call(n=1))) == ""
    assert judge_calls(right + broken, expected(call(n=1))) == "a call that can't be read"
    assert judge_calls(broken + right, expected(call(n=1))) == "a call that can't be read"


@pytest.mark.parametrize(
    ("text", "nothing"),
    [
        ("I can't do that.", True),
        ("", True),
        ("The call would be get(1).", True),
        ('<tool_call>\n{"name": "get", "argum', False),  # tried to, and failed
        ("Sure. <tool_call>", False),
    ],
)
def test_trying_to_call_counts_as_calling(text, nothing):
    assert calls_nothing(text) is nothing
    assert judge_calls(text, expected(call(n=1))) == "no call"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 4 = 7.\n#### 7", "7"),
        ("That makes $1,234.50 in all.", "1234.50"),
        ("It falls to -4", "-4"),
        ("between 3-5", "5"),
        ("a half is .5", ".5"),
        ("12 apples, so many", "12"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@given(st.integers(-(10**9), 10**9), st.text(st.characters(categories=["Lu", "Ll", "Zs"]), max_size=20))
def test_the_last_number_is_found_however_it_is_written(number, tail):
    assert last_number(f"7 and then {number:,} {tail}") == number
    assert last_number(f"#### {number}.00") == number
