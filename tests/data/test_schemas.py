"""Row shapes: each is told from its fields, mapped whole, and refused when it can't be understood."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerroute.data.conversation import Conversation, Message, ToolCall, kind_of, parse_conversation
from layerroute.data.preview import preview_rows, quantiles, shorten
from layerroute.data.schemas import SHAPES, read_literal, shape_of, to_chat_row
from layerroute.errors import DataError

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
HERMES_SYSTEM = (
    "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML "
    "tags. You may call one or more functions. Here are the available tools:\n<tools>\n{tools}\n</tools>\n"
    'For each call return <tool_call>\n{{"name": <function-name>}}\n</tool_call>'
)


def read(row: dict[str, Any]) -> Conversation:
    return parse_conversation(to_chat_row(row, "f:1"), "f:1")


def hermes(system: str, reply: str, **more: Any) -> dict[str, Any]:
    turns = [("system", system), ("human", "Rain in Oslo?"), ("gpt", reply)]
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **more}


def glaive(chat: str, system: str = "") -> dict[str, Any]:
    return {"system": system, "chat": chat}


def test_chat_rows_are_left_alone() -> None:
    row = {"messages": [], "question": "?", "answer": "!"}
    assert to_chat_row(row, "f:1") is row


def test_calls_in_tags_of_a_chat_row_are_calls() -> None:
    tagged = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": tagged, "weight": 0}]
    (_, answer) = read({"messages": messages}).messages
    assert answer == Message("assistant", "Let me look.", (ToolCall("weather", {"city": "Oslo"}),), weight=0)
    with pytest.raises(DataError, match=r"^f:1: messages\[1\]: a <tool_call> is never closed"):
        read({"messages": [messages[0], {"role": "assistant", "content": "<tool_call> opens a call"}]})


def test_chat_messages_under_conversations_keep_their_calls_and_weights() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call], "weight": 0},
        {"role": "tool", "tool_call_id": "1", "content": "no"},
        {"role": "assistant", "content": "No."},
    ]
    found = read({"conversations": messages, "tools": [WEATHER]})
    assert found == read({"messages": messages, "tools": [WEATHER]})
    assert [kind_of(message) for message in found.messages if message.role == "assistant"] == ["tool_call", "planning"]


def test_hermes_turns_keep_their_weight() -> None:
    row = hermes("Be kind.", "No.")
    row["conversations"][-1]["weight"] = 0
    assert [message.weight for message in read(row).messages] == [1, 1, 0]


def test_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"^f:1: the fields \(foo, bar\) match no known row shape") as caught:
        to_chat_row({"foo": 1, "bar": 2}, "f:1")
    assert all(shape in str(caught.value) for shape in SHAPES.values())


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "weather", "arguments": {"city": "Oslo"}}',
        "{'arguments': {'city': 'Oslo'}, 'name': 'weather'}",
        '{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}',
    ],
)
def test_hermes_calls_in_json_and_in_python_spelling(call: str) -> None:
    row = hermes("Be kind.", f"I look it up.\n<tool_call>\n{call}\n</tool_call>", tools=json.dumps([WEATHER]))
    conversation = read(row)
    assert conversation.tools == (WEATHER,)
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant"]
    assert conversation.messages[2] == Message("assistant", "I look it up.", (ToolCall("weather", {"city": "Oslo"}),))


@pytest.mark.parametrize("tools", [None, "", "[]", "[ ]", "null", "None", []])
@pytest.mark.parametrize("spelling", [json.dumps([WEATHER]), repr([WEATHER]), json.dumps(WEATHER) + "\n" * 2])
def test_hermes_tools_in_the_system_text(spelling: str, tools: Any) -> None:
    conversation = read(hermes(HERMES_SYSTEM.format(tools=spelling), "None.", tools=tools))
    assert conversation.tools == (WEATHER,)
    assert conversation.messages[0] == Message("system", "You are a function calling AI model.")


def test_hermes_tools_column_wins_and_two_specs_in_a_row_are_read() -> None:
    two = json.dumps(WEATHER) + "\n" + json.dumps({"name": "time"})
    system = HERMES_SYSTEM.format(tools=two)
    assert [t["name"] for t in read(hermes(system, "No.")).tools] == ["weather", "time"]
    assert [t["name"] for t in read(hermes(system, "No.", tools='[{"name": "x"}]')).tools] == ["x"]


def test_hermes_system_text_without_specs_stays_whole() -> None:
    said = "Answer in <schema>{}</schema>. Put them in <tools> </tools>."
    assert read(hermes(said, "{}")).messages[0].content == said


def test_hermes_tool_turns_and_parallel_calls() -> None:
    calls = "".join(f'<tool_call>{{"name": "f", "arguments": {{"n": {n}}}}}</tool_call>\n' for n in (1, 2))
    answers = '<tool_response>\n{"name": "f", "content": 1}\n</tool_response><tool_response>2</tool_response>'
    row = hermes("", calls)
    row["conversations"] += [{"from": "tool", "value": answers}, {"from": "gpt", "value": "Both done."}]
    messages = read(row).messages
    assert [call.arguments for call in messages[1].tool_calls] == [{"n": 1}, {"n": 2}]
    assert messages[2:4] == (Message("tool", '{"name": "f", "content": 1}', name="f"), Message("tool", "2"))
    assert [kind_of(m) for m in messages if m.role == "assistant"] == ["tool_call", "planning"]


def test_json_answers_without_tags_are_no_calls() -> None:
    answer = '{"name": "Ann", "arguments": {}}'
    assert read(hermes("Answer in JSON.", answer)).messages[2] == Message("assistant", answer)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"conversations": []}, "non-empty list"),
        ({"conversations": "hello"}, "non-empty list"),
        ({"conversations": ["hello"]}, "'from' and 'value'"),
        ({"conversations": [{"from": "humam", "value": "x"}]}, "Did you mean 'human'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "unknown speaker"),
        ({"conversations": [{"from": "human", "value": None}]}, "must be text"),
        (hermes("", "<tool_call>{broken}</tool_call>"), "can't read the call"),
        (hermes("", '<tool_call>{"arguments": {}}</tool_call>'), "can't read the call"),
        (hermes("", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'), "no JSON object"),
        (hermes("", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'), "can't read the call"),
        (hermes("", '<tool_call>{"name": "f"}'), "never closed"),
        (hermes(HERMES_SYSTEM.format(tools='[{"name": '), "No."), "functions in <tools>"),
        (hermes("", "No.", tools="[broken"), "not valid JSON"),
        (glaive("Hello"), "must begin with USER"),
        (glaive("Hello\nUSER: x\nASSISTANT: y"), "must begin with USER"),
        (glaive("USER: x\nASSISTANT: <functioncall> {oops"), "turn 2: can't read the call"),
        (glaive("USER: x\nASSISTANT: y", 'SYSTEM: Functions - {"name": '), "functions in 'system'"),
        ({"system": 3, "chat": "USER: x"}, "must be text"),
        ({"query": "x", "tools": "[]", "answers": "[oops"}, "'answers' must be a JSON list"),
        ({"query": "x", "tools": "{}", "answers": "[{}]"}, "'tools' must be a JSON list"),
        ({"query": "x", "tools": "[]", "answers": "[]"}, "no call to learn from"),
        ({"query": " ", "tools": "[]", "answers": "[]"}, "'query' must be text"),
        ({"query": "x", "tools": "[]", "answers": '[{"arguments": {}}]'}, "'name'"),
        ({"question": "x", "answer": ""}, "is empty"),
        ({"question": "", "answer": "x"}, "is empty"),
        ({"question": {"a": 1}, "answer": "x"}, "'question' must be text"),
        ({"question": "x", "answer": True}, "'answer' must be text"),
    ],
)
def test_malformed_rows_say_where_and_why(row: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert str(caught.value).startswith("f:1: ")
    assert why in str(caught.value)


GLAIVE_CHAT = """USER: Rain in Oslo?


