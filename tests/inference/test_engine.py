"""The engine against transformers and against the slow twin."""

import math

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from inference import oracle
from inference.asking import BLOCKS, ask, distributions, prompt_of, same
from tiny import FAMILIES, SIZES, bypasses, tiny

from layerroute.config import RouterConfig
from layerroute.errors import AdapterError, LayerRouteError, ModelError
from layerroute.inference import Engine, Request, RouteClasses, Routers, Sampling, Weights
from layerroute.inference.routers import Gates, PackedPool

routes = st.tuples(*[st.booleans()] * BLOCKS)


def undecided(seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return Routers(torch.randn(BLOCKS, 32, generator=generator) * scale, torch.zeros(BLOCKS))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_open_equals_transformers_generate(family):
    model = tiny(family)
    prompt = prompt_of(11)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :]
    result = Engine(Weights.from_model(model)).generate([Request(prompt_ids=prompt, max_new_tokens=20)])[0]
    assert result.token_ids == tuple(expected.tolist())
    assert result.route == (True,) * BLOCKS
    assert result.finish_reason == "length"


FULL = ["full_attention"] * BLOCKS


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"sliding_window": 5}),
        ("mistral", {"sliding_window": 5, "layer_types": FULL}),
        ("phi3", {"sliding_window": 5, "layer_types": FULL}),
        ("qwen2", {"sliding_window": 5, "layer_types": FULL}),
    ],
)
def test_windows_are_those_that_transformers_sees(family, options):
    """Llama reads none of it, Mistral and Phi-3 the window alone."""
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(family, **SIZES, **options)).eval()
    for name, parameter in made.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    prompt = prompt_of(30)
    (result,) = Engine(Weights.from_model(made)).generate([ask(prompt, new=1)])
    with torch.no_grad():
        wanted = made(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(distributions(result)[0], wanted.double(), rtol=1e-4, atol=1e-4)


def test_a_model_that_attends_in_both_directions_is_refused():
    both = tiny("gemma3_text")
    both.config.use_bidirectional_attention = True
    with pytest.raises(ModelError, match="both directions"):
        Weights.from_model(both)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("route", [(False, True, False, True), (True, False, False, True), (False,) * BLOCKS])
def test_routed_equals_the_twin(family, route):
    model = tiny(family)
    request = ask(prompt_of(9), new=8, route=route)
    result = Engine(Weights.from_model(model)).generate([request])[0]
    same(result, oracle.Twin(model).expect(request, result))
    assert result.token_ids == oracle.greedy(model, request.prompt_ids, route, 8)


@settings(max_examples=40)
@given(route=routes, length=st.integers(1, 20), seed=st.integers(0, 99))
def test_cached_equals_uncached_for_every_route(model, engine_of_all, route, length, seed):
    request = ask(prompt_of(length, seed), new=5, route=route)
    result = engine_of_all.generate([request])[0]
    assert result.route == result.context_route == route
    same(result, oracle.Twin(model).expect(request, result))


@pytest.fixture(scope="module")
def engine_of_all(weights):
    return Engine(weights)


CONFIGS = {
    "default": RouterConfig(),
    "response": RouterConfig(scope="response"),
    "continuation": RouterConfig(scope="continuation"),
    "continuation, raw": RouterConfig(scope="continuation", normalise=False),
    "continuation, strict": RouterConfig(scope="continuation", threshold=0.9),
    "continuation, pinned": RouterConfig(scope="continuation", always_run=(0, 2), threshold=0.99),
    "mean": RouterConfig(pooling="mean"),
    "raw": RouterConfig(normalise=False, window=3),
    "with the first token": RouterConfig(skip_first=False, pooling="mean"),
    "strict": RouterConfig(threshold=0.9),
    "pinned": RouterConfig(always_run=(0, 2), threshold=0.99),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_the_routers_decide_as_defined(model, weights, name, length):
    config, routers = CONFIGS[name], undecided()
    seen = set()
    for seed in range(4):
        request = ask(prompt_of(length, seed))
        result = Engine(weights, routers, config).generate([request])[0]
        everything = (True,) * BLOCKS
        assert result.context_route == (result.route if config.scope == "step" else everything)
        late = config.scope == "continuation"
        read = [*request.prompt_ids, *result.token_ids[:late]]
        earlier = [everything] * (len(read) - 1) * late
        assert result.route == oracle.decide(model, read, earlier, routers.weight, routers.bias, config)
        same(result, oracle.Twin(model, config.scope).expect(request, result))
        seen.add(result.route)
    assert len(seen) > 1 or "pinned" in name or "strict" in name


def test_a_skipped_block_is_never_run(model):
    weights = Weights.from_model(model)
    with torch.no_grad():
        for tensor in (weights.blocks[1].qkv, weights.blocks[1].down):
            tensor.fill_(float("nan"))
    engine = Engine(weights)
    routed = engine.generate([ask(prompt_of(9), route=(True, False, True, True))])[0]
    assert not any(math.isnan(value) for entry in routed.logprobs for _, value in entry.top)
    with pytest.raises(LayerRouteError, match="not numbers"):
        engine.generate([ask(prompt_of(9), new=1)])


def test_stop_tokens_end_the_response_and_belong_to_it(engine):
    full = engine.generate([Request(prompt_ids=prompt_of(5), max_new_tokens=9)])[0].token_ids
    stop = full[3]
    result = engine.generate([Request(prompt_ids=prompt_of(5), max_new_tokens=9, stop_ids=frozenset([stop]))])[0]
    assert result.token_ids == full[: full.index(stop) + 1]
    assert result.finish_reason == "stop"


def test_no_new_tokens_still_decides_the_route(weights):
    result = Engine(weights, undecided()).generate([Request(prompt_ids=prompt_of(12), max_new_tokens=0)])[0]
    assert result.token_ids == ()
    assert len(result.route) == BLOCKS


@pytest.mark.parametrize(("new", "ran"), [(0, 12), (1, 12), (2, 13), (3, 14)])
def test_scope_continuation_decides_only_where_a_second_token_is_asked_for(weights, new, ran):
    closed = Routers(torch.zeros(BLOCKS, 32), torch.full((BLOCKS,), -1.0))
    engine = Engine(weights, closed, RouterConfig(scope="continuation"))
    session = engine.session()
    result = engine.generate([Request(prompt_ids=prompt_of(12), max_new_tokens=new, session=session)])[0]
    assert len(result.token_ids) == new
    assert result.route == (new < 2,) * BLOCKS
    assert result.context_route == (True,) * BLOCKS
    assert session.cache.valid == [min(ran, 13)] * BLOCKS  # the context and the response's first token
    assert len(session) == ran


def test_scope_continuation_ends_with_a_stop_token_that_comes_first(weights):
    engine = Engine(weights, undecided(), RouterConfig(scope="continuation"))
    first = engine.generate([Request(prompt_ids=prompt_of(5), max_new_tokens=1)])[0].token_ids[0]
    asked = Request(prompt_ids=prompt_of(5), max_new_tokens=9, stop_ids=frozenset([first]))
    result = engine.generate([asked, Request(prompt_ids=prompt_of(9), max_new_tokens=9)])[0]
    assert (result.token_ids, result.finish_reason) == ((first,), "stop")
    assert engine.memory.used == 0


def test_a_stream_yields_what_generate_returns(engine):
    request = Request(prompt_ids=prompt_of(5), max_new_tokens=9)
    stream = engine.stream(request)
    assert tuple(stream) == engine.generate([request])[0].token_ids == stream.result.token_ids


def test_bfloat16_runs_and_stays_near(model):
    request = ask(prompt_of(9), new=1)
    wide = Engine(Weights.from_model(model)).generate([request])[0]
    narrow = Engine(Weights.from_model(model, dtype=torch.bfloat16)).generate([request])[0]
    near = dict(narrow.logprobs[0].top)
    assert all(abs(near[token] - value) < 0.3 for token, value in wide.logprobs[0].top)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(prompt_ids=[], max_new_tokens=2), "empty"),
        (Request(prompt_ids=[3, 97], max_new_tokens=2), "from 0 to 96"),
        (Request(prompt_ids=[3, -1], max_new_tokens=2), "from 0 to 96"),
        (Request(prompt_ids=[3], max_new_tokens=-1), "max_new_tokens"),
        (Request(prompt_ids=[3], max_new_tokens=128), "128 positions"),
        (Request(prompt_ids=[3], max_new_tokens=2, route=(True,)), "a route of 1 gates"),
        (Request(prompt_ids=[3.0], max_new_tokens=2), "whole numbers"),
        (Request(prompt_ids=torch.tensor([[3, 4]]), max_new_tokens=2), "whole numbers"),
        (Request(prompt_ids=[3], max_new_tokens=2.0), "whole numbers"),
        (Request(prompt_ids=[3], max_new_tokens=2, stop_ids=2), "collections of them"),
        (Request(prompt_ids=[3], max_new_tokens=2, route=2), "a route is"),
    ],
)
def test_requests_the_model_cannot_run_are_refused(engine, request_, says):
    with pytest.raises(LayerRouteError, match=says):
        engine.generate([Request(prompt_ids=[5], max_new_tokens=2), request_])
    assert engine.scheduler.idle
    assert engine.memory.used == 0


