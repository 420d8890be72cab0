"""Log-likelihoods and texts for benchmark harnesses: the context decides the route, and the numbers are the model's."""

import importlib
import random
import runpy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny_backbone, tiny

from layerroute.config import AdapterConfig, RouterConfig
from layerroute.data.conversation import Conversation, Message
from layerroute.data.rendering import stop_ids
from layerroute.data.steps import prompt_ids
from layerroute.errors import ConfigError, LayerRouteError
from layerroute.inference.loading import engine_of
from layerroute.inference.requests import Request
from layerroute.inference.sampling import Sampling
from layerroute.integrations import routed_text
from layerroute.integrations.routed_text import Wanted, cut, generate_until, likelihoods, windows
from layerroute.models.adapter import save_adapter
from layerroute.models.attaching import attach
from layerroute.models.loading import load_backbone
from layerroute.routing.route import Route

LONG = 128


def disagree(routed, std=0.5):
    """Give routers random weights, so that gates differ from context to context."""
    torch.manual_seed(0)
    for router in routed.routers:
        torch.nn.init.normal_(router.score.weight, std=std)
        torch.nn.init.zeros_(router.score.bias)
    return routed


@pytest.fixture(params=["step", "response", "continuation"])
def routed(request):
    return disagree(attach(tiny("llama"), AdapterConfig(router=RouterConfig(scope=request.param)))).eval()


@pytest.fixture
def pairs():
    draw = random.Random(0)
    sizes = [(draw.randint(2, 20), draw.randint(1, 8)) for _ in range(12)]
    return [([draw.randrange(3, 97) for _ in range(a)], [draw.randrange(3, 97) for _ in range(b)]) for a, b in sizes]


def by_hand(routed, context, continuation, forced=None):
    """Score one pair alone from the full logits of the routed model."""
    ids = torch.tensor([[*context, *continuation]])
    place = torch.arange(ids.shape[1])[None]
    context_mask, response_mask = place < len(context), place >= len(context)
    with torch.inference_mode():
        logits, gates = routed.token_logits(ids, context_mask, response_mask, forced)
    logs = logits[0, len(context) - 1 : -1].log_softmax(-1)
    logprob = float(logs.gather(1, torch.tensor(continuation)[:, None]).sum())
    return logprob, logs.argmax(-1).tolist() == list(continuation), float((~gates).float().mean())


def test_scores_are_the_routed_models_however_batched(routed, pairs):
    found = likelihoods(routed, pairs, max_length=LONG, batch_tokens=60)
    for pair, each in zip(pairs, found, strict=True):
        logprob, greedy, skipped = by_hand(routed, *pair)
        assert each.logprob == pytest.approx(logprob, abs=1e-4)
        assert (each.greedy, each.skip_rate) == (greedy, pytest.approx(skipped))
    assert len({each.skip_rate for each in found}) > 1
    shuffled = likelihoods(routed, pairs[::-1], max_length=LONG)[::-1]
    assert [each.skip_rate for each in shuffled] == [each.skip_rate for each in found]


def test_the_continuation_does_not_change_the_route(routed, pairs):
    context = pairs[0][0]
    late = [7] * (routed.config.router.scope == "continuation")  # but for the first token, where that decides
    found = likelihoods(routed, [(context, [*late, *continuation]) for _, continuation in pairs], max_length=LONG)
    assert len({each.skip_rate for each in found}) == 1


def test_what_greedy_decoding_says_is_greedy(routed, pairs):
    context = pairs[1][0]
    said = list(context)
    everything = Route.open(len(routed.blocks))
    for number in range(4):
        mask = torch.arange(len(said))[None] < len(context)
        forced = everything if not number and routed.config.router.scope == "continuation" else None
        with torch.inference_mode():
            logits, _ = routed.token_logits(torch.tensor([said]), mask, ~mask, forced)
        said.append(int(logits[0, -1].argmax()))
    continuation = said[len(context) :]
    other = [*continuation[:-1], (continuation[-1] + 1) % 97]
    first, second = likelihoods(routed, [(context, continuation), (context, other)], max_length=LONG)
    assert first.greedy
    assert not second.greedy


def test_a_continuation_with_nothing_to_skip_runs_every_block(pairs):
    routed = disagree(attach(tiny("llama"), AdapterConfig(router=RouterConfig(scope="continuation")))).eval()
    context = pairs[0][0]
    empty, lone, longer = likelihoods(routed, [(context, []), (context, [5]), (context, [5, 6])], max_length=LONG)
    assert (empty.logprob, empty.greedy, empty.skip_rate) == (0.0, True, 0.0)
    assert lone.skip_rate == 0.0 < longer.skip_rate
    assert lone.logprob == pytest.approx(by_hand(routed, context, [5], Route.open(4))[0], abs=1e-4)


