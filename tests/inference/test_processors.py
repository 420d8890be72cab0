"""The engine on processors other than this one: the kernel built for older ones, and prefill in float32."""

import os
import platform
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from inference.asking import distributions, prompt_of
from inference.test_drafting import test_the_compiled_decoder_drafts_bit_for_bit as drafts_bit_for_bit
from inference.test_native import MODELS, ROUTES, SIZES, ask, weights_of
from inference.test_quantised import model_of, widened
from tiny import bypasses

from layerroute.inference import Engine, Weights, blocks, native_library, native_rows
from layerroute.inference import weights as weights_module
from layerroute.inference.quantised import linear, quantise

PROCESSORS = {"x86-64": "sse2", "x86-64-v3": "avx2", "native": ""}


@pytest.fixture(params=PROCESSORS)
def older(request, monkeypatch):
    """A kernel compiled for an older processor, or this one. Where there is a compiler, one that fails is an error."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no compiler")
    if platform.machine() != "x86_64" or PROCESSORS[request.param].encode() not in native_library._processor():
        pytest.skip(f"this processor can't run what is built for {request.param}")
    flags = tuple(f"-march={request.param}" if flag.startswith("-march") else flag for flag in native_library.FLAGS)
    monkeypatch.setattr(native_library, "FLAGS", flags)
    native_library._library.cache_clear()
    try:
        native_library.compiled()
        yield
    finally:
        native_library._library.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_the_kernel_follows_torch_and_rows_do_not_meet(older, precision):
    model = model_of("qwen2")
    more = bypasses(model.config.hidden_size, 1, 3, rank=33)  # more than one group of 32, and not two
    weights = Weights.from_model(model, precision=precision, bypasses=more)
    twin = widened(weights) if precision.startswith("int") else weights
    engine, plain = Engine(weights, decoder="native", max_rows=7), Engine(twin, decoder="torch")
    requests = [ask(prompt_of(4 + 3 * n, n), ROUTES[n % 4], 12, temperature=0.8) for n in range(7)]
    for request, result in zip(requests, engine.generate(requests), strict=True):
        assert engine.generate([request])[0].token_ids == result.token_ids
        again = ask([*request.prompt_ids, *result.token_ids[:-1]], request.route, 1)
        scores = distributions(plain.generate([again])[0])[0]
        torch.testing.assert_close(
            distributions(result)[-1], scores, rtol=0, atol=2e-4 if precision == "fp32" else 0.15
        )


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_is_bitwise_the_same_in_any_company(older, bits):
    generator = torch.Generator().manual_seed(4)
    packed = quantise(torch.randn(97, 96, generator=generator), bits)
    x = torch.randn(78, 96, generator=generator)
    alone = torch.cat([linear(row[None], packed, None) for row in x])
    for rows in (7, 14, 78):  # 14 and 64 + 14: fewer than tiles take at once, and more than lanes would be given
        assert torch.equal(linear(x[:rows], packed, None), alone[:rows])


def rows_of(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


OPERATIONS = {
    "norm": lambda x: native_rows.normalise(x, rows_of(x.dtype, 96), 1e-5),
    "silu": lambda x: native_rows.gate(40 * x, gelu=False),
    "gelu": lambda x: native_rows.gate(40 * x, gelu=True),
    "turn": lambda x: turned(x, None),
    "norm and turn": lambda x: turned(x, rows_of(x.dtype, 32)),
}
IN_TORCH = {
    "norm": lambda x: F.rms_norm(x, (96,), rows_of(x.dtype, 96), 1e-5),
    "silu": lambda x: F.silu(40 * x[:, :48]) * 40 * x[:, 48:],
    "gelu": lambda x: F.gelu(40 * x[:, :48], approximate="tanh") * 40 * x[:, 48:],
    "turn": lambda x: blocks.rotate(heads_of(x), angles_of(x)).flatten(1),
    "norm and turn": lambda x: blocks.rotate(
        F.rms_norm(heads_of(x), (32,), rows_of(x.dtype, 32), 1e-5), angles_of(x)
    ).flatten(1),
}


def heads_of(x):
    return x.view(len(x), 3, 32)[:, :2]  # the third one's numbers lie between two tokens'


def angles_of(x):
    return x[:, None, 64:80].clone(), x[:, None, 80:].clone()  # no row's like another's; no cosine, no sine


def turned(x, gain):
    before, angles = x.clone(), angles_of(x)
    assert native_rows.fits_heads(heads_of(x), angles[0])
    out = native_rows.turn(heads_of(x), gain, *angles, 1e-5).flatten(1).clone()
    assert torch.equal(x[:, 64:], before[:, 64:])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_lies_between_products_is_as_in_torch_and_rows_do_not_meet(older, name, dtype):
    x = rows_of(dtype, 37, 96)
    assert native_rows.fits(x)
    exact = IN_TORCH[name](x.double())
    found = OPERATIONS[name](x.clone())
    assert found.dtype == dtype
    close = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=close, atol=close)
    assert torch.equal(found, torch.cat([OPERATIONS[name](row[None].clone()) for row in x]))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_prefill_is_the_same_without_a_library(family, monkeypatch):
    if native_library.at_hand() is None:
        pytest.skip("no compiler")
    monkeypatch.setitem(MODELS, "gemma2", lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, sliding_window=7)))
    weights = weights_of(family, torch.float32)
    requests = [ask(prompt_of(9 + number, number), route, 2) for number, route in enumerate(ROUTES)]
    quick = Engine(weights, decoder="torch").generate(requests)
    monkeypatch.setattr(native_rows, "at_hand", lambda: None)
    for result, plain in zip(quick, Engine(weights, decoder="torch").generate(requests), strict=True):
        torch.testing.assert_close(distributions(result), distributions(plain), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_are_bit_for_bit(older, dtype, monkeypatch):
    drafts_bit_for_bit("qwen3", dtype, monkeypatch)


@pytest.mark.parametrize("quick", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("fill", ["lazy", "eager"])
def test_prefill_in_either_dtype_is_one_and_the_same_step(monkeypatch, quick, fill):
    monkeypatch.setattr(weights_module, "multiplies_bfloat16", lambda device: quick)
    weights, twin = weights_of("llama"), weights_of("llama", torch.float32)
    assert weights.prefill_dtype == (torch.bfloat16 if quick else torch.float32)
    engine, plain = Engine(weights), Engine(twin)
    session, exact = engine.session(fill), plain.session(fill)
    said: list[int] = []
    for number, route in enumerate([*ROUTES, *reversed(ROUTES)]):
        said += prompt_of(12, number)
        result = engine.generate([ask(said, route, 1, session)])[0]
        checked = plain.generate([ask(said, route, 1, exact)])[0]
        torch.testing.assert_close(distributions(result)[0], distributions(checked)[0], rtol=0, atol=0.1)
        said += result.token_ids
    assert all(keys is None or keys.dtype == torch.bfloat16 for keys in session.cache.keys)
    assert engine.memory.used == session.nbytes


def test_a_matrix_narrower_than_what_it_multiplies_is_widened():
    torch.manual_seed(0)
    x, matrix, bias = torch.randn(5, 64), torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    exact = x.double() @ matrix.double().T + bias.double()
    torch.testing.assert_close(linear(x, matrix, bias), exact.float())
