"""The embedded real backbone, end to end: attach, route, generate."""

import pytest
import torch

from layerroute.data.conversation import Conversation, Message
from layerroute.data.generator import generate
from layerroute.data.steps import cut_steps, prompt_ids
from layerroute.inference.loading import engine_of, load_engine
from layerroute.inference.requests import Request
from layerroute.models.adapter import read_manifest
from layerroute.models.attaching import attach
from layerroute.models.finding import shipped
from layerroute.models.loading import load_backbone
from layerroute.routing.route import Route

pytestmark = pytest.mark.real
CONVERT = {
    "type": "function",
    "function": {
        "name": "convert_currency",
        "description": "Convert an amount from one currency to another",
        "parameters": {
            "type": "object",
            "properties": {"amount": {"type": "number"}, "from": {"type": "string"}, "to": {"type": "string"}},
            "required": ["amount", "from", "to"],
        },
    },
}


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


@pytest.mark.parametrize("name", shipped())
def test_what_comes_with_the_package_was_measured_to_skip_tool_calls_alone(name):
    measured = read_manifest(name).measured
    assert {kind: row["skip_rate"] > 0.05 for kind, row in measured["kinds"].items()} == {
        "tool_call": True,
        "planning": False,
    }


@pytest.mark.parametrize("name", [name for name in shipped() if read_manifest(name).base == "smollm2"])
def test_what_comes_with_the_package_loads_and_tells_the_kinds_apart(name):
    """Its fingerprint fits the backbone; a request that an offered tool answers skips blocks, arithmetic none.

    Two tokens, as the first may be what decides.
    """
    engine, backbone = load_engine(name)
    routes = []
    for text, tools in (("I need to convert 500 US dollars to euros.", (CONVERT,)), ("What is 17 times 23?", ())):
        prompt = prompt_ids(Conversation("asked", (Message("user", text),), tools), backbone.tokenizer)
        routes.append(engine.generate([Request(prompt_ids=prompt, max_new_tokens=2)])[0].route)
    assert not all(routes[0])
    assert all(routes[1])
