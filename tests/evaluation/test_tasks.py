"""Tasks: the right steps are asked, routes are what they claim, and figures are paired."""

import json
from dataclasses import replace
from html import unescape

import pytest
import torch
from tiny import save_tiny_backbone

from layerroute.config import AdapterConfig
from layerroute.data.conversation import Conversation, Message, ToolCall
from layerroute.data.generator import generate
from layerroute.data.steps import cut_steps
from layerroute.errors import ConfigError, DataError
from layerroute.evaluation import run as running
from layerroute.evaluation.answering import Answer, _whole, answer
from layerroute.evaluation.asking import questions_of
from layerroute.evaluation.cells import loop_line, task_rows
from layerroute.evaluation.options import EvaluationConfig
from layerroute.evaluation.run import evaluate_adapter
from layerroute.evaluation.tasks import digest_of, judge_task, run_tasks
from layerroute.inference.loading import load_engine
from layerroute.models.adapter import save_adapter
from layerroute.models.attaching import attach
from layerroute.models.loading import load_backbone

TASKS = ("tool_calls", "irrelevance", "gsm8k")
TOOL = {"name": "get", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}


def talk(number, tools=(TOOL,)):
    call = ToolCall("get", {"n": number})
    messages = (
        Message("user", f"Get {number}."),
        Message("assistant", "", (call,)) if tools else Message("assistant", f"It is {number}.\n#### {number}"),
        Message("user", "Thanks"),
        Message("assistant", "Welcome"),
    )
    return Conversation(f"c{number}", messages, tools, "made-up", "test")


@pytest.fixture
def talks():
    return [talk(n) for n in range(6)] + [talk(n, ()) for n in range(10, 14)]


@pytest.fixture
def options():
    return EvaluationConfig(
        tasks=TASKS, task_limit=4, task_tokens=6, max_length=700, dtype="float32", bootstrap=50, timed_steps=1
    )


def make_adapter(folder, seed, family="llama", blocks=4):
    """An adapter whose routers disagree, on a backbone beside it."""
    name = save_tiny_backbone(folder.parent / f"backbone-{family}-{blocks}", family, blocks)
    backbone = load_backbone(name, dtype="float32")
    routed = attach(backbone.model, AdapterConfig())
    torch.manual_seed(seed)
    for router in routed.routers:
        torch.nn.init.normal_(router.score.weight, std=5.0)
        torch.nn.init.zeros_(router.score.bias)
    save_adapter(folder, routed, backbone)
    return folder


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path / "one", 0)


def test_each_task_asks_the_steps_that_suit_it(talks, options, backbone):
    asked = questions_of(talks, backbone.tokenizer, options)
    assert {task: len(found) for task, found in asked.items()} == {"tool_calls": 4, "irrelevance": 4, "gsm8k": 4}
    steps, _ = cut_steps(talks, backbone.tokenizer, max_length=700)
    contexts = {step.input_ids[: step.context_length]: step for step in steps}
    for task, found in asked.items():
        for question in found:
            step = contexts[question.prompt_ids]  # the very context that perplexity is measured under
            assert (question.kind, question.conversation) == (step.kind, step.conversation)
            assert question.judge(question.expected.removesuffix("<|im_end|>")) == "", task
    assert all("#### " in question.expected for question in asked["gsm8k"])
    headed = (Message("user", "Go on."), Message("assistant", "#### Steps\n1. Save it."))
    assert not questions_of([replace(talk(3, ()), messages=headed)], backbone.tokenizer, options)["gsm8k"]
    assert all(question.kind == "tool_call" for question in asked["tool_calls"])
    assert all("Welcome" in question.expected for question in asked["irrelevance"])


def test_the_draw_depends_on_the_seed_alone(talks, options, backbone):
    def drawn(**changes):
        chosen = EvaluationConfig(tasks=("tool_calls",), task_limit=3, max_length=700, **changes)
        return [q.prompt_ids for q in questions_of(talks, backbone.tokenizer, chosen)["tool_calls"]]

    assert drawn() == drawn()
    assert len({tuple(drawn(seed=seed)) for seed in range(4)}) > 1


