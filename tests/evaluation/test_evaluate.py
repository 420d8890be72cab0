"""The document: stable keys, no NaN, and figures that agree with each other."""

import json
from dataclasses import replace

import pytest
import torch
from evaluation.conftest import make_routed

from layerroute.config import AdapterConfig, BypassConfig, RouterConfig, build
from layerroute.errors import ConfigError, DataError, LayerRouteError
from layerroute.evaluation.controls import kind_index
from layerroute.evaluation.evaluate import evaluate
from layerroute.evaluation.flops import step_flops, weight_bytes_per_token
from layerroute.evaluation.options import EvaluationConfig
from layerroute.evaluation.scoring import score
from layerroute.models.loading import Backbone
from layerroute.routing.route import Route

OPTIONS = EvaluationConfig(bootstrap=100, curve_steps=8, curve_offsets=(-1e4, 0.0, 1e4), controls=("random",))


@pytest.fixture
def routed(routed, makers):
    """LoRA that matters, so that backbone, gates open and routed are three different things."""
    return makers["train"](routed)


@pytest.fixture
def document(routed, backbone, steps):
    return evaluate(routed, backbone, steps, OPTIONS, adapter="mine")


def test_the_backbones_own_scores_are_kept_for_the_next_adapter(routed, backbone, steps, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(
        "layerroute.evaluation.backbone.score", lambda *args, **how: modes.append(how["mode"]) or score(*args, **how)
    )
    plain = evaluate(routed, backbone, steps, OPTIONS)
    first, second = (evaluate(routed, backbone, steps, OPTIONS, folder=tmp_path) for _ in range(2))
    assert modes == ["base", "base"]
    for document in (plain, first, second):
        del document["seconds"]
    assert plain == first == second
    evaluate(routed, backbone, steps[:-1], OPTIONS, folder=tmp_path)
    evaluate(routed, backbone, steps[::-1], OPTIONS, folder=tmp_path)
    assert len(modes) == len(list(tmp_path.iterdir())) + 1 == 4
    for path in tmp_path.iterdir():
        path.write_bytes(b"half")
    with pytest.raises(LayerRouteError, match="Remove it, and it is measured again"):
        evaluate(routed, backbone, steps, OPTIONS, folder=tmp_path)


def test_the_keys_that_scripts_rely_on(document):
    assert list(document) == [
        "format",
        "model",
        "adapter",
        "router",
        "data",
        "kinds",
        "planning_with_tools",
        "differential",
        "length_matched",
        "curve",
        "gates",
        "controls",
        "seconds",
        "machine",
        "options",
    ]
    assert set(document["data"]) == {"sources", "split", "steps", "conversations", "hash"}
    for row in document["kinds"].values():
        assert set(row) == {
            "steps",
            "tokens",
            "skip_rate",
            "perplexity",
            "routed_vs_open",
            "flops_share_skipped",
            "weight_bytes_share_skipped",
            "run_rate",
        }
        assert set(row["perplexity"]) == {"base", "open", "routed"}
        assert set(row["routed_vs_open"]) == {"relative", "low", "high"}
    assert set(document["differential"]) == {"points", "low", "high"}
    assert set(document["length_matched"]) == {"points", "low", "high", "steps", "tools_offered"}
    assert set(document["machine"]) == {"cpu", "gpu", "threads", "torch", "python"}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_figures_agree_with_each_other(document, steps):
    rows = document["kinds"]
    for kind, row in rows.items():
        assert row["steps"] == document["data"]["steps"][kind] == sum(step.kind == kind for step in steps)
        assert row["tokens"] == sum(step.response_length for step in steps if step.kind == kind)
        assert row["skip_rate"] == pytest.approx(1 - sum(row["run_rate"]) / 4)
        quality = row["perplexity"]
        assert len(set(quality.values())) == 3
        assert row["routed_vs_open"]["relative"] == pytest.approx(quality["routed"] / quality["open"] - 1)
        assert sum(document["gates"]["counts"][kind]) == 4 * row["steps"]
        assert 0 < row["flops_share_skipped"] < row["skip_rate"]
        assert row["weight_bytes_share_skipped"] > 0
    gap = 100 * (rows["tool_call"]["skip_rate"] - rows["planning"]["skip_rate"])
    assert document["differential"]["points"] == pytest.approx(gap)
    assert document["data"]["conversations"] == 12


def test_planning_with_tools_on_offer_is_judged_by_itself(routed, backbone, steps):
    """As an evaluation of those steps and the tool calls alone judges planning."""
    marked = [replace(step, tools_offered=index % 4 < 2) for index, step in enumerate(steps)]
    row = evaluate(routed, backbone, marked, OPTIONS)["planning_with_tools"]
    kept = [step for step in marked if step.kind == "planning" and step.tools_offered]
    alone = evaluate(routed, backbone, kept, OPTIONS)["kinds"]["planning"]
    assert 0 < row["steps"] == len(kept) < sum(step.kind == "planning" for step in steps)
    assert row["skip_rate"] == pytest.approx(alone["skip_rate"])
    assert row["perplexity"] == pytest.approx(alone["perplexity"])
    # A difference of nearly equal sums, in batches of other sizes: the rounding of either shows.
    assert row["routed_vs_open"]["relative"] == pytest.approx(alone["routed_vs_open"]["relative"], abs=1e-5)
    bare = [replace(step, tools_offered=step.kind == "tool_call") for step in steps]
    none = evaluate(routed, backbone, bare, OPTIONS)["planning_with_tools"]
    assert (none["steps"], none["skip_rate"], none["routed_vs_open"]["relative"]) == (0, None, None)


def test_the_share_of_flops_is_that_of_the_steps_sums(document, routed, steps):
    own = score(routed, steps, mode="routed")
    spent, whole = 0.0, 0.0
    for index, step in enumerate(steps):
        if step.kind == "planning":
            size = (step.context_length, step.response_length)
            spent += step_flops(routed.base.config, *size, own.gates[index].tolist())["total"]
            whole += step_flops(routed.base.config, *size, [True] * 4)["total"]
    assert document["kinds"]["planning"]["flops_share_skipped"] == pytest.approx(1 - spent / whole)


@pytest.mark.parametrize("scope", ["response", "continuation"])
def test_narrower_scopes_save_less(document, steps, makers, backbone, scope):
    routed = makers["routed"](AdapterConfig(router=RouterConfig(scope=scope)))
    other = evaluate(routed, Backbone("tiny", routed.base, backbone.tokenizer), steps, OPTIONS)
    for kind, row in other["kinds"].items():
        assert row["skip_rate"] > 0
        assert row["flops_share_skipped"] < document["kinds"][kind]["flops_share_skipped"]


def test_under_scope_continuation_the_first_token_reads_every_weight(steps, makers, backbone):
    routed = makers["routed"](AdapterConfig(router=RouterConfig(scope="continuation")))
    closed = Route.skipping([1, 2], len(routed.blocks))
    for block, router in enumerate(routed.routers):
        router.reset(bias=1.0 if closed.gates[block] else -1.0)
    found = evaluate(routed, Backbone("tiny", routed.base, backbone.tokenizer), steps, OPTIONS)
    config, everything = routed.base.config, Route.open(len(routed.blocks))
    read, readable = (weight_bytes_per_token(config, route)["total"] for route in (closed, everything))
    for kind, row in found["kinds"].items():
        lengths = [step.response_length for step in steps if step.kind == kind]
        after_first = 1 - len(lengths) / sum(lengths)
        assert row["weight_bytes_share_skipped"] == pytest.approx((1 - read / readable) * after_first)


def test_the_curve_runs_from_nothing_to_everything(document):
    for kind in ("tool_call", "planning"):
        rates = [point["kinds"][kind]["skip_rate"] for point in document["curve"]]
        assert (rates[0], rates[-1]) == (1.0, 0.0)
        assert rates == sorted(rates, reverse=True)
        assert document["curve"][-1]["kinds"][kind]["relative"] == pytest.approx(0.0, abs=1e-5)
        assert document["curve"][0]["kinds"][kind]["relative"] != pytest.approx(0.0, abs=1e-5)


def test_at_offset_zero_the_curve_is_the_measurement(routed, backbone, steps):
    whole = EvaluationConfig(bootstrap=10, curve_steps=2 * len(steps), curve_offsets=(0.0, 1e-9))
    document = evaluate(routed, backbone, steps, whole)
    here, beside = (point["kinds"] for point in document["curve"])
    for kind, row in document["kinds"].items():
        assert here[kind]["skip_rate"] == row["skip_rate"]
        assert here[kind]["relative"] == pytest.approx(row["routed_vs_open"]["relative"])
        assert beside[kind] == pytest.approx(here[kind], rel=1e-5)


def test_gates_are_counted_by_run_probability(document, routed, steps):
    logits = score(routed, steps, mode="routed").logits
    counts = document["gates"]["counts"]
    assert sum(counts["tool_call"][10:]) + sum(counts["planning"][10:]) == int((logits >= 0).sum())
    assert len(document["gates"]["edges"]) == len(counts["planning"]) + 1


@pytest.mark.parametrize(("asked", "used"), [(0, 2048), (300, 300)])
def test_batches_suit_the_device_unless_their_size_is_given(routed, backbone, steps, asked, used, monkeypatch):
    from layerroute.evaluation import evaluate as module

    sizes, original = set(), module.score

    def recording(*args, batch_tokens, **kwargs):
        sizes.add(batch_tokens)
        return original(*args, batch_tokens=batch_tokens, **kwargs)

    monkeypatch.setattr(module, "score", recording)
    document = evaluate(routed, backbone, steps, replace(OPTIONS, batch_tokens=asked))
    assert sizes == {used}
    assert document["options"]["batch_tokens"] == used


def test_one_kind_alone_gives_none_and_no_nan(routed, backbone, steps):
    planning = [step for step in steps if step.kind == "planning"]
    document = evaluate(routed, backbone, planning, OPTIONS)
    json.dumps(document, allow_nan=False)
    empty = document["kinds"]["tool_call"]
    assert (empty["steps"], empty["skip_rate"], empty["perplexity"]["routed"]) == (0, None, None)
    assert (empty["flops_share_skipped"], empty["run_rate"]) == (None, [None] * 4)
    assert document["differential"] == {"points": None, "low": None, "high": None}
    assert document["length_matched"] is None


def test_an_infinite_loss_is_none(routed, backbone, steps):
    with torch.no_grad():
        routed.base.lm_head.weight.mul_(1e6)
    document = evaluate(routed, backbone, steps, OPTIONS)
    json.dumps(document, allow_nan=False)
    assert document["kinds"]["planning"]["perplexity"]["base"] is None


def test_a_loss_that_is_no_number_stays_with_its_kind(routed, backbone, steps):
    with torch.no_grad():
        routed.base.model.embed_tokens.weight[3:50] = float("nan")  # the tokens of tool calls
    rows = evaluate(routed, backbone, steps, OPTIONS)["kinds"]
    assert rows["tool_call"]["routed_vs_open"] == {"relative": None, "low": None, "high": None}
    assert None not in rows["planning"]["routed_vs_open"].values()


def test_no_steps_is_an_error(routed, backbone):
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(routed, backbone, [], OPTIONS)


def test_the_hash_names_the_steps(routed, backbone, steps):
    hashes = [evaluate(routed, backbone, some, OPTIONS)["data"]["hash"] for some in (steps, steps[::-1], steps[:-1])]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "wrong", [{"bootstrap": 0}, {"curve_steps": -1}, {"controls": "two_mask"}, {"split": "tset"}, {"data": ()}]
)
def test_bad_options_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build(EvaluationConfig, wrong)


