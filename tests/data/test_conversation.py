"""OpenAI chat rows: what is read, and that every malformed thing says where it is."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerroute.data.conversation import Message, ToolCall, kind_of, parse_conversation, parse_tools
from layerroute.data.sources import load_conversations
from layerroute.errors import DataError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


def calling(call: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}


@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": {"y": [1, null]}}'}},
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": {"y": [1, None]}}}},
        {"name": "f", "arguments": {"x": {"y": [1, None]}}},
        {"name": "f", "arguments": '{"x": {"y": [1, null]}}'},
    ],
)
def test_calls_in_every_spelling(call: dict[str, Any]) -> None:
    message = parse_conversation(calling(call), "a:1").messages[1]
    assert message == Message("assistant", "", (ToolCall("f", {"x": {"y": [1, None]}}),))


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_a_call_without_arguments(arguments: Any) -> None:
    message = parse_conversation(calling({"name": "f", "arguments": arguments}), "a:1").messages[1]
    assert message.tool_calls == (ToolCall("f", {}),)


def test_roles_content_and_names() -> None:
    row = {
        "id": 7,
        "split": "test",
        "source": "s",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            USER,
            {"role": "assistant", "tool_calls": [{"name": "f"}]},
            {"role": "tool", "tool_call_id": "1", "name": "f", "content": "3"},
            {"role": "function", "name": "f", "content": "4"},
            REPLY,
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}, {"name": "g", "parameters": {}}],
    }
    found = parse_conversation(row, "a:1")
    assert [m.role for m in found.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert [m.content for m in found.messages] == ["Be brief.", "Hi", "", "3", "4", "Hello"]
    assert found.messages[3].name == "f"
    assert found.tools == ({"name": "f"}, {"name": "g", "parameters": {}})
    assert (found.id, found.split, found.source) == ("7", "test", "s")
    assert [kind_of(m) for m in found.messages if m.role == "assistant"] == ["tool_call", "planning"]


def test_what_is_missing_gets_defaults() -> None:
    found = parse_conversation({"messages": [USER, REPLY]}, "a:1")
    assert (found.id, found.tools, found.source, found.split) == ("a:1", (), "", None)


def test_a_weight_of_null_is_none_given() -> None:
    rows = [USER, {**REPLY, "weight": None}, USER, {**REPLY, "weight": 0}]
    assert [m.weight for m in parse_conversation({"messages": rows}, "a:1").messages] == [1, 1, 1, 0]


def test_a_thought_with_a_call_is_a_tool_call() -> None:
    assert kind_of(Message("assistant", "Let me see.", (ToolCall("f", {}),))) == "tool_call"


def test_results_stand_in_the_order_of_their_calls() -> None:
    calls = [{"id": city, "function": {"name": f"in_{city}", "arguments": {}}} for city in ("oslo", "rome", "bern")]
    results = [{"role": "tool", "tool_call_id": city, "content": city} for city in ("rome", "bern", "oslo")]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    row = {"messages": [{"role": "user", "content": "Warm?"}, said, *results, {"role": "assistant", "content": "No."}]}
    found = parse_conversation(row, "x").messages
    assert [(m.content, m.name) for m in found[2:5]] == [(city, f"in_{city}") for city in ("oslo", "rome", "bern")]
    for call, result in zip(calls, results, strict=True):
        call["id"], result["tool_call_id"] = {"no": "text"}, {"no": "text"}
    assert [m.content for m in parse_conversation(row, "x").messages[2:5]] == ["rome", "bern", "oslo"]


def test_the_older_list_of_functions_is_the_tools() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert parse_conversation(row | {"functions": [{"name": "get"}]}, "x").tools == ({"name": "get"},)


def test_the_older_function_call_is_a_tool_call() -> None:
    said = {"role": "assistant", "content": "Let me look.", "function_call": {"name": "get", "arguments": '{"n": 1}'}}
    (message,) = parse_conversation({"messages": [USER, said]}, "here").messages[1:]
    assert message.tool_calls == (ToolCall("get", {"n": 1}),)


def test_tools_as_a_json_string() -> None:
    assert parse_tools('[{"name": "f"}]', "a:1") == ({"name": "f"},)
    assert parse_tools([{"name": "f", "parameters": '{"type": "object"}'}], "a:1")[0]["parameters"] == {
        "type": "object"
    }
    assert parse_tools(None, "a:1") == parse_tools("", "a:1") == parse_tools([], "a:1") == ()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "'messages' must be a non-empty list"),
        ({"messages": []}, "'messages' must be a non-empty list"),
        ({"messages": "Hi"}, "'messages' must be a non-empty list"),
        ({"messages": ["Hi"]}, r"messages\[0\] must be an object .* not str"),
        (
            {"messages": [USER, {"role": "asistant", "content": "x"}]},
            r"messages\[1\]: unknown role 'asistant'. Did you",
        ),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [REPLY, USER]}, r"messages\[0\] is the assistant's"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"messages\[1\]: the assistant says nothing"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, r"messages\[1\]: 'content' must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]}, r"messages\[0\].*image_url"),
        ({"messages": [{**USER, "tool_calls": [{"name": "f"}]}, REPLY]}, "only the assistant calls tools"),
        ({"messages": [USER, {**REPLY, "tool_calls": "f"}]}, "'tool_calls' must be a list"),
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, r"messages\[1\]: 'weight' is 0.5; it is 1, or 0"),
        (calling("f"), r"messages\[1\].tool_calls\[0\]: a call needs the 'name'"),
        (calling({"arguments": {}}), "a call needs the 'name'"),
        (calling({"name": "f", "arguments": "{x}"}), r"tool_calls\[0\]: arguments: not valid JSON"),
        (calling({"name": "f", "arguments": [1]}), "'arguments' must be an object, not list"),
        ({"messages": [USER, REPLY], "tools": {"name": "f"}}, "'tools' must be a list of function specs, not dict"),
        ({"messages": [USER, REPLY], "tools": [{"type": "function"}]}, r"tools\[0\] has no 'name'"),
        ({"messages": [USER, REPLY], "tools": [{"name": ""}]}, r"tools\[0\] has no 'name'"),
        ({"messages": [USER, REPLY], "tools": [{"name": "f", "parameters": [1]}]}, r"tools\[0\]: 'parameters' must be"),
        (
            {"messages": [USER, REPLY], "tools": [{"name": "f", "parameters": "x"}]},
            r"tools\[0\]: parameters: not valid",
        ),
        ({"messages": [USER, REPLY], "tools": "[{"}, "tools: not valid JSON"),
    ],
)
def test_malformed_rows(row: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        parse_conversation(row, "talks.jsonl:7")
    assert str(caught.value).startswith("talks.jsonl:7: ")


def test_conversations_and_the_generator_need_no_heavy_import() -> None:
    code = (
        "import sys, layerroute.data.conversation, layerroute.data.generator, layerroute.data.preview; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_numbers_that_json_has_not_and_parts_that_are_no_text_are_refused() -> None:
    def row(**said: object) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **said}]}

    call = {"function": {"name": "get", "arguments": '{"n": NaN}'}}
    with pytest.raises(DataError, match="NaN is no JSON number"):
        parse_conversation(row(tool_calls=[call]), "x")
    with pytest.raises(DataError, match="a part of 'content' is tool_use"):
        parse_conversation(row(content=[{"type": "tool_use", "name": "get"}]), "x")
    with pytest.raises(DataError, match="says nothing"):
        parse_conversation(row(content=" \n "), "x")
    tools = [{"type": "function", "name": "get"}]
    assert parse_conversation(row(content="b") | {"tools": tools}, "x").tools == ({"name": "get"},)


def test_a_number_that_json_has_not_is_a_bad_row_from_any_file(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    said = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}
    rows = [{"messages": [{"role": "user", "content": "a"}, said]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:1: a value of a call or a tool that JSON can't write"):
        load_conversations(str(tmp_path / "a.parquet"))
