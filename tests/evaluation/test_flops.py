"""The analytic counts agree with torch's own counter, for every family, open or skipped."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tiny import FAMILIES, SIZES, tiny
from torch.utils.flop_counter import FlopCounterMode

from layerroute.config import AdapterConfig, BypassConfig, LoraConfig, RouterConfig
from layerroute.evaluation.flops import parameter_counts, step_flops, tokens_skipped, weight_bytes_per_token
from layerroute.models.attaching import attach
from layerroute.routing.route import Route

CONTEXT, RESPONSE = 17, 6
QWEN = tf.Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)


def counted(family, gates):
    """What torch counts while the routed model scores one step. Its counter does not see fused CPU attention."""
    routed = attach(tiny(family), AdapterConfig(lora=LoraConfig(rank=0))).eval()
    routed.base.set_attn_implementation("eager")
    ids = torch.randint(3, 97, (1, CONTEXT + RESPONSE))
    context = torch.arange(ids.shape[1])[None] < CONTEXT
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        routed(ids, context, ~context, forced=Route(gates), score=True)
    return counter.get_total_flops(), routed.base.config


@pytest.mark.parametrize("gates", [(True,) * 4, (True, False, True, False), (False,) * 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_agrees_with_the_flop_counter(family, gates):
    total, config = counted(family, gates)
    flops = step_flops(config, CONTEXT, RESPONSE, gates)
    assert flops["total"] - flops["kv_fill"] == total


def test_the_total_is_the_sum_of_the_parts_and_routes_can_be_bools():
    config = tiny("llama").config
    flops = step_flops(config, 10, 5, Route.skipping([1], 4))
    assert flops["total"] == flops["blocks"] + flops["kv_fill"] + flops["routers"] + flops["head"]
    assert flops == step_flops(config, 10, 5, [True, False, True, True])


def test_filling_keys_and_values_costs_two_projections():
    config = tiny("llama").config
    attention = tiny("llama").model.layers[0].self_attn
    weights = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    closed = Route.skipping([0, 3], 4)
    assert step_flops(config, 10, 5, closed)["kv_fill"] == 2 * (2 * weights * 15)
    assert step_flops(config, 10, 5, closed, "response")["kv_fill"] == 2 * (2 * weights * 5)
    assert step_flops(config, 10, 5, closed, "continuation")["kv_fill"] == 2 * (2 * weights * 4)


def test_scope_response_runs_the_context_through_every_block():
    config = tiny("llama").config
    shut, open_ = Route((False,) * 4), Route.open(4)
    assert step_flops(config, 10, 5, shut, "response")["blocks"] == step_flops(config, 10, 0, open_)["blocks"]
    assert step_flops(config, 10, 5, open_, "response") == step_flops(config, 10, 5, open_, "step")


def test_scope_continuation_runs_the_first_token_of_the_response_through_every_block():
    config = tiny("llama").config
    shut, open_ = Route((False,) * 4), Route.open(4)
    assert step_flops(config, 10, 5, shut, "continuation")["blocks"] == step_flops(config, 11, 0, open_)["blocks"]
    assert [tokens_skipped(10, size, "continuation") for size in (0, 1, 5)] == [0, 0, 4]


def test_a_route_of_another_length_is_refused():
    with pytest.raises(ValueError, match="3 gates for 4 blocks"):
        step_flops(tiny("llama").config, 1, 1, [True] * 3)


def test_head_size_is_derived_where_a_config_has_none():
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    assert step_flops(SimpleNamespace(**sizes), 5, 2, [True] * 4) == step_flops(
        SimpleNamespace(**SIZES), 5, 2, [True] * 4
    )


def test_bytes_are_those_of_the_weights():
    model = tiny("llama")
    projections = sum(p.numel() for n, p in model.model.layers[0].named_parameters() if "norm" not in n)
    read = weight_bytes_per_token(model.config, [True, True, True, False])
    assert read == {
        "blocks": 3 * 2 * projections,
        "bypasses": 0,
        "head": 2 * model.lm_head.weight.numel(),
        "total": 6 * projections + 2 * model.lm_head.weight.numel(),
    }


@pytest.mark.parametrize(("skipped", "speed_up"), [(6, 1.22), (8, 1.32)])
def test_the_most_that_skipping_can_give_on_qwen(skipped, speed_up):
    whole, some = (weight_bytes_per_token(QWEN, Route.skipping(range(n), 24))["total"] for n in (0, skipped))
    assert whole / some == pytest.approx(speed_up, abs=0.005)


def test_parameter_counts_of_the_paper_from_a_config_alone():
    assert parameter_counts(QWEN, AdapterConfig()) == {
        "routers": 21_528,
        "lora": 1_081_344,
        "bypasses": 0,
        "total": 1_102_872,
        "backbone": 494_032_768,
    }


def test_a_bypass_costs_its_two_matrices_for_each_token_that_skips_the_block():
    model, route, rank = tiny("llama").config, [True, False, False, True], 5
    weights = 2 * rank * model.hidden_size
    for scope, tokens in (("step", 7 + 3), ("response", 3), ("continuation", 2)):
        plain, bypassed = (step_flops(model, 7, 3, route, scope, bypass=size)["total"] for size in (0, rank))
        assert bypassed - plain == 2 * 2 * weights * tokens
    bytes_read = [weight_bytes_per_token(model, route, bypass=size)["total"] for size in (0, rank)]
    assert bytes_read[1] - bytes_read[0] == 2 * 2 * weights
    adapter = AdapterConfig(bypass=BypassConfig(rank=rank))
    assert parameter_counts(model, adapter)["bypasses"] == model.num_hidden_layers * weights
    assert parameter_counts(model, adapter, 3)["bypasses"] == 3 * weights


def test_routers_that_always_run_are_counted_too():
    adapter = AdapterConfig(router=RouterConfig(always_run=(0,)), lora=LoraConfig(rank=0))
    counts = parameter_counts(tiny("llama").config, adapter)
    assert (counts["routers"], counts["lora"]) == (4 * 33, 0)