def test_the_built_in_generator_suits_every_task(backbone):
    options = EvaluationConfig(tasks=TASKS, task_limit=20, max_length=10_000)
    for task, found in questions_of(generate(260), backbone.tokenizer, options).items():
        assert len(found) == 20, task
        for question in found:
            assert question.judge(question.expected.removesuffix("<|im_end|>")) == ""


def test_routed_answers_follow_routers_and_open_ones_run_all(adapter, talks, options):
    document = run_tasks(adapter, talks, options)
    for row in document["tasks"].values():
        assert row["skip_rate"]["open"] == 0.0
        assert 0.0 < row["skip_rate"]["routed"] < 1.0
        assert row["steps"] == 4
        assert set(row["accuracy"]) == {"routed", "open"}
    assert set(document["seconds_per_token"]) == {"tool_call", "planning"}
    for row in document["seconds_per_token"].values():
        assert row["decode"]["routed"] > 0
        assert row["prefill"]["open"] > 0
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_an_adapter_against_itself_is_no_better(adapter, talks, options):
    document = run_tasks(adapter, talks, replace(options, against=str(adapter)))
    for row in document["tasks"].values():
        assert row["routed_minus"]["against"]["value"] == 0.0
        assert row["tokens"]["against"] == row["tokens"]["routed"]
        assert row["skip_rate"]["against"] == row["skip_rate"]["routed"]


def test_another_backbone_and_missing_steps_are_refused(adapter, talks, options, tmp_path):
    other = make_adapter(tmp_path / "two", 0, blocks=3)
    with pytest.raises(ConfigError, match="--against"):
        run_tasks(adapter, talks, replace(options, against=str(other)))
    with pytest.raises(DataError, match="gsm8k"):
        run_tasks(adapter, talks[:6], options)
    with pytest.raises(ConfigError, match="--tasks"):
        EvaluationConfig(against="x")


def test_a_context_that_fills_the_models_positions_is_refused_before_any_is_answered(adapter, talks, options):
    long = replace(talks[0], messages=(Message("user", "a" * 1200), *talks[0].messages[1:]))
    with pytest.raises(
        ConfigError, match=r"--max-length: a context of \d+ tokens .* in the 1024 positions.*at most 1023"
    ):
        run_tasks(adapter, [long, *talks[1:]], replace(options, tasks=("tool_calls",), task_limit=20, max_length=5000))


def test_a_loop_is_answered_in_one_session_as_its_turns_alone(adapter, talks, options, monkeypatch):
    engine, backbone = load_engine(adapter, dtype="float32")
    held, generate = [], engine.generate
    monkeypatch.setattr(engine, "generate", lambda asked: held.append([r.session for r in asked]) or generate(asked))
    chosen = replace(options, tasks=("agent_loop",))
    loops = questions_of(talks, backbone.tokenizer, chosen)["agent_loop"]
    assert [[turn.kind for turn in loop.turns] for loop in loops] == [["tool_call", "planning"]] * 4
    for opened in (False, True):
        held.clear()
        whole = answer(engine, backbone.tokenizer, loops, chosen, opened=opened, name="loops")
        assert held[0] == held[1]
        assert len({id(session) for session in held[0] if session is not None}) == 4
        for loop, said in zip(loops, whole, strict=True):
            alone = answer(engine, backbone.tokenizer, loop.turns, chosen, opened=opened, name="turns")
            assert said.text == "\n--- next turn ---\n".join(turn.text for turn in alone)
            assert said.tokens == sum(turn.tokens for turn in alone)
            assert said.skip_rate == pytest.approx(sum(turn.skip_rate for turn in alone) / 2)
    assert engine.memory.used == 0