ASSISTANT: <functioncall> {"name": "weather", "arguments": '{"city": "Oslo", "n": 2}'} <|endoftext|>


FUNCTION RESPONSE: {"rain": true}


ASSISTANT: Yes, it rains. <|endoftext|>


"""


def test_glaive() -> None:
    intro = "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    system = intro + json.dumps(WEATHER, indent=4) + "\n\n" + json.dumps({"name": "time"})
    conversation = read(glaive(GLAIVE_CHAT, system))
    assert conversation.tools == (WEATHER, {"name": "time"})
    assert conversation.messages == (
        Message("system", intro.removeprefix("SYSTEM: ").removesuffix(" -\n")),
        Message("user", "Rain in Oslo?"),
        Message("assistant", "", (ToolCall("weather", {"city": "Oslo", "n": 2}),)),
        Message("tool", '{"rain": true}'),
        Message("assistant", "Yes, it rains."),
    )


def test_glaive_without_functions() -> None:
    conversation = read(glaive("USER: Hi\n\nASSISTANT: Hello <|endoftext|>", "SYSTEM: No functions here."))
    assert (conversation.tools, conversation.messages[0].content) == ((), "No functions here.")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("""'{"s": "it\\'s"}'""", {"s": "it's"}),
        ("""'{"s": "it's"}'""", {"s": "it's"}),
        ("""'{"s": "it\\'s", "b": true}'""", {"s": "it's", "b": True}),
        ("""'{"s": "a\nb"}'""", {"s": "a\nb"}),
        ("""'{"s": "a\\nb"}'""", {"s": "a\nb"}),
        ("""'{"s": "say \\"x\\""}'""", {"s": 'say "x"'}),
        ("{}", {}),
        ('{"s": "x"}', {"s": "x"}),
    ],
)
def test_glaive_arguments(arguments: str, wanted: dict[str, Any]) -> None:
    chat = f'USER: go\n\n\nASSISTANT: One moment. <functioncall> {{"name": "f", "arguments": {arguments}}}'
    assert read(glaive(chat)).messages[1] == Message("assistant", "One moment.", (ToolCall("f", wanted),))


