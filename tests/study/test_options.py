"""What a study's file means, and what it may not say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from layerroute.errors import ConfigError
from layerroute.study.options import read_study

ROOT = Path(__file__).parents[2]


def test_runs_are_variants_times_seeds_each_in_its_own_folder(declared, save):
    declared["variants"]["budget"] = {"seeds": [7]}
    study = read_study(save(declared))
    assert [run.name for run in study.runs] == ["open/0", "open/1", "budget/7"]
    assert len({run.folder for run in study.runs}) == 3
    assert [run.train.seed for run in study.runs] == [0, 1, 7]
    assert {run.train.objective for run in study.runs[:2]} == {"open"}
    assert study.runs[0].evaluate.controls == ()
    assert study.runs[2].evaluate.controls == ("two_masks",)


def test_a_variants_own_preset_lies_over_the_base_and_the_studys_under_it(declared, save):
    declared["train"]["lora_rate"] = 0.5
    declared["variants"]["paper"] = {"preset": "paper", "train": {"steps": 3}}
    by_name = {run.name: run.train for run in read_study(save(declared)).runs}
    assert by_name["budget/0"].lora_rate == 0.5
    assert by_name["paper/0"].lora_rate == 2e-4
    assert by_name["paper/0"].steps == 3
    assert by_name["paper/0"].max_length == 700


def test_a_runs_options_are_its_own_and_do_not_name_the_place(declared, save):
    runs = read_study(save(declared)).runs
    moved = read_study(save(declared), output="~/elsewhere").runs
    assert [run.options for run in runs] == [run.options for run in moved]
    assert moved[0].folder == Path.home() / "elsewhere" / moved[0].name.replace("/", "/seed-")
    assert len({json.dumps(run.options) for run in runs}) == len(runs)
    other = replace(runs[0], evaluate=replace(runs[0].evaluate, bootstrap=21))
    assert other.options != runs[0].options


def test_data_given_replaces_both_sections(declared, save):
    for run in read_study(save(declared), data="a.jsonl,b.jsonl").runs:
        assert run.train.data == run.evaluate.data == ("a.jsonl", "b.jsonl")


def test_only_chooses_by_variant_and_by_run(declared, save):
    study = read_study(save(declared))
    assert [run.name for run in study.only(["open", "budget/1"])] == ["open/0", "open/1", "budget/1"]
    assert study.only([]) == study.runs
    with pytest.raises(ConfigError, match="Did you mean 'budget"):
        study.only(["budgte"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sedes": [0]}, "Did you mean 'seeds'"),
        ({"seeds": [1, 1]}, "each seed once"),
        ({"variants": {}}, "none is declared"),
        ({"variants": {"a": {"trian": {}}}}, "Did you mean 'train'"),
        ({"variants": {"a": {"train": {"stpes": 3}}}}, "variants.a: .*Did you mean 'steps'"),
        ({"variants": {"a": {"preset": "papre"}}}, "Did you mean 'paper'"),
        ({"variants": {"a": {"train": {"seed": 3}}}}, "train.seed"),
        ({"variants": {"a/b": {}}}, "a folder"),
        ({"variants": {"..": {}}}, "a folder"),
        ({"variants": {"a": 3}}, "expected a mapping"),
        ({"reference": "opne"}, "Did you mean 'open'"),
    ],
)
def test_what_a_study_may_not_say_is_named_with_its_file(declared, save, change, says):
    if "variants" in change:
        declared["reference"] = None
    with pytest.raises(ConfigError, match=f"study.yaml: .*{says}"):
        read_study(save(declared | change))


def test_the_example_is_ten_seeds_six_ways_a_frontier_single_choices_and_longer_training():
    runs = read_study(ROOT / "examples" / "study.yaml").runs
    assert len(runs) == 6 * 10 + 8 * 3 + 7 * 3 + 2 * 3
    alike = [run.train for run in runs if not run.variant.startswith("longer")]
    # Where LoRA rests, only what comes before counts: with every gate open the model is LoRA-only's for good.
    updates = [train.turning_points[0] if train.bypasses_heal_alone else train.steps for train in alike]
    seen = {n * train.batch_size * train.accumulation for n, train in zip(updates, alike, strict=True)}
    assert len(seen) == 1


def test_variants_may_be_named_by_numbers(declared, save):
    declared["variants"] = {8: {}, 9: {}}
    declared["reference"] = "8"
    assert {run.variant for run in read_study(save(declared)).runs} == {"8", "9"}
    declared["reference"] = "7"
    with pytest.raises(ConfigError, match="no variant"):
        read_study(save(declared))
