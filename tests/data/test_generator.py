"""The built-in generator: deterministic, correct, diverse, and held-out tools only in test."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from random import Random
from typing import Any

import pytest

from layerroute.data import phrases
from layerroute.data.catalogue import HELD_OUT, Tool
from layerroute.data.catalogue_work import CHAINS, KNOWN
from layerroute.data.conversation import Conversation, ToolCall, kind_of
from layerroute.data.generator import generate
from layerroute.data.preview import summary
from layerroute.data.problems import ARITHMETIC, REASONING, arithmetic
from layerroute.data.slots import AS_WRITTEN, OBJECTS, draw_value, parse_slots
from layerroute.data.sources import load_conversations, messages_hash
from layerroute.data.toolbox import (
    NAME_STYLES,
    draw_request,
    draw_result,
    fields_of,
    is_imperative,
    make_offer,
    said_of,
)

TALKS = generate(2000)
TYPES: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
}  # fmt: skip
tools = pytest.mark.parametrize("tool", [*KNOWN, *HELD_OUT], ids=lambda tool: f"{tool.domain}.{tool.nouns}")


def calls() -> list[tuple[Conversation, int, ToolCall]]:
    return [(c, i, call) for c in TALKS for i, m in enumerate(c.messages) for call in m.tool_calls]


def digest(conversations: list[Conversation]) -> str:
    return sha256(repr(conversations).encode()).hexdigest()


def check(value: Any, schema: dict[str, Any]) -> None:
    assert isinstance(value, TYPES[schema["type"]])
    assert isinstance(value, bool) == (schema["type"] == "boolean")
    assert value != ""
    if "enum" in schema:
        assert value in schema["enum"]
    if schema["type"] == "array":
        assert value
        for item in value:
            check(item, schema["items"])
    if schema["type"] == "object":
        assert set(schema.get("required", ())) <= set(value) <= set(schema["properties"])
        for name, item in value.items():
            check(item, schema["properties"][name])


def test_one_conversation_depends_on_seed_and_index_alone() -> None:
    assert generate(5, seed=3, start=20) == generate(30, seed=3)[20:25]
    assert [c.id for c in generate(2, seed=3, start=20)] == ["builtin-3-20", "builtin-3-21"]
    assert generate(3) != generate(3, seed=1)
    assert generate(0) == []


def test_the_hash_seed_of_the_process_does_not_matter() -> None:
    code = (
        "import hashlib; from layerroute.data.generator import generate; "
        "print(hashlib.sha256(repr(generate(60)).encode()).hexdigest())"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        assert done.stdout.decode().strip() == digest(generate(60))


def test_splits_go_by_index_and_share_no_step() -> None:
    assert Counter(c.split for c in TALKS) == {"train": 1600, "validation": 200, "test": 200}
    many = [*TALKS, *generate(4000, start=20_000)]
    counts = summary(many)["conversations"]
    assert counts["in_two_splits"] == counts["steps_in_two_splits"] == 0
    assert len({messages_hash(c) for c in many}) > 0.98 * len(many)


def test_the_source_passes_the_splits_on() -> None:
    found, report = load_conversations("builtin:40", split="test")
    assert (len(found), report.kept, report.rows) == (4, 4, 40)
    assert found == [c for c in generate(40) if c.split == "test"]


def test_held_out_tools_are_in_test_alone() -> None:
    assert not {tool.domain for tool in HELD_OUT} & {tool.domain for tool in KNOWN}
    fresh = {name for tool in HELD_OUT for name in names(tool)}
    known = {name for tool in KNOWN for name in names(tool)}
    assert not fresh & known
    held = [c for c in TALKS if {tool["name"] for tool in c.tools} & fresh]
    assert {c.split for c in held} == {"test"}
    assert len(held) > 0.4 * sum(c.split == "test" for c in TALKS)


def names(tool: Tool) -> set[str]:
    random = Random(0)
    return {make_offer(tool, style, detail=0, random=random).name for style in NAME_STYLES for _ in range(60)}


def test_every_call_fits_a_tool_on_offer() -> None:
    for talk, _, call in calls():
        specs = {tool["name"]: tool["parameters"] for tool in talk.tools}
        assert len(specs) == len(talk.tools)
        check(call.arguments, specs[call.name])


def test_every_argument_is_said_before_the_call() -> None:
    for talk, index, call in calls():
        said = "\n".join(m.content + json.dumps([c.arguments for c in m.tool_calls]) for m in talk.messages[:index])
        for value in leaves(call.arguments):
            assert any(form in said for form in spellings(value)), (value, said)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def spellings(value: Any) -> list[str]:
    if isinstance(value, bool):
        return [""]  # said by a clause such as "as a draft"
    if isinstance(value, (int, float)):
        word = [phrases.NUMBER_WORDS[value]] if isinstance(value, int) and value < len(phrases.NUMBER_WORDS) else []
        return [str(value), f"{value:.1f}", f"{value:.2f}", *word]
    if match := re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", value):
        return [value, f"{int(match[3])} ", f" {int(match[3])}, {match[1]}"]
    if match := re.fullmatch(r"(\d\d):(\d\d)", value):
        return [value, f"{(int(match[1]) - 1) % 12 + 1}"]
    pool = [
        entry.split("~") for entries in phrases.POOLS.values() for entry in entries if entry.startswith(f"{value}~")
    ]
    return [value, value.replace("_", " "), *(form for entry in pool for form in entry[1:])]


def test_kinds_are_even_and_share_tools_on_offer() -> None:
    turns = [(kind_of(m), bool(c.tools)) for c in TALKS for m in c.messages if m.role == "assistant"]
    count = Counter(kind for kind, _ in turns)
    assert 0.45 < count["tool_call"] / len(turns) < 0.55
    offered = Counter(kind for kind, tools in turns if tools)
    assert offered["planning"] / offered.total() > 0.4
    assert any(not tools for _, tools in turns)
    both = sum(len({kind_of(m) for m in c.messages if m.role == "assistant"}) == 2 for c in TALKS)
    assert both > 0.4 * len(TALKS)


def test_lengths_of_both_kinds_overlap() -> None:
    lengths: dict[str, list[int]] = {"tool_call": [], "planning": []}
    for c in TALKS:
        size = len(json.dumps(c.tools))
        for m in c.messages:
            if m.role == "assistant" and c.tools:
                lengths[kind_of(m)].append(size)
            size += len(m.content) + 20
    low, high = (sorted(values) for values in lengths.values())
    for share in (0.1, 0.5, 0.9):
        a, b = (values[int(share * len(values))] for values in (low, high))
        assert 0.75 < a / b < 1.33


def test_it_is_diverse() -> None:
    assert len({tool.domain for tool in (*KNOWN, *HELD_OUT)}) >= 30
    train = [c for c in TALKS if c.split == "train"]
    assert len({tool["name"] for c in train for tool in c.tools}) > 600
    first = Counter(next(m.content for m in c.messages if m.role == "user") for c in TALKS)
    assert len(first) > 0.9 * len(TALKS)
    types = {s["type"] for c in train for tool in c.tools for s in tool["parameters"]["properties"].values()}
    assert types == set(TYPES)
    assert {len(c.tools) for c in TALKS} == {0, 1, 2, 3, 4}
    assert {len(m.tool_calls) for c in TALKS for m in c.messages} == {0, 1, 2}


def test_conversations_are_well_formed() -> None:
    for c in TALKS:
        roles = [m.role for m in c.messages if m.role != "system"]
        assert roles[0] == "user"
        assert roles[-1] == "assistant"
        assert all("{" not in m.content and "[" not in m.content for m in c.messages if m.role in ("user", "assistant"))
        open_calls: list[str] = []
        for m in c.messages:
            if m.role == "tool":
                assert m.name == open_calls.pop(0)
                json.loads(m.content)
            else:
                assert not open_calls
                open_calls = [call.name for call in m.tool_calls]


# The tables


@tools
def test_requests_hold_what_a_call_needs(tool: Tool) -> None:
    slots = parse_slots(tool.slots)
    required = {slot.name for slot in slots if not slot.optional}
    assert required
    assert any(is_imperative(ask) for ask in tool.asks)
    for ask in tool.asks:
        always = set(fields_of(re.sub(r"\[[^\]]*\]", "", ask)))
        mentioned = set(re.findall(r"\{(\w+)[}=]", ask))
        assert always == required
        assert mentioned <= {slot.name for slot in slots}
    assert is_imperative(tool.vague)
    assert set(fields_of(tool.vague)) < required
    results = {slot.name for slot in parse_slots(tool.result)}
    for reply in tool.replies:
        assert set(fields_of(reply)) <= required | results
        assert set(fields_of(reply)) & results or "{" in reply


@tools
def test_optional_parameters_are_passed_when_said(tool: Tool) -> None:
    random = Random(1)
    for _ in range(40):
        offer = make_offer(tool, random.choice(NAME_STYLES), detail=random.randrange(3), random=random)
        request = draw_request(offer, random)
        assert set(request.values) <= set(offer.names)
        check(offer.call(request.values).arguments, offer.spec["parameters"])
        for name, value in request.values.items():
            assert isinstance(value.value, bool) or value.text in request.text, name


@tools
def test_two_values_of_one_type_differ(tool: Tool) -> None:
    kinds = {slot.name: slot.type for slot in parse_slots(tool.slots)}
    for seed in range(60):
        values = draw_request(make_offer(tool, "snake", detail=0, random=Random(seed)), Random(seed)).values
        drawn = [(kinds[name], repr(value.value)) for name, value in values.items() if kinds[name] != "flag"]
        assert len(set(drawn)) == len(drawn)


@tools
def test_results_fit_the_request_and_are_told_as_written(tool: Tool) -> None:
    types = {slot.name: slot.type for line in (tool.slots, tool.result) for slot in parse_slots(line)}
    for seed in range(300):
        random = Random(seed)
        request = draw_request(make_offer(tool, "snake", detail=0, random=random), random)
        result = draw_result(request, random)
        said = said_of(request.offer, request.values, result, random)
        values = {name: value.value for name, value in request.values.items()}
        for name, value in (request.values | result).items():
            if types[name] in AS_WRITTEN and value.text.lower() in said.lower():
                assert value.text in said
        got = {name: value.value for name, value in result.items()}
        assert got.get("price", 0) <= values.get("max_price", got.get("price", 0))
        assert got.get("starts", "99:99") >= values.get("after", "00:00")
        assert "manager" not in got or got["manager"] != values["name"]
        assert "top" not in got or values.get("site", "") in got["top"]
        assert "email" not in got or got["email"].startswith(values["name"].lower())
        for name in ("newest", "first"):
            assert got.get(name, "").endswith(values.get("extension", "")) or name not in got


@tools
def test_what_is_asked_is_told_from_the_pattern_and_not_from_a_name(tool: Tool) -> None:
    verbs = {ask.split()[0] for ask in tool.asks if is_imperative(ask)}
    for seed in range(60):
        request = draw_request(make_offer(tool, "snake", detail=0, random=Random(seed)), Random(seed))
        assert request.imperative == (request.text.split()[0] in verbs)


def test_small_talk_begins_no_sentence_with_a_common_noun() -> None:
    for remark, answers in phrases.CHITCHAT:
        for text in (remark, *answers):
            assert not re.search(r"(^|[.!?] )\{(genre|topic|meeting|dish)\}", text)


def test_chains_link_parameters_that_exist() -> None:
    keys = [f"{tool.domain}/{tool.nouns.split('|')[0]}" for tool in KNOWN]
    assert len(set(keys)) == len(keys)
    by_key = dict(zip(keys, KNOWN, strict=True))
    for chain in CHAINS:
        first, second = by_key[chain.first], by_key[chain.second]
        required = [{s.name for s in parse_slots(tool.slots) if not s.optional} for tool in (first, second)]
        said = fields_of(chain.ask)
        assert {name[2:] for name in said if name[0] == "a"} == required[0]
        assert {name[2:] for name in said if name[0] == "b"} | set(chain.linked) | set(chain.fixed) == required[1]
        assert set(chain.linked.values()) <= {s.name for s in parse_slots(first.result)}


def test_every_type_can_be_drawn_and_no_value_is_empty() -> None:
    used = {s.type for tool in (*KNOWN, *HELD_OUT) for s in (*parse_slots(tool.slots), *parse_slots(tool.result))}
    for kind in sorted((used | set(phrases.POOLS) | set(OBJECTS)) - {"flag"}):  # which a pattern says
        for seed in range(30):
            drawn = draw_value(kind, Random(seed))
            assert drawn.text
            assert all(leaf != "" for leaf in leaves(drawn.value))


# Problems


@pytest.mark.parametrize("problem", ARITHMETIC, ids=lambda p: p.__name__)
def test_every_line_of_a_solution_is_right(problem: Any) -> None:
    for seed in range(200):
        question, lines, result = problem(Random(seed))
        assert question.endswith("?")
        assert isinstance(result, int)
        assert result >= 0
        found = None
        for line in lines:
            for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = \$?(\d+)", line):
                assert eval(left) == int(right), line
                found = int(right)
        assert found == result or f"{result}" in lines[-1]
        assert len(re.findall(r"\d+", question)) >= 3


def test_worked_answers_end_in_the_result() -> None:
    question, answer = arithmetic(Random(5))
    assert re.fullmatch(r"#### \d+", answer.splitlines()[-1])
    assert question not in answer


@pytest.mark.parametrize("problem", REASONING, ids=lambda p: p.__name__)
def test_sums_in_reasoned_answers_are_right(problem: Any) -> None:
    for seed in range(200):
        question, answer = problem(Random(seed))
        assert question
        assert answer
        assert "{" not in question + answer
        for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = \$?(\d+)", answer):
            assert eval(left) == int(right), answer


def test_dates_and_clocks_are_right() -> None:
    from datetime import date, datetime, timedelta

    by_name = {problem.__name__: problem for problem in REASONING}
    for seed in range(200):
        question, answer = by_name["_calendar"](Random(seed))
        named = re.search(r"It is (\w+ \d+) in.* in (\d+) days", question)
        assert named
        end = datetime.strptime(f"{named[1]} 2025", "%B %d %Y").date() + timedelta(days=int(named[2]))
        assert f"The date is {end:%B} {end.day}." in answer
        question, answer = by_name["_weekday"](Random(seed))
        named = re.search(r"Today is (\w+) and.* in (\d+) days", question)
        assert named
        start = next(day for day in (date(2024, 1, n) for n in range(1, 8)) if f"{day:%A}" == named[1])
        assert f"Answer: {start + timedelta(days=int(named[2])):%A}." in answer
        question, answer = by_name["_duration"](Random(seed))
        named = re.search(r"starts at (\d+:\d+) and takes (\d+) minutes", question)
        assert named
        over = datetime.strptime(named[1], "%H:%M") + timedelta(minutes=int(named[2]))
        assert f"It is over at {over.hour}:{over:%M}." in answer


def test_the_meeting_hour_is_the_only_free_one() -> None:
    by_name = {problem.__name__: problem for problem in REASONING}
    for seed in range(100):
        question, answer = by_name["_meeting"](Random(seed))
        first, second, _ = question.split(". ", 2)
        busy = set(re.findall(r"\d+:00", first)) | set(re.findall(r"\d+:00", second))
        free = [f"{hour}:00" for hour in range(9, 17) if f"{hour}:00" not in busy]
        assert len(free) == 1
        assert answer.endswith(f"They can meet at {free[0]}.")


def test_a_plan_uses_the_days_there_are() -> None:
    by_name = {problem.__name__: problem for problem in REASONING}
    for seed in range(100):
        question, answer = by_name["_project"](Random(seed))
        parts = [tuple(map(int, part)) for part in re.findall(r"(\d+) days?, from day (\d+) to day (\d+)", answer)]
        days = int(re.findall(r"within (\d+) working days", question)[0])
        assert sum(part[0] for part in parts) == parts[-1][2] == days
        assert all(count == last - first + 1 > 0 for count, first, last in parts)
        shares = [int(share) for share in re.findall(r"in the ratio ([\d:]+)", question)[0].split(":")]
        exact = [days * share / sum(shares) for share in shares]
        assert all(abs(part[0] - share) < 1 for part, share in zip(parts, exact, strict=True))


def test_a_message_has_no_leftover_marks() -> None:
    assert not any("~" in m.content for c in TALKS for m in c.messages)