def test_models_the_engine_cannot_run_are_refused(model):
    import transformers as tf

    with pytest.raises(ModelError, match="no block program"):
        Weights.from_model(tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    longer = tiny("llama")
    longer.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ModelError, match="changes with the length"):
        Weights.from_model(longer)
    wrapped = tiny("llama")
    wrapped.model.layers[0].self_attn.q_proj = torch.nn.Sequential(wrapped.model.layers[0].self_attn.q_proj)
    with pytest.raises(ModelError, match="merge the adapter"):
        Weights.from_model(wrapped)
    cut = tiny("llama")
    cut.lm_head = torch.nn.Linear(32, 60, bias=False)
    with pytest.raises(ModelError, match="a head of 60 tokens and an embedding of 97"):
        Weights.from_model(cut)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
def test_scores_that_are_no_numbers_end_in_an_error(sampling):
    broken = tiny("llama")
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(LayerRouteError, match="not numbers"):
        Engine(Weights.from_model(broken)).generate([Request(prompt_ids=[3, 4], max_new_tokens=2, sampling=sampling)])


def test_tokens_and_routes_of_other_sequences_are_taken(engine):
    route = (True, False, True, True)
    plain = engine.generate([Request(prompt_ids=[3, 4], max_new_tokens=3, route=route)])[0]
    ids = torch.tensor([3, 4])
    other = engine.generate([Request(prompt_ids=ids, max_new_tokens=3, route=list(route), stop_ids=[])])[0]
    assert (other.token_ids, other.route) == (plain.token_ids, plain.route)


