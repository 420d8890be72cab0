"""int8 and int4: packing, products, and an engine that equals its widened twin."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.asking import distributions, prompt_of
from inference.test_native import BLOCKS, MODELS, ROUTES, ask
from tiny import tiny

from layerroute.errors import LayerRouteError, ModelError
from layerroute.inference import Engine, Weights, native
from layerroute.inference.loading import engine_of
from layerroute.inference.quantised import linear, quantise
from layerroute.models.attaching import attach

NEAR = {"int8": 0.15, "int4": 0.15}


def model_of(family, std=0.1):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    return model


def widened(weights):
    """The twin: the same numbers in bfloat16 matrices."""
    blocks = tuple(
        dataclasses.replace(block, **{n: getattr(block, n).dense() for n in ("qkv", "out", "gate_up", "down")})
        for block in weights.blocks
    )
    ends = {"embedding": weights.embedding.dense(), "head": weights.head.dense()}
    return dataclasses.replace(weights, precision="bf16", blocks=blocks, **ends)


@pytest.fixture
def kernel():
    try:
        return native.compiled()
    except native.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module", params=["int8", "int4"])
def precision(request):
    return request.param


@pytest.fixture(scope="module", params=sorted(MODELS))
def weights(request, precision):
    return Weights.from_model(model_of(request.param), precision=precision)


@settings(max_examples=30)
@given(rows=st.integers(1, 50), groups=st.integers(1, 5), seed=st.integers(0, 99), bits=st.sampled_from([8, 4]))
def test_every_number_is_within_half_a_code_of_its_own(rows, groups, seed, bits):
    matrix = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed))
    packed = quantise(matrix, bits)
    scale = packed.scales[:rows, None] if bits == 8 else 0
    if bits == 4:
        spread = matrix.view(rows, groups, 32)
        scale = ((spread.amax(2) - spread.amin(2)) / 15).repeat_interleave(32, dim=1)
    wide = packed.dense().float()
    assert wide.shape == matrix.shape
    # Half a code, and the rounding of scales and of the widened number.
    assert ((wide - matrix).abs() <= 0.5 * scale + 0.006 * matrix.abs() + 0.003).all()


def test_what_is_on_the_grid_is_kept_exactly():
    codes = torch.randint(16, (40, 64), generator=torch.Generator().manual_seed(0))
    codes.view(40, 2, 32)[..., 0], codes.view(40, 2, 32)[..., 1] = 0, 15
    assert torch.equal(quantise(codes * 0.25 - 1.5, 4).dense().float(), codes * 0.25 - 1.5)
    codes = torch.randint(-127, 128, (40, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 0] = 127
    assert torch.equal(quantise(codes * 0.25, 8).dense(), (codes * 0.25).bfloat16())
    for bits in (8, 4):
        assert torch.equal(quantise(torch.zeros(3, 32), bits).dense(), torch.zeros(3, 32).bfloat16())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_packs_as_torch_does(kernel, bits, monkeypatch):
    matrix = torch.randn(5000, 96, generator=torch.Generator().manual_seed(2))
    matrix[3] = 0
    quick = quantise(matrix, bits)
    monkeypatch.setenv("CXX", "no-such-compiler")
    slow = quantise(matrix, bits)
    torch.testing.assert_close(quick.scales.float(), slow.scales.float(), rtol=1e-3, atol=0)
    # Where a number lies half-way, the two may round it differently.
    assert (quick.codes != slow.codes).float().mean() < 1e-3
    torch.testing.assert_close(quick.dense(), slow.dense(), rtol=0.01, atol=0.5)


def test_int4_takes_less_than_a_third_and_int8_about_half():
    wide = 2 * 640 * 576
    assert quantise(torch.randn(640, 576), 8).nbytes < 0.51 * wide
    assert quantise(torch.randn(640, 576), 4).nbytes < 0.32 * wide


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 3, 64, 130])
def test_products_are_those_of_the_widened_matrix(kernel, bits, tokens):
    generator = torch.Generator().manual_seed(tokens)
    packed = quantise(torch.randn(97, 96, generator=generator), bits)
    x = torch.randn(tokens, 96, generator=generator).bfloat16()
    wide = x.float() @ packed.dense().float().T
    # Activations keep 7 bits of the largest of 32.
    torch.testing.assert_close(linear(x, packed, None).float(), wide, rtol=0.01, atol=0.4)
    assert torch.equal(linear(x, packed.below(16), None), linear(x, packed, None)[:, 16:])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_is_bitwise_the_same_in_any_company(kernel, bits):
    generator = torch.Generator().manual_seed(4)
    packed = quantise(torch.randn(97, 96, generator=generator), bits)
    x = torch.randn(71, 96, generator=generator).bfloat16()
    alone = torch.cat([linear(row[None], packed, None) for row in x])
    assert torch.equal(linear(x, packed, None), alone)


def test_the_native_decoder_follows_the_widened_twin(kernel, weights, precision):
    quick, plain = Engine(weights, decoder="native"), Engine(widened(weights), decoder="torch")
    agreed = 0
    for number, route in enumerate(ROUTES):
        request = ask(prompt_of(9 + number, number), route, 24)
        result = quick.generate([request])[0]
        twin = plain.generate([request])[0]
        agreed += result.token_ids[0] == twin.token_ids[0]
        ids = [*request.prompt_ids, *result.token_ids]
        for cut in (1, 11, 23):
            checked = plain.generate([ask(ids[: len(request.prompt_ids) + cut], route, 1)])[0]
            torch.testing.assert_close(
                distributions(result)[cut], distributions(checked)[0], rtol=0, atol=NEAR[precision]
            )
    assert agreed >= len(ROUTES) - 1


def test_greedy_tokens_are_the_widened_twins(kernel, precision):
    """On weights so large that tokens seldom come close, and not so large that rounding grows from block to block."""
    weights = Weights.from_model(model_of("qwen2", std=0.15), precision=precision)
    quick, plain = Engine(weights, decoder="native"), Engine(widened(weights), decoder="torch")
    checked = 0
    for seed in range(8):
        request = ask(prompt_of(9, seed), ROUTES[seed % 3], 12)
        result = quick.generate([request])[0]
        for cut in range(12):
            ids = [*request.prompt_ids, *result.token_ids[:cut]]
            scores = distributions(plain.generate([ask(ids, request.route, 1)])[0])[0]
            best, second = scores.topk(2).values
            if best - second > 0.5:
                assert result.token_ids[cut] == int(scores.argmax())
                checked += 1
    assert checked > 30


def test_a_row_is_bitwise_the_same_in_any_company(kernel, weights):
    prompts = [prompt_of(4 + 3 * n, n) for n in range(7)]
    engine = Engine(weights, decoder="native", max_rows=7)
    requests = [ask(prompt, ROUTES[n % 4], 12, temperature=0.8) for n, prompt in enumerate(prompts)]
    together = engine.generate(requests)
    for request, result in zip(requests, together, strict=True):
        alone = engine.generate([request])[0]
        assert alone.token_ids == result.token_ids
        torch.testing.assert_close(distributions(alone)[1:], distributions(result)[1:], rtol=0, atol=0.05)


def test_cached_equals_uncached(kernel, weights):
    engine = Engine(weights, decoder="native")
    for route in ROUTES:
        request = ask(prompt_of(11), route, 8)
        result = engine.generate([request])[0]
        for cut in range(8):
            again = ask([*request.prompt_ids, *result.token_ids[:cut]], route, 1)
            torch.testing.assert_close(
                distributions(engine.generate([again])[0])[0], distributions(result)[cut], rtol=0, atol=0.1
            )


@pytest.mark.parametrize("decoder", ["native", "torch"])
def test_a_skipped_block_is_never_read(kernel, weights, decoder):
    block = weights.blocks[1]
    torn = dataclasses.replace(
        block,
        **{
            n: dataclasses.replace(m, scales=torch.full_like(m.scales, math.nan))
            for n, m in zip(("qkv", "out", "gate_up", "down"), block.matrices, strict=True)
        },
    )
    blocks = (weights.blocks[0], torn, *weights.blocks[2:])
    engine = Engine(dataclasses.replace(weights, blocks=blocks), decoder=decoder)
    skipping = tuple(index != 1 for index in range(BLOCKS))
    whole = Engine(weights, decoder=decoder).generate([ask(prompt_of(9), skipping, 6)])[0]
    assert engine.generate([ask(prompt_of(9), skipping, 6)])[0].token_ids == whole.token_ids
    with pytest.raises(LayerRouteError, match="not numbers"):
        engine.generate([ask(prompt_of(9), (True,) * BLOCKS, 2)])


def test_without_a_compiler_it_runs_and_says_that_it_is_slow(weights, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = Engine(weights)
    assert engine.decoder == "torch"
    assert "each product widens its matrix" in engine.decoder_note
    request = ask(prompt_of(9), ROUTES[1], 6)
    twin = Engine(widened(weights), decoder="torch").generate([request])[0]
    result = engine.generate([request])[0]
    assert result.token_ids == twin.token_ids
    # The first token's scores are not rounded to bfloat16, as the twin's are.
    torch.testing.assert_close(distributions(result), distributions(twin), rtol=0, atol=0.02)


def test_a_family_without_a_native_block_runs_quantised(precision):
    import transformers as tf
    from inference.test_native import SIZES

    torch.manual_seed(0)
    weights = Weights.from_model(tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZES)).eval(), precision=precision)
    engine, plain = Engine(weights), Engine(widened(weights))
    assert engine.decoder == "torch"
    request = ask(prompt_of(9), ROUTES[2], 1)
    result, twin = (e.generate([request])[0] for e in (engine, plain))
    torch.testing.assert_close(distributions(result)[0], distributions(twin)[0], rtol=0, atol=0.15)


def test_no_second_copy_of_a_tied_embedding(precision):
    weights = Weights.from_model(model_of("qwen2"), precision=precision)
    assert weights.embedding is weights.head
    assert weights.dtype == torch.bfloat16


def test_precisions_by_name():
    model = model_of("llama")
    assert Weights.from_model(model, precision="fp32").dtype == torch.float32
    assert Weights.from_model(model, precision="bf16").blocks[0].qkv.dtype == torch.bfloat16
    routed = attach(model_of("llama"))
    assert engine_of(routed, "int8").weights.blocks[0].qkv.bits == 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_has_no_code_is_refused(bits, odd):
    matrix = torch.zeros(16, 32)
    matrix[3, 5] = odd
    with pytest.raises(ModelError, match="damaged"):
        quantise(matrix, bits)


def test_widths_that_cannot_be_packed_are_refused():
    with pytest.raises(ModelError, match="multiple of 32"):
        Weights.from_model(tiny("llama"), precision="int8")
