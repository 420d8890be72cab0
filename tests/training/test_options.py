"""The options of a run: what is impossible is refused by name before anything is loaded."""

import pytest

from layerroute.config import build
from layerroute.errors import ConfigError
from layerroute.training.options import TrainConfig


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0} for name in ("steps", "batch_size", "accumulation", "save_every", "limit", "max_length", "clip")),
        *({name: -1} for name in ("lora_rate", "bypass_rate", "router_rate", "bias_rate", "weight_decay", "seed")),
        {"gate_weight": -1}, {"seed": 2**32}, {"tool_share": 0}, {"tool_share": 1}, {"warmup": 1}, {"data": []},
        {"settle.at": -0.1}, {"settle.at": 1}, {"settle.free": 0.3, "settle.at": 0.3}, {"settle.free": 1},
        *({f"settle.{name}": 0} for name in ("steps", "fit", "bypass", "rounds", "recognised", "margin")),
        *({f"settle.{name}": 1} for name in ("shallow", "tolerance", "crossed")),
        {"budget.tool_call": 1}, {"budget.planning": -0.1}, {"budget.quadratic": -1}, {"budget.multiplier_rate": -1},
        {"adapter.router.threshold": 0}, {"adapter.router.threshold": 1}, {"adapter.router.window": 0},
        {"adapter.lora.rank": -1}, {"adapter.lora.alpha": 0}, {"adapter.lora.dropout": 1}, {"adapter.bypass.rank": -1},
        {"settle.heal": "lora"}, {"settle.heal": "bypasses"},  # none to heal
        {"settle.heal": "bypasses", "adapter.bypass.rank": 4, "settle.at": 0},
    ],
)  # fmt: skip
def test_impossible_options_of_a_run_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).removeprefix("adapter.")):
        build(TrainConfig, wrong)


def test_a_budget_run_keeps_an_update_for_the_routers_to_decide_in():
    turning = {"settle.at": 0.3, "settle.free": 0.5}
    assert build(TrainConfig, {"steps": 3, **turning}).turning_points == (1, 2)
    with pytest.raises(ConfigError, match="no update after update 1"):
        build(TrainConfig, {"steps": 2, **turning})
    assert build(TrainConfig, {"steps": 2, "objective": "paper", **turning}).steps == 2
