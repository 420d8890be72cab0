"""The embedded real backbone, end to end: attach, route, generate."""

import pytest
import torch

from layerroute.data.generator import generate
from layerroute.data.steps import cut_steps
from layerroute.inference.loading import engine_of
from layerroute.inference.requests import Request
from layerroute.models.attaching import attach
from layerroute.models.loading import load_backbone
from layerroute.routing.route import Route

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def prompts():
    backbone = load_backbone("smollm2", dtype="float32")
    steps, _ = cut_steps(generate(6), backbone.tokenizer, max_length=220)
    return [step.input_ids[: step.context_length] for step in steps[:3]]


def test_attaching_and_the_engine_change_nothing(prompts):
    """Greedy tokens of the engine, all gates open, equal those of plain transformers."""
    plain = load_backbone("smollm2", dtype="float32").model
    plain.generation_config.pad_token_id = 0
    engine = engine_of(attach(load_backbone("smollm2", dtype="float32").model))
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        wanted = plain.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        (result,) = engine.generate([Request(prompt_ids=list(prompt), max_new_tokens=12, stop_ids=frozenset({2}))])
        assert list(result.token_ids) == wanted.tolist()


def test_a_skipped_route_generates_what_full_recomputation_does(prompts):
    """Block 0 skipped too: the engine's cached tokens equal uncached passes of the routed model."""
    route = Route.skipping([0, 4, 13, 25], 30)
    routed = attach(load_backbone("smollm2", dtype="float32").model).eval()
    prompt = list(prompts[0])
    ids = list(prompt)
    for _ in range(6):
        context = torch.ones(1, len(ids), dtype=torch.bool)
        logits, _ = routed.token_logits(torch.tensor([ids]), context, forced=route)
        ids.append(int(logits[0, -1].argmax()))
    engine = engine_of(routed)
    (result,) = engine.generate([Request(prompt_ids=prompt, max_new_tokens=6, route=route.gates)])
    assert list(result.token_ids) == ids[len(prompt) :]
    assert result.route == route.gates