@pytest.mark.parametrize(
    ("said", "wrong"),
    [("right talk", ""), ("right right", "a call"), ("talk talk", "no call"), ("talk right", "no call")],
)
def test_a_loop_is_as_wrong_as_its_first_wrong_turn(adapter, talks, options, monkeypatch, said, wrong):
    engine, backbone = load_engine(adapter, dtype="float32")
    chosen = replace(options, tasks=("agent_loop",))
    (loop,) = questions_of(talks[:1], backbone.tokenizer, chosen)["agent_loop"]
    texts = {"right": loop.turns[0].expected.removesuffix("<|im_end|>"), "talk": "Welcome"}
    answers = iter(texts[word] for word in said.split())
    monkeypatch.setattr(type(backbone.tokenizer), "decode", lambda *_, **__: next(answers))
    (found,) = answer(engine, backbone.tokenizer, [loop], chosen, opened=True, name="loop")
    assert found.wrong == wrong


def test_whole_loops_are_timed_routed_against_open(adapter, talks, options):
    document = run_tasks(adapter, talks, replace(options, tasks=("agent_loop",), timed_steps=2))
    timed = document["seconds_per_loop"]
    assert (timed["loops"], timed["turns"]) == (2, 4)
    assert min(timed["routed"], timed["open"], timed["speedup"]) > 0
    assert document["seconds_per_token"] == {}
    assert "2 loops of 4 turns" in loop_line(document)
    assert run_tasks(adapter, talks, replace(options, timed_steps=2))["seconds_per_loop"] == {}


def test_what_is_wrong_is_counted_and_shown(talks, options, backbone):
    questions = questions_of(talks, backbone.tokenizer, options)["tool_calls"]
    said = [
        '{"name": "get", "arguments": {}}', "no", '{"name": "got", "arguments": {}}',
        questions[3].expected.removesuffix("<|im_end|>"),
    ]  # fmt: skip
    answers = [Answer(text, q.judge(text), 0.25, 3, False) for q, text in zip(questions, said, strict=True)]
    row = judge_task(questions, {"routed": answers}, options)
    assert row["accuracy"]["routed"]["value"] == 0.25
    kept = row["answers"]
    assert (kept["groups"], kept["right"]) == ([0, 1, 2, 3], {"routed": "0001"})
    others = judge_task(questions[::-1], {"routed": answers}, options)["answers"]
    assert kept["questions"] == judge_task(questions, {"routed": answers[::-1]}, options)["answers"]["questions"]
    assert kept["questions"] != others["questions"]
    assert row["wrong"]["routed"] == {"argument missing": 1, "no call": 1, "wrong name": 1}
    assert [each["said"] for each in row["examples"]] == said[:3]


def test_an_evaluation_holds_and_shows_its_tasks(adapter, tmp_path, options):

    chosen = replace(
        options, data=("builtin:40",), max_length=1000, limit=8, tasks=("tool_calls", "irrelevance"), curve_steps=0
    )
    document = evaluate_adapter(adapter, chosen, report=tmp_path / "report.html")
    assert set(document["tasks"]) == {"tool_calls", "irrelevance"}
    text = unescape((tmp_path / "report.html").read_text())
    assert "Tasks under real skipping" in text
    plain = evaluate_adapter(adapter, replace(chosen, tasks=()), report=tmp_path / "plain.html")
    assert plain["tasks"] == {}
    assert plain["kinds"] == document["kinds"]
    assert "Tasks under" not in (tmp_path / "plain.html").read_text()


def test_the_longest_answer_is_kept_within_the_models_positions(adapter, options, monkeypatch):
    engine, backbone = load_engine(adapter, dtype="float32")
    seen = []
    monkeypatch.setattr(engine, "generate", lambda requests: seen.extend(requests) or [])
    question = questions_of([talk(1)], backbone.tokenizer, options)["tool_calls"][0]
    long = replace(question, prompt_ids=(5,) * 1020)
    with pytest.raises(ValueError, match="zip"):
        answer(engine, backbone.tokenizer, [long], options, opened=True, name="x")
    assert seen[0].max_new_tokens == 4


