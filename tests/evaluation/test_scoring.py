"""Scores: each step under its own route, in order, and nothing but likelihood in them."""

import pytest
import torch

from layerroute.config import AdapterConfig, RouterConfig
from layerroute.evaluation import scoring
from layerroute.evaluation.metrics import perplexity
from layerroute.evaluation.scoring import draw_by_kind, score, score_gates


def test_gates_open_and_lora_at_zero_is_the_backbone(routed, steps):
    base = score(routed, steps, mode="base")
    opened = score(routed, steps, mode="open")
    assert torch.equal(base.nll, opened.nll)
    assert base.gates.all()
    assert opened.gates.all()


def test_the_backbone_is_scored_without_lora(routed, steps, makers):
    before = score(routed, steps, mode="base")
    makers["train"](routed)
    assert torch.equal(score(routed, steps, mode="base").nll, before.nll)
    assert not torch.allclose(score(routed, steps, mode="open").nll, before.nll, rtol=1e-2)


@pytest.mark.parametrize("mode", ["base", "open", "routed"])
def test_a_step_scores_as_it_does_alone_and_in_its_place(routed, steps, makers, mode):
    makers["train"](routed)
    together = score(routed, steps, mode=mode, batch_tokens=120)
    for index, step in enumerate(steps):
        alone = score(routed, [step], mode=mode)
        torch.testing.assert_close(together.nll[index], alone.nll[0], rtol=1e-4, atol=1e-4)
        assert together.tokens[index] == step.response_length
        assert torch.equal(together.gates[index], alone.gates[0])
        torch.testing.assert_close(together.logits[index], alone.logits[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def own(routed, steps, makers):
    """Scores of steps some of which run every block, and some don't."""
    makers["train"](routed)
    tried = (score(routed, steps, mode="routed", offset=offset / 4) for offset in range(40))
    return next(scores for scores in tried if 3 < scores.gates.all(dim=1).sum() < len(steps))


@pytest.fixture
def asked(monkeypatch):
    """How many steps each call of `score` was given."""
    counts = []
    monkeypatch.setattr(scoring, "score", lambda r, some, *a, **k: counts.append(len(some)) or score(r, some, *a, **k))
    return counts


def test_open_gates_are_run_only_where_a_router_closed_one(routed, steps, own, asked):
    everything = torch.ones_like(own.gates)
    opened, again = score_gates(routed, steps, everything, [own]), score(routed, steps, mode="open")
    assert asked == [int((~own.gates.all(dim=1)).sum())]
    torch.testing.assert_close(opened.nll, again.nll, rtol=1e-4, atol=1e-4)
    assert torch.equal(opened.tokens, again.tokens)
    assert opened.gates.all()
    assert opened.logits.shape == again.logits.shape


def test_a_step_is_run_again_only_under_gates_that_no_known_scores_have(routed, steps, own, asked):
    opened = score(routed, steps, mode="open")
    gates = own.gates.clone()
    gates[::3], gates[1::3] = True, torch.tensor([True, False, False, True])
    found = score_gates(routed, steps, gates, [own, opened])
    assert asked == [int(((gates != own.gates).any(dim=1) & ~gates.all(dim=1)).sum())]
    assert 0 < asked[0] < len(steps) / 2
    torch.testing.assert_close(found.nll, score(routed, steps, mode="forced", gates=gates).nll, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.gates, gates)
    assert score_gates(routed, steps, own.gates, [own]).nll.equal(own.nll)  # nothing is left to run


def test_routes_differ_between_steps(routed, steps):
    own = score(routed, steps, mode="routed")
    assert len(own.gates.unique(dim=0)) > 2
    torch.testing.assert_close(own.skipped, (~own.gates).sum(dim=1).double() / 4)


def test_perplexity_is_the_likelihood_of_the_response_and_nothing_else(routed, steps, makers):
    makers["train"](routed)
    own = score(routed, steps, mode="routed")
    total, count = 0.0, 0
    for step in steps:
        ids = torch.tensor([step.input_ids])
        context = torch.arange(ids.shape[1])[None] < step.context_length
        with torch.no_grad():
            logits, _ = routed.token_logits(ids, context)
        for place in range(step.context_length, ids.shape[1]):
            total -= float(torch.log_softmax(logits[0, place - 1].double(), dim=0)[ids[0, place]])
            count += 1
    assert perplexity(own.nll, own.tokens) == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def test_forced_gates_are_the_ones_that_run(routed, steps):
    own = score(routed, steps, mode="routed")
    again = score(routed, steps, mode="forced", gates=own.gates)
    torch.testing.assert_close(again.nll, own.nll)
    assert torch.equal(again.gates, own.gates)
    assert again.logits.shape == (len(steps), 0)


def test_gates_and_mode_must_agree(routed, steps):
    with pytest.raises(ValueError, match="forced"):
        score(routed, steps, mode="forced")
    with pytest.raises(ValueError, match="forced"):
        score(routed, steps, mode="open", gates=torch.ones(len(steps), 4, dtype=torch.bool))


def test_the_offset_moves_the_gates_and_the_ends_are_all_and_nothing(routed, steps):
    rates = [float(score(routed, steps, mode="routed", offset=o).skipped.mean()) for o in (-1e4, -0.5, 0.0, 0.5, 1e4)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (1.0, 0.0)
    assert len(set(rates)) >= 4


def test_blocks_that_always_run_stay_open_at_any_offset(steps, makers):
    routed = makers["routed"](AdapterConfig(router=RouterConfig(always_run=(2,))))
    own = score(routed, steps, mode="routed", offset=-1e4)
    assert own.gates.float().mean(dim=0).tolist() == [0, 0, 1, 0]


def test_progress_is_told_up_to_the_last_step(routed, steps):
    lines = []
    score(routed, steps, mode="open", batch_tokens=60, progress=lines.append)
    assert lines[-1] == f"open: {len(steps)} of {len(steps)} steps"
    assert 2 <= len(lines) <= 10


def test_a_model_in_training_mode_is_scored_in_eval_mode(routed, steps):
    routed.train()
    own = score(routed, steps, mode="open")
    assert not routed.training
    assert torch.equal(own.nll, score(routed, steps, mode="open").nll)


def test_drawing_takes_as_many_of_each_kind(steps):
    chosen = draw_by_kind(steps, 5, seed=3)
    kinds = [steps[index].kind for index in chosen]
    assert (kinds.count("tool_call"), kinds.count("planning")) == (5, 5)
    assert chosen == sorted(set(chosen)) == draw_by_kind(steps, 5, seed=3)
    assert chosen != draw_by_kind(steps, 5, seed=4)
    assert len(draw_by_kind(steps, 100, seed=3)) == len(steps)