def test_options_come_from_flags():
    options = build(EvaluationConfig, {"controls": "open,two_masks", "curve_offsets": "-1,0,0.5"})
    assert options.controls == ("open", "two_masks")
    assert options.curve_offsets == (-1.0, 0.0, 0.5)


def test_savings_count_what_bypasses_cost(backbone, steps):
    routed = make_routed(AdapterConfig(bypass=BypassConfig(rank=8)))
    row = evaluate(routed, backbone, steps, EvaluationConfig(curve_steps=0, bootstrap=2))["kinds"]["tool_call"]
    own, kinds = score(routed, steps, mode="routed"), kind_index(steps)
    mine = [n for n, kind in enumerate(kinds.tolist()) if kind == 0]
    config, opened = routed.base.config, [True] * 4
    sizes = [(steps[n].context_length, steps[n].response_length) for n in mine]
    gates = [own.gates[n].tolist() for n in mine]
    spent = sum(step_flops(config, *size, route, bypass=8)["total"] for size, route in zip(sizes, gates, strict=True))
    whole = sum(step_flops(config, *size, opened)["total"] for size in sizes)
    assert row["flops_share_skipped"] == pytest.approx(1 - spent / whole)
    read = sum(
        size[1] * weight_bytes_per_token(config, route, bypass=8)["total"]
        for size, route in zip(sizes, gates, strict=True)
    )
    readable = sum(size[1] * weight_bytes_per_token(config, opened)["total"] for size in sizes)
    assert row["weight_bytes_share_skipped"] == pytest.approx(1 - read / readable)


def test_the_curve_takes_half_its_steps_of_each_kind(routed, backbone, steps, monkeypatch):
    from layerroute.evaluation import evaluate as module

    asked = []
    monkeypatch.setattr(module, "draw_by_kind", lambda steps, count, seed: asked.append(count) or [0, 1])
    evaluate(routed, backbone, steps, EvaluationConfig(curve_steps=6, bootstrap=2))
    assert asked == [3]