def test_routers_that_do_not_fit_are_refused(weights):
    with pytest.raises(AdapterError, match="3 routers"):
        Engine(weights, Routers.open(3, 32))
    with pytest.raises(AdapterError, match="width"):
        Engine(weights, Routers.open(BLOCKS, 31))
    with pytest.raises(LayerRouteError, match="no block 7"):
        Engine(weights, config=RouterConfig(always_run=(7,)))


def test_what_an_engine_does_not_know_is_named(weights):
    with pytest.raises(LayerRouteError, match="Did you mean 'graphs'"):
        Engine(weights, decoder="graph")
    with pytest.raises(LayerRouteError, match="Did you mean 'eager'"):
        Engine(weights).session("Eager")
    with pytest.raises(ModelError, match="Did you mean 'int8'"):
        Weights.from_model(tiny("llama"), precision="int3")
    with pytest.raises(LayerRouteError, match="this model's 4 blocks"):
        Engine(weights, classes=RouteClasses(((True,) * 5,)))


def test_a_residual_that_overflowed_closes_no_gate(weights):
    routers = Routers(torch.randn(BLOCKS, 32), torch.full((BLOCKS,), -9.0))
    gates = Gates(routers, RouterConfig(pooling="mean", skip_first=False), BLOCKS, 32, weights.device)
    pool = PackedPool.over([range(0, 2), range(2, 4)], gates.config, weights.device)
    x = torch.zeros(4, 32)
    assert gates(1, pool, x) == [False, False]
    x[3] = float("inf")
    assert gates(1, pool, x) == [True, True]


def test_bypasses_that_do_not_fit_are_refused(model):
    width = model.config.hidden_size
    good = bypasses(width, 1, 2)
    bad = ({4: good[1]}, {1: good[1][::-1]}, {1: good[1], 2: bypasses(width, 2, rank=4)[2]})
    for pairs in bad:
        with pytest.raises(ModelError, match="bypass of block"):
            Weights.from_model(model, bypasses=pairs)


def test_a_gate_whose_score_is_the_threshold_is_closed():
    gates = Gates(Routers(torch.zeros(2, 4), torch.zeros(2)), RouterConfig(), 2, 4, torch.device("cpu"))
    pool = PackedPool.over([range(3)], RouterConfig(), torch.device("cpu"))
    assert gates(0, pool, torch.randn(3, 4)) == [False]
    assert gates.of_tokens(torch.randn(2, 1, 4)) == [(False, False)]


def test_where_a_residual_has_overflowed_blocks_run():
    gates = Gates(Routers(torch.ones(2, 4), -torch.ones(2)), RouterConfig(), 2, 4, torch.device("cpu"))
    pool = PackedPool.over([range(3)], RouterConfig(), torch.device("cpu"))
    assert gates(0, pool, torch.full((3, 4), float("nan"))) == [True]
    assert gates.of_tokens(torch.full((2, 1, 4), float("nan"))) == [(True, True)]