def test_open_routes_and_a_lone_token_run_every_block(routed, pairs):
    everything = Route.open(4)
    for pair, each in zip(pairs, likelihoods(routed, pairs, max_length=LONG, opened=True), strict=True):
        assert each.skip_rate == 0.0
        assert each.logprob == pytest.approx(by_hand(routed, *pair, everything)[0], abs=1e-4)
    (lone,) = likelihoods(routed, [([5], [7, 8])], max_length=LONG)
    decided = None if routed.config.router.scope == "continuation" else everything  # there the token 7 decides
    logprob, _, skipped = by_hand(routed, [5], [7, 8], decided)
    assert (lone.logprob, lone.skip_rate) == pytest.approx((logprob, skipped), abs=1e-4)


def test_a_long_context_loses_its_beginning_and_a_continuation_nothing(routed):
    context, continuation = list(range(3, 43)), [50, 51, 52]
    (kept,) = likelihoods(routed, [(context, continuation)], max_length=13)
    assert kept.logprob == pytest.approx(by_hand(routed, context[-10:], continuation)[0], abs=1e-4)
    with pytest.raises(LayerRouteError, match="max_length 3"):
        likelihoods(routed, [(context, continuation)], max_length=3)
    with pytest.raises(LayerRouteError, match="give a context"):
        likelihoods(routed, [([], continuation)], max_length=13)


@given(st.integers(0, 200), st.integers(4, 40))
def test_windows_score_every_token_once_and_fit(count, max_length):
    ids = list(range(1, count + 1))
    cuts = windows(ids, 0, max_length)
    assert [token for _, continuation in cuts for token in continuation] == ids
    for context, continuation in cuts:
        assert len(context) >= 1
        assert len(context) + len(continuation) <= max_length
        before = [0, *ids][: continuation[0]]
        assert list(context) == before[-len(context) :]
    assert all(len(context) == max_length // 2 for context, _ in cuts[1:])


@given(st.text("abc#\n", max_size=20), st.lists(st.text("abc#\n", min_size=1, max_size=3), max_size=3))
def test_a_cut_text_holds_no_stop_string_and_is_the_longest_beginning(text, until):
    kept = cut(text, until)
    assert text.startswith(kept)
    assert not any(stop in kept for stop in until)
    assert kept == text or any(text.startswith(stop, len(kept)) for stop in until)


@pytest.fixture
def workshop(tmp_path):
    """An adapter on disk, with text on the outside."""
    backbone = load_backbone(save_tiny_backbone(tmp_path / "backbone"), dtype="float32")
    routed = disagree(attach(backbone.model, AdapterConfig()), std=5.0)
    save_adapter(tmp_path / "adapter", routed, backbone)
    return SimpleNamespace(folder=tmp_path / "adapter", engine=engine_of(routed), tokenizer=backbone.tokenizer)


def test_texts_are_the_engines_up_to_the_stop_string(workshop):
    prompts = [workshop.tokenizer(text)["input_ids"] for text in ("Hello there", "x", "A longer prompt, this one.")]
    plain = generate_until(workshop.engine, [Wanted(p, 20) for p in prompts], workshop.tokenizer)
    requests = [Request(prompt_ids=p, max_new_tokens=20, route=(True,) * 4 if len(p) == 1 else None) for p in prompts]
    for said, result in zip(plain, workshop.engine.generate(requests), strict=True):
        assert said.text == workshop.tokenizer.decode(result.token_ids)
        assert said.skip_rate == pytest.approx(1 - sum(result.route) / 4)
    assert plain[1].skip_rate == 0.0
    stop = plain[0].text[5:7]
    (early,) = generate_until(workshop.engine, [Wanted(prompts[0], 20, (stop,))], workshop.tokenizer)
    assert early.text == plain[0].text[: plain[0].text.index(stop)]
    assert early.tokens < 20  # not generated to the end and cut
    assert workshop.engine.scheduler.idle
    (opened,) = generate_until(workshop.engine, [Wanted(prompts[0], 5)], workshop.tokenizer, opened=True)
    assert opened.skip_rate == 0.0


@pytest.fixture
def harness(monkeypatch):
    """Our class of model on a stand-in for the harness, which need not be installed."""
    base = type("TemplateLM", (), {"cache_hook": SimpleNamespace(add_partial=lambda *_: None)})
    registry = {"register_model": lambda name: lambda cls: cls}
    for name, content in {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"TemplateLM": base}}.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(content)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", SimpleNamespace(**registry))
    monkeypatch.delitem(sys.modules, "layerroute.integrations.lm_eval", raising=False)
    from layerroute.integrations.lm_eval import LayerRouteLM

    yield LayerRouteLM
    sys.modules.pop("layerroute.integrations.lm_eval", None)


def ask(*args):
    return SimpleNamespace(args=args)


