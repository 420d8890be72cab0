"""What must hold for every family: one suite, run for each."""

import pytest
import torch
from tiny import FAMILIES, SIZES, tiny, tiny_tokenizer

from layerroute.config import AdapterConfig, BypassConfig, LoraConfig, RouterConfig
from layerroute.errors import ConfigError, ModelError
from layerroute.models.attaching import attach, peft_config
from layerroute.models.export import _narrowed, export, merged, with_route
from layerroute.models.families import FAMILIES as TABLE
from layerroute.models.families import Head, family_of
from layerroute.models.loading import Backbone
from layerroute.models.nll import head_logits, response_nll
from layerroute.routing.route import Route
from layerroute.routing.routed import RoutePass

CONTEXT, LENGTH = 9, 14
BYPASS = BypassConfig(rank=3)
EXACT = AdapterConfig(lora=LoraConfig(dropout=0.0), bypass=BYPASS)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


def batch(rows=3, seed=1):
    ids = torch.randint(3, 97, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    context = (torch.arange(LENGTH) < CONTEXT).expand(rows, LENGTH)
    return ids, context, ~context


def undecided(routed, scale=4.0, seed=5):
    """Give the routers weights that make them disagree between steps and blocks."""
    generator = torch.Generator().manual_seed(seed)
    for router in routed.routers:
        torch.nn.init.normal_(router.score.weight, std=scale, generator=generator)
        torch.nn.init.zeros_(router.score.bias)
    return routed


def lively(routed, seed=6):
    """Give LoRA and bypasses an effect: at birth their second matrices are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in routed.named_parameters():
        if "lora_B" in name or ".up." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return routed


def test_every_supported_family_is_proven():
    assert set(FAMILIES) == set(TABLE)


def test_attaching_changes_nothing(family):
    ids, context, response = batch()
    before = tiny(family)(input_ids=ids).logits
    routed = attach(tiny(family), EXACT)
    assert torch.equal(routed.eval().token_logits(ids, context, response)[0], before)
    after = routed.train().token_logits(ids, context)[0]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_skipped_block_is_never_called(family):
    routed = attach(tiny(family), EXACT).eval()
    called = []
    for block in routed.blocks:
        block.block.register_forward_hook(lambda *_, i=block.index: called.append(i))
    ids, context, response = batch()
    out = routed(ids, context, response, forced=Route.skipping([0, 2], 4))
    assert called == [1, 3]
    assert out.gates.tolist() == [[False, True, False, True]] * 3


def test_rows_with_different_routes_equal_the_rows_alone(family):
    ids, context, _ = batch()
    routed = undecided(lively(attach(tiny(family), EXACT))).eval()
    together, gates = routed.token_logits(ids, context)
    assert 0 < gates.float().mean() < 1, "the routers decide nothing: the test could not fail"
    assert len({tuple(row) for row in gates.tolist()}) > 1
    for row in range(len(ids)):
        alone, own = routed.token_logits(ids[row : row + 1], context[row : row + 1])
        assert own[0].equal(gates[row])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_pads_change_nothing(family):
    ids, context, response = batch()
    routed = undecided(lively(attach(tiny(family), EXACT))).eval()
    plain = routed(ids, context, response)
    tail = torch.zeros(3, 6, dtype=torch.bool)
    padded = routed(
        torch.cat([ids, torch.zeros(3, 6, dtype=ids.dtype)], 1),
        torch.cat([context, tail], 1),
        torch.cat([response, tail], 1),
    )
    assert plain.gates.equal(padded.gates)
    torch.testing.assert_close(plain.nll, padded.nll, rtol=1e-4, atol=1e-4)


def test_training_gates_equal_prefill_gates_and_never_see_the_response(family):
    ids, context, response = batch()
    routed = undecided(attach(tiny(family), EXACT))
    training = routed.train()(ids, context, response).gates
    prefill = routed.eval().token_logits(ids[:, :CONTEXT], context[:, :CONTEXT])[1]
    other = ids.clone()
    other[:, CONTEXT:] = 50
    assert training.equal(prefill)
    assert training.equal(routed(other, context, response).gates)
    assert 0 < training.float().mean() < 1


def test_training_blend_equals_true_skipping(family):
    ids, context, response = batch()
    routed = undecided(lively(attach(tiny(family), EXACT)))
    blended = routed.train()(ids, context, response)
    skipped = routed.eval()(ids, context, response)
    torch.testing.assert_close(blended.nll, skipped.nll, rtol=1e-4, atol=1e-4)


def test_given_gates_skip_rows_in_training_too_and_every_block_is_called(family):
    """The twin runs every row and drops what closed gates made. A rank that left a block out would hang the others."""
    ids, _, response = batch()
    gates = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]], dtype=torch.bool)
    routed = lively(attach(tiny(family), EXACT)).train()
    rows, grads = [], []
    for block in routed.blocks:
        block.block.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for skippable in (torch.ones_like(response), None):
        routed.zero_grad()
        routed.run(ids, response, RoutePass(None, gates, skippable)).nll.sum().backward()
        grads.append(
            {name: p.grad.clone() for name, p in routed.named_parameters() if ".lora_" in name or ".bypass." in name}
        )
    assert rows == [3, 3, 3, 3, 3, 2, 1, 2]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4)
    assert not any(grad.any() for name, grad in grads[1].items() if "layers.2.block." in name)


def test_only_the_adapter_trains_and_all_of_it_does(family):
    ids, context, response = batch(rows=12)  # so many that every block is closed for some
    routed = undecided(lively(attach(tiny(family), EXACT))).train()
    trainable = {name for name, p in routed.named_parameters() if p.requires_grad}
    assert all(any(part in name for part in (".router.", ".bypass.", ".lora_")) for name in trainable)
    out = routed(ids, context, response)
    (out.nll.sum() + torch.sigmoid(out.logits).sum()).backward()
    touched = {name for name, p in routed.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == trainable


@pytest.mark.parametrize(("scope", "kept"), [("response", CONTEXT), ("continuation", CONTEXT + 1)])
def test_tokens_outside_the_scope_run_every_block(family, scope, kept):
    ids, context, response = batch()
    config = AdapterConfig(router=RouterConfig(scope=scope), bypass=BYPASS)
    routed = lively(attach(tiny(family), config)).eval()
    whole, _ = routed.token_logits(ids, context, response)
    skipping, _ = routed.token_logits(ids, context, response, forced=Route.skipping([1], 4))
    torch.testing.assert_close(whole[:, :kept], skipping[:, :kept], rtol=0, atol=0)
    assert not torch.allclose(whole[:, kept], skipping[:, kept])


def test_export_merges_lora_exactly(family):
    ids, context, response = batch()
    routed = lively(attach(tiny(family), EXACT)).eval()
    wanted = routed.token_logits(ids, context, response, forced=Route.open(4))[0]
    torch.testing.assert_close(merged(routed)(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_exported_route_equals_the_routed_model_in_plain_transformers(family, tmp_path):
    from transformers import AutoModelForCausalLM

    ids, context, response = batch()
    route = Route.skipping([0, 2], 4)
    routed = lively(attach(tiny(family))).eval()
    wanted = routed.token_logits(ids, context, response, forced=route)[0]
    with_route(merged(routed), routed.family, route).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.config.num_hidden_layers == 2
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    once = plain.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(once, plain.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))


def test_a_route_whose_blocks_have_bypasses_is_no_plain_checkpoint(tmp_path):
    backbone = Backbone("tiny", tiny("llama"), tiny_tokenizer())
    routed = lively(attach(backbone.model, EXACT))
    with pytest.raises(ModelError, match=r"block 2 has a bypass.*without a route"):
        export(tmp_path / "fixed", routed, backbone, Route.skipping([2], 4))
    assert not (tmp_path / "fixed").exists()
    export(tmp_path / "whole", routed, backbone, Route.open(4))


def test_pinned_serves_transformers_generate(family):
    ids, *_ = batch(rows=1)
    routed = attach(tiny(family), EXACT).eval()
    with routed.pinned(Route.open(4)) as model:
        got = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, tiny(family).generate(ids, max_new_tokens=4, do_sample=False))


def test_an_unknown_family_says_how_to_add_it():
    from transformers import GPT2Config

    with pytest.raises(ModelError, match=r"'gpt2' is not supported.*families\.py"):
        family_of(GPT2Config())


def test_always_run_must_name_existing_blocks():
    with pytest.raises(ConfigError, match="block 4 does not exist"):
        attach(tiny("llama"), AdapterConfig(router=RouterConfig(always_run=(4,))))


def test_always_run_beats_the_router():
    ids, context, response = batch()
    routed = attach(tiny("llama"), AdapterConfig(router=RouterConfig(always_run=(1,)))).eval()
    for router in routed.routers:
        router.reset(bias=-9.0)
    assert routed(ids, context, response).gates[0].tolist() == [False, True, False, False]


def test_the_papers_parameter_count():
    """Qwen2.5-0.5B at rank 8: 24 routers of 897 and 1,081,344 of LoRA, on the meta device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == 494_032_768
        routed = attach(model)
    count = {
        part: sum(p.numel() for n, p in routed.named_parameters() if p.requires_grad and part in n)
        for part in ("router", "lora", "")
    }
    assert count == {"router": 24 * 897, "lora": 1_081_344, "": 1_102_872}


def test_gradient_checkpointing_changes_no_gradient():
    ids, context, response = batch()

    def gradients(checkpointing):
        torch.manual_seed(0)
        routed = undecided(lively(attach(tiny("qwen2"), EXACT))).train()
        if checkpointing:
            routed.recompute()
            assert any(getattr(module, "gradient_checkpointing", False) for module in routed.base.modules())
        out = routed(ids, context, response)
        (out.nll.sum() + torch.sigmoid(out.logits).sum()).backward()
        return {n: p.grad for n, p in routed.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_windows_that_count_blocks_from_the_bottom_are_counted_anew():
    import transformers as tf

    config = tf.Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=2)
    assert [_narrowed(config, kept).max_window_layers for kept in ([0, 3], [2, 3], [0, 1, 2])] == [1, 0, 2]


def test_an_exported_model_generates_with_a_cache():
    routed = attach(tiny("llama"))
    assert not routed.base.config.use_cache
    assert merged(routed).config.use_cache


def test_lora_is_attached_as_asked():
    config = peft_config(AdapterConfig(lora=LoraConfig(rank=3, alpha=7, dropout=0.3)), family_of(tiny("llama").config))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.3)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_gradient_of_the_loss_is_autograds(softcap):
    draw = torch.Generator().manual_seed(0)
    weight, targets = torch.randn(20, 6, generator=draw), torch.randint(20, (9,), generator=draw)
    head, upstream, grads = Head(weight, None, softcap), torch.rand(9, generator=draw), []
    for way in (
        lambda hidden: response_nll(hidden, targets, head),
        lambda hidden: torch.nn.functional.cross_entropy(head_logits(hidden, head), targets, reduction="none"),
    ):
        hidden = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        way(hidden).backward(upstream)
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_route_baked_in_generates_with_a_cache_at_once(family):
    routed = attach(tiny(family)).eval()
    model = with_route(merged(routed), routed.family, Route.skipping([0, 2], 4))
    ids = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    once = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(once, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))


@pytest.mark.parametrize("scope", ["response", "continuation"])
def test_a_route_is_not_exported_where_the_context_ran_every_block(scope, tmp_path):
    routed = attach(tiny("llama"), AdapterConfig(router=RouterConfig(scope=scope)))
    backbone = Backbone("tiny", routed.base, None)
    with pytest.raises(ModelError, match=rf"{scope}.*without a route"):
        export(tmp_path, routed, backbone, Route.skipping([1], 4))
    assert not any(tmp_path.iterdir())