def test_xlam() -> None:
    tool = {
        "name": "f",
        "description": "d",
        "parameters": {
            "city": {"type": "str", "description": "c"},
            "type": {"type": "List[int]", "default": 3},
            "n": {"type": "int, optional"},
            "least": {"type": "Optional[float]"},
            "most": {"type": "typing.Optional[List[int]], optional"},
            "none": {"type": ["string", "null"]},
            "either": {"type": "Union[int, str]", "description": "e"},
            "shape": {"type": "object"},
            "properties": {"type": "str"},
        },
    }
    answers = [{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "f", "arguments": {}}]
    row = {"id": 7, "query": "go", "tools": json.dumps([tool]), "answers": json.dumps(answers)}
    conversation = read(row)
    assert conversation.id == "7"
    assert [call.arguments for call in conversation.messages[1].tool_calls] == [{"city": "Oslo"}, {}]
    assert conversation.tools[0]["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "c"},
            "type": {"type": "array", "default": 3},
            "n": {"type": "integer"},
            "least": {"type": "number"},
            "most": {"type": "array"},
            "none": {"type": ["string", "null"]},
            "either": {"description": "e"},
            "shape": {"type": "object"},
            "properties": {"type": "string"},
        },
        "required": ["city", "none", "either", "shape", "properties"],
    }


def test_xlam_leaves_json_schemas_alone() -> None:
    row = {"query": "go", "tools": [WEATHER], "answers": [{"name": "weather", "arguments": {}}]}
    assert read(row).tools == (WEATHER,)


def test_gsm8k_loses_its_calculator_marks() -> None:
    conversation = read({"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"})
    assert conversation.messages == (
        Message("user", "How many?"),
        Message("assistant", "48/2 = 24 clips.\n#### 24"),
    )
    for answer in ("cout << x << 2; cin >> y;", "x = 1 << n; y = z >> 2"):
        assert read({"question": "How?", "answer": answer}).messages[1].content == answer


@pytest.mark.parametrize(
    ("row", "reply"),
    [
        ({"question": "2+2?", "answer": 4, "rationale": "Count on."}, "Count on.\n\n4"),
        ({"Question": "2+2?", "Final Answer": "4", "Chain-of-Thought": ["Two.", "Four."]}, "Two.\nFour.\n\n4"),
        ({"problem": "2+2?", "solution": "It is 4."}, "It is 4."),
        ({"question": "2+2?", "answer": "2", "reasoning": "It is 12"}, "It is 12\n\n2"),
        ({"conversation_id": "9", "domain": "Math", "sub-domain": "", "question": "2+2?", "answer": "4"}, "4"),
    ],
)
def test_reasoning_rows_by_tolerant_names(row: dict[str, Any], reply: str) -> None:
    conversation = read(row)
    assert [message.content for message in conversation.messages] == ["2+2?", reply]
    assert conversation.id == row.get("conversation_id", "f:1")


def test_id_source_and_split_come_along() -> None:
    row = to_chat_row({"question": "a", "answer": "b", "id": 1, "source": "s", "split": "test"}, "f:1")
    assert (row["id"], row["source"], row["split"]) == ("1", "s", "test")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["conversations", "tools", "system", "chat", "query", "answers", "question", "answer", "reasoning", "id"]
)
TURNS = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "tool"]) | JSON, "value": JSON}))
MARKS = st.lists(
    st.sampled_from(["<tool_call>", "</tool_call>", "<functioncall>", "USER: ", "\nASSISTANT:", "<tools>", "'{}'"])
    | st.text(max_size=4)
).map("".join)


@given(st.dictionaries(FIELDS, JSON | TURNS | MARKS, max_size=4))
def test_any_row_is_mapped_or_refused(row: dict[str, Any]) -> None:
    with suppress(DataError):
        assert shape_of(to_chat_row(row, "f:1")) == "chat"


@given(JSON)
def test_literals_are_read_in_json_and_python_spelling(value: Any) -> None:
    assert read_literal(json.dumps(value)) == value
    assert read_literal(repr(value)) == value or isinstance(value, str)


def test_literals_too_deep_or_strange_are_none() -> None:
    assert [read_literal(text) for text in ("[" * 100_000, "'\\d", "f()", "")] == [None] * 4


def test_preview_rows_are_short_and_spread() -> None:
    message = Message("user", "long " * 100), Message("assistant", "", (ToolCall("f", {}),))
    conversations = [Conversation(str(n), message, source="s", split="train") for n in range(10)]
    rows = preview_rows(conversations, 5)
    assert [row["id"] for row in rows] == ["0", "2", "4", "6", "8"]
    assert rows[0]["kinds"] == "tool_call"
    assert len(rows[0]["text"]) == 160
    assert len(preview_rows(conversations, 99)) == 10
    assert preview_rows([], 3) == preview_rows(conversations, 0) == []


def test_shorten_and_quantiles() -> None:
    assert (shorten("a \n b"), shorten("abcdef", 4)) == ("a b", "abc…")
    assert quantiles([]) == {}
    assert quantiles([5, 1, 3]) == {"min": 1, "p10": 1, "median": 3, "p90": 3, "p99": 3, "max": 5}
