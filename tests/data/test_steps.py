"""Steps: the context is what inference sees, the response is the turn with its end token, and nothing leaks."""

from dataclasses import replace
from typing import Any

import pytest
from data.chat import WITH_TOOLS, build
from hypothesis import given, settings
from hypothesis import strategies as st

from layerroute.data.conversation import Conversation, Message, ToolCall, parse_conversation
from layerroute.data.generator import generate
from layerroute.data.rendering import Renderer, parse_tool_calls
from layerroute.data.sources import content_hash, messages_hash
from layerroute.data.steps import CutReport, cut_steps, prompt_ids
from layerroute.errors import DataError

TALK = Conversation(
    "c1",
    (
        Message("user", "Weather in Oslo?"),
        Message("assistant", "", (ToolCall("get", {"city": "Oslo"}),)),
        Message("tool", "3", name="get"),
        Message("assistant", "3 degrees."),
        Message("user", "Thanks"),
        Message("assistant", "Welcome"),
    ),
    ({"name": "get"},),
    "here",
    "train",
)
LONG = 100_000
REPLY = {"role": "assistant", "content": "Welcome"}


def texts(step: Any, tokenizer: Any) -> tuple[str, str]:
    return tokenizer.decode(step.input_ids[: step.context_length]), tokenizer.decode(
        step.input_ids[step.context_length :]
    )


@pytest.fixture(params=["native", "plain", "bare", "rewriting"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_one_step_a_turn(tokenizer: Any) -> None:
    steps, report = cut_steps([TALK], tokenizer, max_length=LONG)
    assert report == CutReport(turns=3, kept=3, too_long=0, empty=0, unrendered=0)
    assert [step.kind for step in steps] == ["tool_call", "planning", "planning"]
    assert {(s.conversation, s.source, s.tools_offered) for s in steps} == {(messages_hash(TALK), "here", True)}
    answers = [texts(step, tokenizer)[1] for step in steps]
    assert parse_tool_calls(answers[0].removesuffix("<|im_end|>")) == ("", TALK.messages[1].tool_calls)
    assert answers[1:] == ["3 degrees.<|im_end|>", "Welcome<|im_end|>"]
    for step in steps:
        assert step.response_length == len(step.input_ids) - step.context_length > 0
        assert step.input_ids[-1] == tokenizer.eos_token_id
        assert step.input_ids[step.context_length :].count(tokenizer.eos_token_id) == 1


def test_an_answer_of_weight_0_is_context_and_no_step(plain: Any) -> None:
    rows = [{"role": m.role, "content": m.content, "weight": 0} for m in TALK.messages[3:5]]
    talk = parse_conversation({"messages": [{"role": "user", "content": "Hi"}, *rows, REPLY]}, "a:1")
    weighed = replace(talk, messages=tuple(replace(message, weight=1) for message in talk.messages))
    (step,), report = cut_steps([talk], plain, max_length=LONG)
    assert step == cut_steps([weighed], plain, max_length=LONG)[0][1]
    assert report.turns == 1
    assert content_hash([talk]) != content_hash([weighed])


def test_conversations_that_share_an_id_stay_apart(plain: Any) -> None:
    other = replace(TALK, messages=(Message("user", "Hi"), Message("assistant", "Hello")))
    steps, _ = cut_steps([TALK, other], plain, max_length=LONG)
    assert len({step.conversation for step in steps}) == 2


def test_rows_of_one_conversation_count_as_one(plain: Any) -> None:
    rows = [replace(TALK, messages=TALK.messages[:length]) for length in (2, 4)]
    other = replace(TALK, messages=(*TALK.messages[:2], Message("user", "And in Bergen?"), Message("assistant", "4.")))
    for talks in ([*rows, TALK], [TALK, *rows]):
        steps, _ = cut_steps([*talks, other], plain, max_length=LONG)
        assert len(steps) == 3 + 1 + 2 + 2
        assert {step.conversation for step in steps} == {messages_hash(TALK), messages_hash(other)}


def test_the_context_is_what_inference_sees(tokenizer: Any) -> None:
    steps, _ = cut_steps([TALK], tokenizer, max_length=LONG)
    for step, end in zip(steps, (1, 3, 5), strict=True):
        before = Conversation("c1", TALK.messages[:end], TALK.tools)
        assert list(step.input_ids[: step.context_length]) == prompt_ids(before, tokenizer)
        rendered = Renderer(tokenizer)(before.messages, before.tools, add_generation_prompt=True)
        assert texts(step, tokenizer)[0] == rendered


def test_the_context_never_holds_the_answer(tokenizer: Any) -> None:
    marked = Conversation(
        "m", tuple(Message(m.role, f"{m.content} #{i}#", m.tool_calls) for i, m in enumerate(TALK.messages))
    )
    steps, _ = cut_steps([marked], tokenizer, max_length=LONG)
    for step, turn in zip(steps, (1, 3, 5), strict=True):
        context, answer = texts(step, tokenizer)
        assert f"#{turn}#" in answer
        for later in range(turn, len(TALK.messages)):
            assert f"#{later}#" not in context
        assert all(f"#{earlier}#" in context for earlier in range(turn))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["native", "plain"]))