def test_the_other_adapter_answers_under_its_own_routes(adapter, talks, options, tmp_path):
    other = make_adapter(tmp_path / "two", 1)
    found = run_tasks(adapter, talks, replace(options, against=str(other)))["tasks"]
    alone = run_tasks(other, talks, options)["tasks"]
    for task, row in found.items():
        assert row["skip_rate"]["against"] == alone[task]["skip_rate"]["routed"]
    assert any(row["skip_rate"]["against"] != row["skip_rate"]["routed"] for row in found.values())


def test_a_fallback_is_taken_off_what_is_saved(adapter, talks, options):
    plain, unsure = (run_tasks(adapter, talks, replace(options, fallback=f))["tasks"] for f in (0.0, 1.0))
    assert all(set(row["fallback_tokens"].values()) == {0} for row in plain.values())
    for task, row in unsure.items():
        assert row["fallback_tokens"]["open"] == 0 < row["fallback_tokens"]["routed"] < row["tokens"]["routed"]
        assert row["skip_rate"]["routed"] < plain[task]["skip_rate"]["routed"]
        assert row["skip_rate"]["open"] == 0
    shown = {cells[0]: cells[2] for cells in task_rows({"tasks": {**unsure, "gsm8k": plain["gsm8k"]}})}
    assert "tokens run again" in shown["tool calls"]
    assert "run again" not in shown["worked arithmetic"]


def test_a_loop_is_whole_and_both_calls_and_talks(talks, options, backbone):
    chosen = replace(options, tasks=("agent_loop",), task_limit=99)
    first = talk(1)
    calls, talking = (replace(first, messages=first.messages[start : start + 2]) for start in (0, 2))
    unlearned = replace(
        first, messages=(*first.messages, Message("user", "Bye"), Message("assistant", "Bye", weight=0))
    )
    assert questions_of([calls, talking, unlearned], backbone.tokenizer, chosen)["agent_loop"] == []
    assert len(questions_of([first], backbone.tokenizer, chosen)["agent_loop"]) == 1


def test_a_question_may_be_as_long_as_max_length(talks, options, backbone):
    chosen = replace(options, tasks=("tool_calls",))
    (found,) = questions_of(talks[:1], backbone.tokenizer, chosen)["tool_calls"]
    whole = len(found.prompt_ids) + found.length
    for length, count in ((whole, 1), (whole - 1, 0)):
        assert (
            len(questions_of(talks[:1], backbone.tokenizer, replace(chosen, max_length=length))["tool_calls"]) == count
        )


def test_irrelevance_is_asked_where_tools_are_on_offer_alone(talks, options, backbone):
    chosen = replace(options, tasks=("irrelevance",))
    assert questions_of([talk(1, ())], backbone.tokenizer, chosen)["irrelevance"] == []


def test_questions_that_expect_something_else_are_others(talks, options, backbone):
    questions = questions_of(talks, backbone.tokenizer, options)["tool_calls"]
    assert digest_of(questions) != digest_of([replace(question, expected="x") for question in questions])


def test_a_loop_is_cut_off_if_any_of_its_turns_is():
    turns = [Answer("a", "", 0.0, 3, True), Answer("b", "", 0.5, 4, False)]
    assert _whole(turns).cut_off
    assert not _whole(turns[1:] * 2).cut_off


def test_classifiers_are_fitted_on_training_conversations_and_measured_on_others(adapter, monkeypatch):
    asked = []
    load = running.conversations_of
    monkeypatch.setattr(
        running, "conversations_of", lambda options, split, say: asked.append(split) or load(options, split, say)
    )
    options = EvaluationConfig(
        data=("builtin:60",), max_length=1000, dtype="float32", bootstrap=2, curve_steps=0,
        controls=("two_masks_classifier",), split="validation",
    )  # fmt: skip
    running.evaluate_adapter(adapter, options)
    assert sorted(asked) == ["train", "validation"]