def test_the_harness_gets_the_models_own_numbers(workshop, harness, capsys):
    model = harness(adapter=str(workshop.folder), dtype="float32", max_length="32", batch_size=4, device="cuda:0")
    ids = [workshop.tokenizer(text)["input_ids"] for text in ("Hello there", " you", "x" * 50)]
    routed, _ = model.routed
    ((logprob, greedy),) = model._loglikelihood_tokens([(None, ids[0], ids[1])])
    assert (logprob, greedy) == (pytest.approx(by_hand(routed, ids[0], ids[1])[0], abs=1e-4), False)
    (whole,) = model.loglikelihood_rolling([ask("x" * 50)])
    cuts = windows(ids[2], model.prefix_token_id, 32)
    assert len(cuts) > 1
    assert whole == pytest.approx(sum(each.logprob for each in likelihoods(routed, cuts, max_length=32)))
    (said,) = model.generate_until([ask("Hello there", {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False})])
    (same,) = generate_until(model.engine[0], [Wanted(ids[0], 8, ("\n\n",))], workshop.tokenizer)
    assert said == same.text
    assert harness(adapter=str(workshop.folder), fallback="0.5").engine[0].scheduler.fallback == 0.5
    assert "% of blocks skipped" in capsys.readouterr().err


def test_chats_are_rendered_as_in_training(workshop, harness):
    model = harness(adapter=str(workshop.folder), dtype="float32")
    asked = Conversation("c", (Message("user", "Hi"),))
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert model.tok_encode(text) == list(prompt_ids(asked, workshop.tokenizer))


@pytest.mark.parametrize(("error", "code"), [(ConfigError("routes"), 2), (LayerRouteError("no adapter here"), 1)])
def test_an_error_of_ours_ends_the_harness_with_its_message(harness, monkeypatch, capsys, error, code):
    from layerroute.integrations import lm_eval

    def failing():
        raise error

    monkeypatch.setitem(sys.modules, "lm_eval.__main__", SimpleNamespace(cli_evaluate=failing))
    with pytest.raises(SystemExit) as ended:
        lm_eval.main()
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "layerroute.integrations.lm_eval", raising=False)
    remedy = r"pip install 'layerroute\[lm-eval\]'"
    with pytest.raises(LayerRouteError, match=remedy):
        importlib.import_module("layerroute.integrations.lm_eval")
    with pytest.raises(SystemExit, match=f"^error: .*{remedy}"):
        runpy.run_module("layerroute.integrations.lm_eval", run_name="__main__")


def test_a_text_begins_once_as_the_tokenizer_begins_texts(workshop, harness):
    from tokenizers.processors import TemplateProcessing

    model = harness(adapter=str(workshop.folder), dtype="float32", max_length="32")
    tokenizer = model.tokenizer
    tokenizer.bos_token = "<|im_start|>"
    bare = model.tok_encode("Hi")
    (rolled,) = model.loglikelihood_rolling([ask("Hi")])
    begun = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=begun)
    assert model.tok_encode("Hi") == model.tok_encode("<|im_start|>Hi") == [tokenizer.bos_token_id, *bare]
    assert model.tok_encode("Hi", add_special_tokens=False) == bare
    assert model.loglikelihood_rolling([ask("Hi")]) == [rolled]  # its window has the token already


def test_what_the_harness_may_not_ask_is_named(workshop, harness):
    with pytest.raises(ConfigError, match="Did you mean 'open'"):
        harness(adapter="x", routes="opne")
    with pytest.raises(ConfigError, match="unknown 'adaptr'"):
        harness(adapter="x", adaptr="y")
    model = harness(adapter=str(workshop.folder), dtype="float32")
    with pytest.raises(ConfigError, match="'num_beams' is not supported"):
        model.generate_until([ask("Hi", {"num_beams": 4})])


def test_texts_that_are_refused_leave_nothing_running(workshop):
    with pytest.raises(LayerRouteError, match="empty"):
        generate_until(workshop.engine, [Wanted([5, 6], 4), Wanted([], 4)], workshop.tokenizer)
    assert workshop.engine.scheduler.idle


def test_texts_end_where_turns_do_and_are_drawn_as_asked(workshop, monkeypatch):
    seen, submit = [], workshop.engine.scheduler.submit
    monkeypatch.setattr(workshop.engine.scheduler, "submit", lambda request: seen.append(request) or submit(request))
    hot = Sampling(temperature=0.5, seed=3)
    generate_until(workshop.engine, [Wanted([5, 6], 4, sampling=hot)], workshop.tokenizer)
    assert (seen[0].stop_ids, seen[0].sampling) == (stop_ids(workshop.tokenizer), hot)


def test_an_empty_stop_string_stops_nothing():
    assert cut("abc", ("",)) == "abc"


def test_long_continuations_are_scored_to_their_end(routed, pairs, monkeypatch):
    monkeypatch.setattr(routed_text, "CHUNK", 2)
    for pair, each in zip(pairs, likelihoods(routed, pairs, max_length=LONG), strict=True):
        assert each.logprob == pytest.approx(by_hand(routed, *pair)[0], abs=1e-4)