def test_changing_the_answer_leaves_the_context_alone(request: pytest.FixtureRequest, start: int, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    (one,) = generate(1, start=start)
    last = max(i for i, m in enumerate(one.messages) if m.role == "assistant")
    other = Conversation(one.id, (*one.messages[:last], Message("assistant", "Something else.")), one.tools)
    pair = [cut_steps([c], tokenizer, max_length=LONG)[0][-1] for c in (one, other)]
    assert pair[0].input_ids[: pair[0].context_length] == pair[1].input_ids[: pair[1].context_length]


def test_long_steps_are_dropped(plain: Any) -> None:
    whole, _ = cut_steps([TALK], plain, max_length=LONG)
    limit = len(whole[1].input_ids)
    kept, report = cut_steps([TALK], plain, max_length=limit)
    assert kept == whole[:2]
    assert (report.turns, report.kept, report.too_long) == (3, 2, 1)


def test_a_template_that_rewrites_falls_back_to_hermes(rewriting: Any, bare: Any) -> None:
    steps, report = cut_steps([TALK], rewriting, max_length=LONG)
    assert (report.kept, report.unrendered) == (3, 0)
    assert texts(steps[0], rewriting)[0] == texts(cut_steps([TALK], bare, max_length=LONG)[0][0], bare)[0]


def test_turns_that_the_template_refuses_are_counted(picky: Any) -> None:
    """All in one rendering: a turn is left out, never rendered in another way than inference would."""
    odd = Conversation("odd", (Message("user", "Hi"), Message("assistant", "forbidden"), *TALK.messages), TALK.tools)
    _, report = cut_steps([odd, TALK], picky, max_length=LONG)
    assert (report.turns, report.kept, report.unrendered) == (7, 3, 4)
    assert report.left_out(9) == "0 longer than 9 tokens left out, 4 that the chat template does not serve"
    with pytest.raises(DataError, match="refuses this conversation"):
        prompt_ids(replace(odd, messages=odd.messages[:3]), picky)


def test_nothing_to_cut(plain: Any) -> None:
    assert cut_steps([], plain, max_length=9) == ([], CutReport(0, 0, 0, 0, 0))


def test_blanks_around_an_answer_do_not_move_the_border(plain: Any) -> None:
    padded = Conversation("p", (TALK.messages[0], Message("assistant", "  \n Hello \n")))
    (step,), _ = cut_steps([padded], plain, max_length=LONG)
    assert texts(step, plain)[1] == "Hello<|im_end|>"


def test_turns_whose_context_the_template_rewrites_are_counted_and_left_out() -> None:
    """It renders the probe as it should, and one message in another way once it is answered."""
    fickle = WITH_TOOLS.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if 'ponder' in messages[-1].content %}<think>\n{% endif %}{% endif %}",
    )
    messages = (
        Message("user", "ponder"),
        Message("assistant", "Yes"),
        Message("user", "Hi"),
        Message("assistant", "Ho"),
    )
    tokenizer = build(fickle)
    steps, report = cut_steps([Conversation("odd", messages)], tokenizer, max_length=LONG)
    assert (report.turns, report.kept, report.unrendered) == (2, 1, 1)
    assert [texts(step, tokenizer)[1] for step in steps] == ["Ho<|im_end|>"]
