"""A study goes on where it stopped, does nothing twice, and refuses to mix options."""

import json
from copy import deepcopy
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from layerroute.cli.studying import plan
from layerroute.config import KINDS
from layerroute.errors import ConfigError, LayerRouteError
from layerroute.study import running
from layerroute.study.options import read_study
from layerroute.study.rows import MARK, ROW, read_row, take_over
from layerroute.study.running import run_study, state_of
from layerroute.training.run import train


def adapter(run):
    parts = [load_file(run.folder / "adapter" / f"{name}.safetensors") for name in ("routers", "adapter_model")]
    return {name: tensor for part in parts for name, tensor in part.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    """Stands for a killed process."""


@pytest.fixture
def killing(monkeypatch):
    """Kill training after an update."""
    from layerroute.training.trainer import RouteTrainer

    original = RouteTrainer._maybe_log_save_evaluate

    def arm(update):
        def wrapped(self, *args, **kwargs):
            original(self, *args, **kwargs)
            if self.state.global_step == update:
                raise Killed

        monkeypatch.setattr(RouteTrainer, "_maybe_log_save_evaluate", wrapped)

    def disarm():
        monkeypatch.setattr(RouteTrainer, "_maybe_log_save_evaluate", original)

    return arm, disarm


def test_a_study_leaves_runs_rows_and_results_and_does_nothing_twice(declared, save, monkeypatch, tmp_path):
    study = read_study(save(declared))
    assert run_study(study)
    for run in study.runs:
        assert {"adapter", "report.html", "report.json", "row.json", "config.yaml"} <= {
            path.name for path in run.folder.iterdir()
        }
    document = json.loads((study.folder / "results.json").read_text())
    assert [(row["variant"], row["seed"]) for row in document["rows"]] == [
        ("open", 0), ("open", 1), ("budget", 0), ("budget", 1),
    ]  # fmt: skip
    for run, row in zip(study.runs, document["rows"], strict=True):
        assert row["options"] == run.options
        assert row["data"]["train"]["hash"]
        assert row["data"]["evaluate"]["hash"]
        assert row["machine"]["processor"]
        assert row["version"]
        assert row["seconds"]["train"] > 0
        report = json.loads((run.folder / "report.json").read_text())
        gap = report["differential"]
        assert row["figures"]["differential"] == gap["points"]
        assert row["intervals"]["differential"] == [gap["low"], gap["high"]]
    assert len(list(study.folder.glob("backbone-*.safetensors"))) == 1  # the same for all
    figures = document["aggregates"]["open"]["figures"]
    assert figures["skip.tool_call"]["mean"] == 0.0
    assert figures["ratio.tool_call"]["mean"] == 0.0
    text = (study.folder / "results.md").read_text()
    assert "`budget`" in text
    (header,) = [line for line in text.splitlines() if line.startswith("| variant | seeds")]
    assert len(set(header.split(" | "))) == len(header.split(" | "))  # no two columns share a name
    for row in document["rows"]:  # a run that skips nothing has no line of its own
        skips = any(row["figures"][f"skip.{kind}"] for kind in KINDS)
        assert (f"| `{row['variant']}` | {row['seed']} |" in text) == skips
    assert "two masks, kind known" in text
    assert [(gain["variant"], list(gain["seeds"])) for gain in document["gains"]] == [
        ("budget", [0]), ("budget", [1]), ("budget", [0, 1]),
    ]  # fmt: skip
    assert "paired by question" in text
    with_tools = document["aggregates"]["budget"]["figures"]["skip.planning_with_tools"]
    assert with_tools["count"] > 0
    assert "Planning with tools on offer" in text
    for name in ("frontier.svg", "differential.svg"):
        assert ElementTree.parse(study.folder / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"

    alone = replace(study.runs[1].train, output=str(tmp_path / "alone"))
    train(alone, say=lambda _: None)
    assert same(adapter(study.runs[1]), adapter(replace(study.runs[1], train=alone)))

    monkeypatch.setattr(running, "train", None)
    monkeypatch.setattr(running, "evaluate_adapter", None)
    older = {key: value for key, value in document["rows"][0].items() if key != "intervals"}
    (study.runs[0].folder / "row.json").write_text(json.dumps(older))
    assert run_study(study)


def test_rows_of_another_machine_are_taken_over_where_the_options_are_the_same(
    declared, save, tmp_path, capsys, monkeypatch
):
    declared["train"]["adapter"]["bypass"]["rank"] = 0
    path = save(declared)
    study = read_study(path)
    rows = [
        {"variant": run.variant, "seed": run.seed, "options": deepcopy(run.options), "from": "elsewhere"}
        for run in study.runs
    ]
    rows[1]["options"]["train"]["settle"]["tolerance"] = 0.5
    rows[1]["options"]["train"]["gone"] = 1  # an option that is no more makes the row no one's, and nothing worse
    del rows[2]["options"]["train"]["adapter"]["bypass"]  # as a version without that option wrote it
    results = tmp_path / "theirs.json"
    results.write_text(json.dumps({"rows": rows}))
    plan(path, output=None, data=None, only=(), known=results, as_json=True)
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["known", "new", "known", "known"]
    assert not study.folder.exists()
    assert take_over(results, study.runs) == 3
    assert [state_of(run) for run in study.runs] == ["finished", "new", "finished", "finished"]
    assert read_row(study.runs[2]) == rows[2]
    for section, key in (("train", "steps"), ("evaluate", "bootstrap")):
        changed = deepcopy(declared)
        changed[section][key] += 1
        with pytest.raises(ConfigError, match=key):
            run_study(read_study(save(changed)))
    study = read_study(save(declared))
    assert take_over(results, study.runs) == 0
    begun = deepcopy(rows[0]["options"])
    begun["train"]["gone"] = 1
    (study.runs[1].folder).mkdir(parents=True)
    (study.runs[1].folder / MARK).write_text(json.dumps({"options": begun}))
    with pytest.raises(ConfigError, match=rf"{study.runs[1].folder} was begun by another version.*gone"):
        run_study(study)
    (study.runs[1].folder / MARK).unlink()
    (study.runs[0].folder / ROW).rename(study.runs[0].folder / MARK)
    monkeypatch.setattr("layerroute.study.rows.newest_checkpoint", lambda folder: folder)
    assert take_over(results, study.runs) == 0  # trained in part here: finished here
    (study.runs[0].folder / MARK).rename(study.runs[0].folder / ROW)
    for text in ("[]", "{", '{"rows": [1]}', '{"rows": [{"variant": "budget", "seed": 0}]}'):
        results.write_text(text)
        with pytest.raises(LayerRouteError, match="theirs"):
            take_over(results, study.runs)


def test_a_killed_run_resumes_from_its_checkpoint_and_ends_as_if_never_killed(declared, save, killing, tmp_path):
    arm, disarm = killing
    path = save(declared)
    study, straight = read_study(path), read_study(path, output=str(tmp_path / "straight"))
    assert run_study(straight, ["budget/0"])
    arm(3)
    with pytest.raises(Killed):
        run_study(study, ["budget/0"])
    disarm()
    run = study.only(["budget/0"])[0]
    assert state_of(run) == "begun"
    said = []
    assert run_study(study, ["budget/0"], say=said.append)
    assert any("begun" in line for line in said)
    assert same(adapter(run), adapter(straight.only(["budget/0"])[0]))
    assert read_row(run)["figures"] == read_row(straight.only(["budget/0"])[0])["figures"]


def test_a_run_killed_while_measured_is_not_trained_again(declared, save, monkeypatch):
    study = read_study(save(declared))

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(running, "evaluate_adapter", killed)
        with pytest.raises(Killed):
            run_study(study, ["open/0"])
    assert state_of(study.runs[0]) == "trained"
    monkeypatch.setattr(running, "train", None)
    assert run_study(study, ["open/0"])
    assert state_of(study.runs[0]) == "finished"
    assert read_row(study.runs[0])["seconds"]["train"] > 0


def test_a_stopped_run_is_saved_and_ends_the_study(declared, save, monkeypatch):
    from layerroute.training.run import Interruption

    study = read_study(save(declared))
    ask = Interruption.on_step_end

    def interrupt(self, args, state, control, **options):
        self.asked = state.global_step == 1
        ask(self, args, state, control, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "on_step_end", interrupt)
        assert not run_study(study)
    assert [state_of(run) for run in study.runs] == ["begun", "new", "new", "new"]
    assert not (study.folder / "results.json").exists()


def test_other_options_are_refused_before_anything_runs(declared, save, monkeypatch):
    study = read_study(save(declared))
    assert run_study(study, ["open/0"])
    monkeypatch.setattr(running, "train", None)
    declared["train"]["steps"] = 5
    with pytest.raises(ConfigError, match=r"open/0: .*steps: 4 then, 5 now.*remove that folder"):
        run_study(read_study(save(declared)), ["budget/0"])
    declared["train"]["steps"] = 4
    declared["evaluate"]["bootstrap"] = 30
    study = read_study(save(declared))
    with pytest.raises(ConfigError, match=r"bootstrap: 20 then, 30 now.*row.json"):
        run_study(study, ["open/0"])
    (study.runs[0].folder / "row.json").unlink()
    assert run_study(study, ["open/0"])
    assert read_row(study.runs[0])["options"]["evaluate"]["bootstrap"] == 30
    assert run_study(study, ["open/0"])


def test_a_folder_that_no_study_began_is_refused(declared, save):
    study = read_study(save(declared))
    train(study.runs[0].train, say=lambda _: None)
    with pytest.raises(ConfigError, match="no study began"):
        run_study(study)


def test_a_run_that_another_process_holds_is_passed_over(declared, save, monkeypatch):
    study = read_study(save(declared))
    monkeypatch.setattr(running, "train", None)
    said = []
    with running._held(study.runs[0].folder):
        assert run_study(study, ["open/0"], say=said.append)
    assert any("another process" in line for line in said)
    assert state_of(study.runs[0]) == "new"


def test_a_folder_that_cannot_be_held_is_named_with_a_remedy(declared, save, monkeypatch):
    study = read_study(save(declared))

    def lockless(*_):
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(running.fcntl, "flock", lockless)
        with pytest.raises(LayerRouteError, match=r"knows no locks \(No locks available\).*on another one"):
            run_study(study, ["open/0"])
    in_the_way = study.runs[0].folder.parent
    in_the_way.rename(in_the_way.with_name("moved"))
    in_the_way.write_text("no folder")
    with pytest.raises(LayerRouteError, match=r"can't be written \(Not a directory\)\. Give another --output"):
        run_study(study, [study.runs[0].name])
