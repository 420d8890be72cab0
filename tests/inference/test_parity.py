"""The engine and the trained model are one thing: same gates, same tokens, for every family."""

from typing import get_args

import pytest
import torch
from tiny import FAMILIES, tiny

from layerroute.config import AdapterConfig, BypassConfig, RouterConfig, Scope
from layerroute.inference.loading import engine_of
from layerroute.inference.requests import Request
from layerroute.models.attaching import attach
from layerroute.routing.route import Route


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("scope", get_args(Scope))
def test_engine_follows_the_routes_and_tokens_of_the_trained_model(family, scope):
    config = AdapterConfig(router=RouterConfig(scope=scope, window=4), bypass=BypassConfig(rank=3))
    routed = attach(tiny(family), config).eval()
    generator = torch.Generator().manual_seed(5)
    for router in routed.routers:
        torch.nn.init.normal_(router.score.weight, std=4.0, generator=generator)
        torch.nn.init.normal_(router.shift, std=0.05, generator=generator)
        torch.nn.init.zeros_(router.score.bias)
    for name, parameter in routed.named_parameters():
        if "lora_B" in name or ".up." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    prompts = [torch.randint(3, 97, (size,), generator=generator).tolist() for size in (9, 6, 12, 3, 8, 5)]
    wanted = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(4):
            tokens = torch.tensor([ids])
            context = torch.arange(len(ids))[None] < len(prompt)
            # Beside scope `step` the token that is predicted from the context's last one still sees every block.
            forced = Route.open(len(routed.blocks)) if len(ids) == len(prompt) and scope == "continuation" else None
            logits, gates = routed.token_logits(tokens, context, ~context, forced)
            ids.append(int(logits[0, -1].argmax()))
        wanted.append((ids[len(prompt) :], tuple(gates[0].tolist())))
    assert len({gates for _, gates in wanted}) > 1, "the routers decide nothing: the test could not fail"
    results = engine_of(routed).generate([Request(prompt_ids=prompt, max_new_tokens=4) for prompt in prompts])
    assert [(list(result.token_ids), tuple(result.route)) for result in results] == wanted
