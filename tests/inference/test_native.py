"""The compiled decoder against the torch one, on a model wide enough for it."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from inference.asking import distributions, openings, prompt_of
from tiny import bypasses

from layerroute.config import RouterConfig
from layerroute.errors import ModelError
from layerroute.inference import Engine, Request, Routers, Sampling, Weights, native, native_library

VOCAB, BLOCKS = 97, 5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, sliding_window=7)),
}
ROUTES = [(True,) * 5, (False, True, True, False, True), (True, False, False, True, False), (False,) * 5]


DTYPES = (torch.float32, torch.bfloat16)


def model_of(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model


def weights_of(family, dtype=torch.bfloat16):
    model = model_of(family)
    return Weights.from_model(model, dtype=dtype, bypasses=bypasses(model.config.hidden_size, 1, 3))


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    try:
        native.compiled()
    except native.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module", params=[(family, dtype) for family in sorted(MODELS) for dtype in DTYPES], ids=str)
def weights(request):
    return weights_of(*request.param)


def check(weights, scores, others, rounding=0.06):
    """Scores are the same but for `rounding`, which in float32 is next to none."""
    tolerance = 2e-4 if weights.dtype == torch.float32 else rounding
    torch.testing.assert_close(scores, others, rtol=0, atol=tolerance)


def ask(prompt, route, new, session=None, temperature=0.0):
    sampling = Sampling(temperature=temperature, seed=3, logprobs=VOCAB)
    return Request(prompt_ids=prompt, max_new_tokens=new, route=route, sampling=sampling, session=session)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_it_follows_the_torch_decoder(weights, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        quick = Engine(weights, decoder="native")
        assert quick.decoder == "native"
        for number, route in enumerate(ROUTES):
            request = ask(prompt_of(9 + number, number), route, 30)
            result = quick.generate([request])[0]
            # Rounding may flip a token; the same tokens must then get the same scores: feed them as the prompt.
            ids = [*request.prompt_ids, *result.token_ids]
            for cut in (1, 11, 28):
                again = ask(ids[: len(request.prompt_ids) + cut], route, 1)
                plain = Engine(weights, decoder="torch").generate([again])[0]
                check(weights, distributions(result)[cut], distributions(plain)[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("max_rows", [2, 16])
def test_it_tells_what_enters_each_block_as_the_torch_decoder_does(weights, max_rows):
    prompts, config = [prompt_of(4 + 3 * n, n) for n in range(5)], RouterConfig(scope="continuation")
    (fast, tokens), (slow, same) = (
        openings(Engine(weights, config=config, decoder=name, max_rows=max_rows), prompts)
        for name in ("native", "torch")
    )
    assert fast.shape == (BLOCKS, len(prompts), SIZES["hidden_size"])
    assert [row[0] for row in tokens] == [row[0] for row in same]
    near = 1e-4 if weights.dtype == torch.float32 else 0.03  # of the residual's size
    torch.testing.assert_close(fast, slow, rtol=0, atol=near * float(slow.abs().max()))


def test_a_session_survives_growing_that_breaks_off(weights, monkeypatch):
    """The kernel reads all blocks by one capacity: after a growth that got halfway they have to grow anew."""
    prompt, follow, results = prompt_of(9), prompt_of(4, 1), []
    for breaks in (False, True):
        engine = Engine(weights, decoder="native")
        session, grown, new_empty = engine.session(), [], torch.Tensor.new_empty
        engine.generate([ask(prompt, ROUTES[2], 6, session)])

        def full(tensor, *sizes, grown=grown, new_empty=new_empty):
            grown.append(sizes)
            if len(grown) == 4:
                raise MemoryError
            return new_empty(tensor, *sizes)

        if breaks:
            monkeypatch.setattr(torch.Tensor, "new_empty", full)
            with pytest.raises(MemoryError):
                engine.generate([ask([*session.tokens, 5], ROUTES[2], 99, session)])
            monkeypatch.undo()
            assert engine.memory.used == session.nbytes
        results += engine.generate([ask([*session.tokens, *follow], ROUTES[0], 20, session)])
    whole, broken = results
    assert whole.token_ids == broken.token_ids
    assert whole.logprobs == broken.logprobs


def test_a_stream_that_is_collected_within_a_pass_ends_behind_it(weights, monkeypatch):
    """Python closes what nobody holds in the middle of anything, in the thread that is stepping too."""
    results = []
    for within in (False, True):
        engine = Engine(weights, decoder="native")
        session = engine.session()
        stream = engine.stream(ask(prompt_of(9), ROUTES[2], 30, session))
        next(tokens := iter(stream))
        decode = type(engine.scheduler.decoder).decode

        def collecting(*given, stream=stream, decode=decode):
            stream.cancel()
            return decode(*given)

        if within:
            monkeypatch.setattr(type(engine.scheduler.decoder), "decode", collecting)
        engine.scheduler.step()
        monkeypatch.undo()
        tokens.close()
        assert stream.result.finish_reason == "cancelled"
        assert len(session) == len(session.tokens)
        results += engine.generate([ask([*session.tokens, *prompt_of(4, 1)], ROUTES[0], 9, session)])
    after, within = results
    assert after.token_ids == within.token_ids
    assert after.logprobs == within.logprobs


def test_a_row_is_bitwise_the_same_in_any_company(weights):
    requests = [ask(prompt_of(4 + 3 * n, n), ROUTES[n % 4], 12, temperature=0.8) for n in range(11)]
    together = Engine(weights, decoder="native", max_rows=7).generate(requests)
    engine = Engine(weights, decoder="native")
    for request, result in zip(requests, together, strict=True):
        alone = engine.generate([request])[0]
        assert alone.token_ids == result.token_ids
        # The first token comes from a packed prefill, whose sums may round differently.
        check(weights, distributions(alone)[1:], distributions(result)[1:], rounding=0.03)


def test_nineteen_rows_that_came_one_by_one_are_bitwise_as_alone(weights):
    """More than the sixteen that tiles hold; each prefill is by itself, so every score must be the very same."""
    requests = [ask(prompt_of(4 + n % 5, n), ROUTES[n % 4], 24, temperature=0.8) for n in range(19)]
    engine = Engine(weights, decoder="native", max_rows=19)
    streams = []
    for request in requests:
        streams.append(engine.stream(request))
        engine.scheduler.step()
    for request, stream in zip(requests, streams, strict=True):
        list(stream)
        (alone,) = Engine(weights, decoder="native").generate([request])
        assert alone.token_ids == stream.result.token_ids
        assert torch.equal(distributions(alone), distributions(stream.result))


@pytest.mark.parametrize("fill", ["lazy", "eager"])
def test_sessions_follow_the_torch_decoder(weights, fill):
    quick, plain = Engine(weights, decoder="native"), Engine(weights, decoder="torch")
    fast, slow = quick.session(fill), plain.session(fill)
    said = []
    for number, route in enumerate([*ROUTES, *reversed(ROUTES)]):
        prompt = said + prompt_of(4, number)
        result = quick.generate([ask(prompt, route, 6, fast)])[0]
        said = prompt + list(result.token_ids)
        checked = plain.generate([ask(prompt, route, 1, slow)])[0]
        check(weights, distributions(result)[0], distributions(checked)[0], rounding=0.08)
        # Let the slow session run the same response, token by token, under the same route.
        for cut in range(1, 6):
            checked = plain.generate([ask(prompt + list(result.token_ids[:cut]), route, 1, slow)])[0]
            check(weights, distributions(result)[cut], distributions(checked)[0], rounding=0.08)
        assert fast.cache.valid == slow.cache.valid
    assert quick.memory.used == fast.nbytes


def test_caches_that_outgrow_the_buffers(weights):
    engine = Engine(weights, decoder="native")
    for length in (3, 70, 200, 5):
        result = engine.generate([ask(prompt_of(length), ROUTES[1], 20)])[0]
        last = ask([*prompt_of(length), *result.token_ids[:-1]], ROUTES[1], 1)
        plain = Engine(weights, decoder="torch").generate([last])[0]
        check(weights, distributions(result)[-1], distributions(plain)[0])


def test_what_it_cannot_run_falls_back_and_says_so(weights, monkeypatch):
    wide = Weights.from_model(MODELS["llama"](), dtype=torch.float64)
    engine = Engine(wide)
    assert engine.decoder == "torch"
    assert "torch.float64" in engine.decoder_note
    with pytest.raises(ModelError, match="no decoder 'native'"):
        Engine(wide, decoder="native")
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = Engine(weights)
    assert engine.decoder == "torch"
    assert "install it or set CXX" in engine.decoder_note


def homeless():
    raise RuntimeError("no home.")


def test_a_library_that_cannot_be_kept_or_loaded_falls_back_and_says_so(weights, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiler = tmp_path / "another-name"  # than other tests', whose library is loaded already
    compiler.symlink_to(shutil.which(os.environ.get("CXX", "g++")))
    monkeypatch.setenv("CXX", str(compiler))
    assert "XDG_CACHE_HOME" in Engine(weights).decoder_note
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("CXX", f"{compiler} -m64")  # a command of two words, and another name again
    monkeypatch.setattr(Path, "home", homeless)
    assert "XDG_CACHE_HOME chooses a folder" in Engine(weights).decoder_note
    monkeypatch.setenv("CXX", "g++ '")
    assert "no command" in Engine(weights).decoder_note
    monkeypatch.setattr(native_library, "_compiled", lambda compiler: tmp_path / "file")
    monkeypatch.setenv("CXX", "unheard-of")
    engine = Engine(weights)
    assert engine.decoder == "torch"
    assert "can't be loaded" in engine.decoder_note


@pytest.mark.parametrize("decoder", ["native", "torch"])
def test_numbers_are_the_same_whatever_torch_makes_by_default(decoder):
    made, request = model_of("llama"), Request(prompt_ids=prompt_of(9), max_new_tokens=8)
    routers = Routers(torch.randn(BLOCKS, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(BLOCKS))

    def generated(scope, precision):
        weights = Weights.from_model(made, dtype=torch.float32, precision=precision)
        return Engine(weights, routers, RouterConfig(scope=scope), decoder=decoder).generate([request])[0].token_ids

    cases = [(scope, precision) for scope in ("step", "continuation") for precision in (None, "int8", "int4")]
    plain = [generated(*case) for case in cases]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [generated(*case) for case in cases] == plain
    finally:
        torch.set_default_dtype(torch.float32)


def test_ends_that_are_views_are_read_as_they_are():
    made, request = model_of("llama"), Request(prompt_ids=prompt_of(9), max_new_tokens=8)
    (wanted,) = Engine(Weights.from_model(made, dtype=torch.float32)).generate([request])
    turned = made.lm_head.weight.detach().T.contiguous().T
    made.lm_head.weight = torch.nn.Parameter(turned)
    assert not made.lm_head.weight.is_contiguous()
    (found,) = Engine(Weights.from_model(made, dtype=torch.float32)).generate([request])
    assert found.token_ids == wanted.token_ids
