"""Rendering and its reverse: what is rendered reads back as the same calls."""

import json
from typing import Any

import pytest
from data.chat import REWRITING, WITH_TOOLS, build
from hypothesis import given
from hypothesis import strategies as st

from layerroute.data.conversation import Message, ToolCall
from layerroute.data.rendering import (
    Renderer,
    openai_message,
    parse_tool_calls,
    response_text,
    stop_ids,
    with_calls,
)

CALL = ToolCall("get", {"city": "Oslo"})
TALK = (
    Message("system", "Be brief."),
    Message("user", "Weather?"),
    Message("assistant", "", (CALL,)),
    Message("tool", '{"t": 3}', name="get"),
    Message("assistant", "3 degrees."),
)
TOOLS = ({"name": "get", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | text | st.sampled_from(["</tool_call>", "<tool_call>", "```", '"}\n']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(ToolCall, st.text(min_size=1, max_size=9), st.dictionaries(text, values, max_size=3))


@given(st.lists(calls, min_size=1, max_size=3), st.sampled_from(["", "Let me look.", "a\nb"]))
def test_rendered_calls_read_back_the_same(made: list[ToolCall], said: str) -> None:
    assert parse_tool_calls(with_calls(said, made)) == (said, tuple(made))


@given(st.lists(calls, min_size=1, max_size=3))
def test_calls_of_a_native_template_read_back_the_same(native: Any, made: list[ToolCall]) -> None:
    before = (Message("user", "Hi"),)
    render = Renderer(native)
    whole = render((*before, Message("assistant", "", tuple(made))), TOOLS)
    answer = whole.removeprefix(render(before, TOOLS, add_generation_prompt=True)).removesuffix("<|im_end|>\n")
    assert parse_tool_calls(answer) == ("", tuple(made))


@given(text | st.text(alphabet='<tool_cal/>{}"name:[]` \n', max_size=40))
def test_any_text_is_read_without_an_error(said: str) -> None:
    kept, found = parse_tool_calls(said)
    assert found or kept == said


OBJECT = json.dumps({"name": "get", "arguments": {"city": "Oslo"}})


@pytest.mark.parametrize(
    "said",
    [
        f"<tool_call>{OBJECT}</tool_call>",
        f"<tool_call>\n{OBJECT}",
        f"```json\n{OBJECT}\n```",
        f"```\n{OBJECT}\n```",
        OBJECT,
        f"[{OBJECT}]",
        '{"name": "get", "parameters": {"city": "Oslo"}}',
        '{"type": "function", "function": {"name": "get", "arguments": "{\\"city\\": \\"Oslo\\"}"}}',
    ],
)
def test_calls_in_the_spellings_of_small_models(said: str) -> None:
    assert parse_tool_calls(said) == ("", (CALL,))


@pytest.mark.parametrize(
    "said",
    [
        "Hello",
        "{",
        "[1, 2]",
        '{"city": "Oslo"}',
        "<tool_call>{</tool_call>",
        '{"name": "get", "arguments": 3}',
        '{"name": "Oslo", "celsius": 3}',  # an answer about something that has a name
        "[" * 5000,  # deeper than the parser goes
    ],
)
def test_text_without_a_call_stays_as_it_is(said: str) -> None:
    assert parse_tool_calls(said) == (said, ())


def test_a_call_that_cannot_be_read_stays_in_the_text() -> None:
    broken = "<tool_call>[1]</tool_call>"
    assert parse_tool_calls(f"{broken}\n<tool_call>{OBJECT}</tool_call>") == (broken, (CALL,))


# What adapters that come along were trained on: a change here asks for new ones.
HERMES = (
    "<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n"
    '{"name": "get", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}\n</tools>\n'
    'To call one, answer\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nWeather?<|im_end|>\n"
    '<|im_start|>assistant\n<tool_call>\n{"name": "get", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
    '<|im_start|>user\n<tool_response>\n{"t": 3}\n</tool_response><|im_end|>\n'
    "<|im_start|>assistant\n3 degrees.<|im_end|>\n"
)


def test_hermes_rendering(bare: Any) -> None:
    render = Renderer(bare)
    assert render(TALK, TOOLS) == HERMES
    assert render(TALK, TOOLS, add_generation_prompt=True) == HERMES + "<|im_start|>assistant\n"
    assert render(TALK[1:2], ()) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
    )
    two = render(TALK, ({"name": "one"}, {"name": "zwölf"}))
    assert '<tools>\n{"name": "one"}\n{"name": "zwölf"}\n</tools>' in two


def test_a_template_that_takes_tools_is_used(native: Any, plain: Any, bare: Any) -> None:
    assert Renderer(native)(TALK, TOOLS).startswith(
        '<|im_start|>system\nTools: {"type": "function", "function": {"name"'
    )
    for tokenizer in (plain, bare):
        assert Renderer(tokenizer)(TALK, TOOLS) == HERMES
    assert "Tools:" not in Renderer(native)(TALK, ())


def test_rendering_is_stable_under_more_turns(native: Any, plain: Any) -> None:
    for tokenizer in (native, plain):
        whole = Renderer(tokenizer)(TALK, TOOLS)
        for end in range(1, len(TALK)):
            assert whole.startswith(Renderer(tokenizer)(TALK[:end], TOOLS))


ONE_CALL = "{% for m in messages %}{% if m.tool_calls|length > 1 %}{{ raise_exception('one') }}{% endif %}{% endfor %}"
NO_CALLS = WITH_TOOLS.replace("m.tool_calls", "[]")  # shows tools, and no call
OWN_CALLS = WITH_TOOLS.replace("c.function | tojson", "c.function.name")  # which nobody can read
NO_TEXT = WITH_TOOLS.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
ENDLESS = WITH_TOOLS.replace("<|im_end|>", "<|end|>")
ALWAYS = "{% for t in tools %}{% endfor %}" + WITH_TOOLS  # breaks without tools


@pytest.mark.parametrize(
    "template",
    [
        ONE_CALL + WITH_TOOLS,
        NO_CALLS,
        OWN_CALLS,
        NO_TEXT,
        ENDLESS,
        ALWAYS,
        REWRITING,
        "{{ tools.nothing.at_all }}",
        "{%",
    ],
)
def test_a_template_that_cannot_show_a_conversation_is_not_used(template: str) -> None:
    assert Renderer(build(template))(TALK, TOOLS) == HERMES


@pytest.mark.parametrize("known", [True, False])
def test_a_response_ends_in_a_token_that_stops_generation(known: bool) -> None:
    tokenizer = build(None, end="<|im_end|>" if known else "<eos>")
    (ids,) = tokenizer([Renderer(tokenizer)(TALK, TOOLS).rstrip("\n")], add_special_tokens=False)["input_ids"]
    assert ids[-1] in stop_ids(tokenizer)
    assert response_text(ids[-3:], tokenizer) == tokenizer.decode(ids[-3:-1])


def test_a_text_begins_as_the_tokenizer_would_begin_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build(None)
    inner = tokenizer.backend_tokenizer
    tokenizer.bos_token = "<|im_start|>"
    assert Renderer(tokenizer)(TALK, TOOLS) == HERMES
    begun = [("<|im_start|>", tokenizer.bos_token_id)]
    inner.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=begun)
    assert Renderer(tokenizer)(TALK, TOOLS) == "<|im_start|>" + HERMES


@given(st.lists(calls, max_size=3), text, st.booleans(), st.sampled_from(["<|im_end|>", "<eos>"]))
def test_an_answer_is_written_as_it_is_read(made: list[ToolCall], said: str, offered: bool, end: str) -> None:
    render, tools = Renderer(build(None, end=end)), TOOLS if offered else ()
    answer = Message("assistant", said, tuple(made))
    context = render(TALK, tools, add_generation_prompt=True)
    assert render((*TALK, answer), tools) == f"{context}{with_calls(said, made)}{end}\n"


def test_servers_render_as_we_do(bare: Any) -> None:
    """The template that goes with an exported checkpoint, by transformers; its arguments may be text."""
    ours, served = Renderer(bare), build(None)
    served.chat_template = ours.chat_template
    rows = [openai_message(message) for message in TALK]
    rows[2]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL.arguments)
    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    assert served.apply_chat_template(rows, tools=tools, tokenize=False) == HERMES


def test_a_template_that_serves_stays(native: Any) -> None:
    assert Renderer(native).chat_template == native.chat_template
