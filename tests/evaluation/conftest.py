"""A tiny routed model whose routers disagree, and steps whose kind can be read from their tokens."""

import random

import pytest
import torch
from tiny import tiny, tiny_tokenizer

from layerroute.config import KINDS, AdapterConfig
from layerroute.data.steps import Step
from layerroute.models.attaching import attach
from layerroute.models.loading import Backbone

BLOCKS = 4


def make_steps(count=24, seed=0):
    """Two steps a conversation; tool calls use tokens below 50, planning those above."""
    draw = random.Random(seed)
    steps = []
    for index in range(count):
        kind = KINDS[index % 2]
        low, high = {"tool_call": (3, 50), "planning": (50, 97)}[kind]
        context, response = draw.randint(6, 30), draw.randint(1, 6)
        ids = tuple(draw.randrange(low, high) for _ in range(context + response))
        steps.append(Step(ids, context, kind, f"c{index // 2}", "made-up", True))
    return steps


def make_routed(config=None, seed=0):
    """Routers with random weights: gates differ from step to step and from block to block."""
    routed = attach(tiny("llama"), config or AdapterConfig()).eval()
    torch.manual_seed(seed)
    for router in routed.routers:
        torch.nn.init.normal_(router.score.weight, std=0.5)
        torch.nn.init.zeros_(router.score.bias)
    return routed


def train_lora(routed):
    """Give LoRA weights that matter."""
    torch.manual_seed(1)
    for name, parameter in routed.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return routed


@pytest.fixture
def routed():
    return make_routed()


@pytest.fixture
def steps():
    return make_steps()


@pytest.fixture
def backbone(routed):
    return Backbone("tiny", routed.base, tiny_tokenizer())


@pytest.fixture
def makers():
    """The functions above, for tests that need other sizes."""
    return {"steps": make_steps, "routed": make_routed, "train": train_lora}
