"""The command, end to end on a tiny backbone: what it prints, writes and refuses."""

import io
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from tiny import save_tiny_backbone, tiny, tiny_tokenizer

from layerroute.cli import benching, exporting, generating
from layerroute.cli.app import main
from layerroute.config import AdapterConfig, RouterConfig, Scope
from layerroute.data.rendering import stop_ids
from layerroute.errors import ConfigError
from layerroute.models.adapter import save_adapter
from layerroute.models.attaching import attach
from layerroute.models.loading import load_backbone


def invoke(*arguments):
    """Run the command in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["layerroute", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            return stopped.code or 0
    return 0


@pytest.fixture
def run(capsys):
    """Run the command; return its exit code, standard output and standard error."""

    def call(*arguments):
        code = invoke(*arguments)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A tiny backbone, and an adapter trained on the built-in generator by the command itself."""
    root = tmp_path_factory.mktemp("workshop")
    arguments = ["train", "--model", save_tiny_backbone(root / "backbone"), "--data", "builtin:80", "--steps", 4]
    arguments += ["--output", root / "run", "--max-length", 1000, "--dtype", "float32"]
    code = invoke(*arguments, "--settle.steps", 2, "--settle.fit", 4, "--bypass.rank", 0)
    assert code == 0
    return root


def test_train_leaves_an_adapter_its_options_and_its_log(workshop):
    run = workshop / "run"
    assert {path.name for path in run.iterdir()} >= {
        "adapter",
        "checkpoints",
        "config.yaml",
        "train.json",
        "tensorboard",
    }
    log = json.loads((run / "train.json").read_text())
    assert log["data"]["split"] == "train"
    assert set(log["settled"]["kinds"]) == {"tool_call", "planning"}


def test_evaluate_prints_and_writes_the_same_document(workshop, run):
    report = workshop / "report.html"
    code, out, _ = run(
        "evaluate", workshop / "run" / "adapter", "--data", "builtin:80", "--max-length", 1000, "--dtype", "float32",
        "--bootstrap", 50, "--curve-steps", 4, "--json", "--report", report, "--save",
    )  # fmt: skip
    assert code == 0
    document = json.loads(out)
    assert document == json.loads(report.with_suffix(".json").read_text())
    assert {"kinds", "differential", "length_matched", "curve", "gates", "seconds"} <= document.keys()
    for row in document["kinds"].values():
        assert set(row["perplexity"]) == {"base", "open", "routed"}
        assert len(row["run_rate"]) == 4
    assert "skipped, %" in (workshop / "run" / "adapter" / "README.md").read_text()


def test_generate_streams_text_and_shows_the_route(workshop, run):
    adapter = workshop / "run" / "adapter"
    arguments = ("generate", adapter, "-p", "Hi", "--max-tokens", 5, "--precision", "fp32", "--skip", "0,2")
    code, _, err = run(*arguments)
    assert code == 0
    assert "skipped 2 of 4 blocks" in err
    code, out, _ = run(*arguments, "--json")
    document = json.loads(out)
    assert document["route"]["gates"] == [0, 1, 0, 1]
    assert document["usage"]["completion_tokens"] <= 5


def test_a_draft_changes_no_text(workshop, run):
    arguments = (
        "generate",
        workshop / "run" / "adapter",
        "-p",
        "Hi",
        "--max-tokens",
        64,
        "--precision",
        "fp32",
        "--json",
    )
    documents = [json.loads(run(*arguments, *more)[1]) for more in ((), ("--draft", 4))]
    assert documents[0]["text"] == documents[1]["text"]
    assert documents[0]["draft"]["drafted_tokens"] == 0 < documents[1]["draft"]["drafted_tokens"]


def test_a_fallback_says_how_often_every_block_ran_again(workshop, run):
    asked = ("generate", workshop / "run" / "adapter", "-p", "Hi", "--max-tokens", 8, "--skip", "1", "--fallback", 1)
    document = json.loads(run(*asked, "--json")[1])
    assert document["fallback_tokens"] == document["usage"]["completion_tokens"] - 1 > 0
    assert f"{document['fallback_tokens']} tokens run again by every block" in run(*asked)[2]


@pytest.mark.parametrize("routes", ["even", "adapter"])
def test_bench_times_every_part(workshop, run, tmp_path, routes):
    which = ("--model", workshop / "backbone") if routes == "even" else ("--adapter", workshop / "run" / "adapter")
    arguments = ("bench", *which, "--data", "builtin:60", "--context", 900, "--steps", 2, "--batches", "1,2")
    arguments += ("--repeats", 1, "--new-tokens", 3)
    drawing = tmp_path / "rates.svg"
    code, out, err = run(*arguments, "--json", "--plot", drawing)
    assert code == 0
    document = json.loads(out)
    assert {"rows", "rates", "classes", "drafts", "peers", "machine", "commit"} <= document.keys()
    assert len(document["rows"]) == 4
    assert "transformers" in document["peers"][0]
    assert drawing.read_text().startswith("<svg xmlns=")
    assert "rows: planning, 2 together" in err
    code, out, _ = run(*arguments, "--parts", "rows,rates,classes,drafts,peers")
    assert code == 0
    for title in (
        "decode",
        "skip rates, one row",
        "drafts of up to 4",
        "half of each kind",
        "all gates open, 2 together",
    ):
        assert title in out
    assert "not installed" in out


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_transformers_computes_in_what_the_engine_does(workshop, run, monkeypatch, precision, dtype):
    seen = []
    monkeypatch.setattr(benching, "available", lambda model, *files: seen.append(model.dtype) or {})
    arguments = ("--model", workshop / "backbone", "--data", "builtin:60", "--context", 900, "--steps", 1)
    code, _, _ = run("bench", *arguments, "--parts", "peers", "--precision", precision, "--batches", 1, "--repeats", 1)
    assert code == 0
    assert seen == [dtype]


def test_a_quick_bench_takes_no_data(run):
    code, _, err = run("bench", "--quick", "--data", "builtin")
    assert code == 2
    assert "leave out --data" in err


def test_inspect_counts_an_adapter_and_a_bare_configuration(workshop, run, tmp_path):
    code, out, _ = run("inspect", workshop / "run" / "adapter", "--json")
    assert code == 0
    assert json.loads(out)["parameters"]["routers"] == 4 * 33
    tiny("qwen3").config.save_pretrained(tmp_path)
    code, out, _ = run("inspect", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["model_type"] == "qwen3"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3, "layer_types": None}))
    code, _, err = run("inspect", workshop / "run" / "adapter", "--model", tmp_path)
    assert code == 1
    assert "made for 4 blocks of width 32" in err
    code, _, err = run("inspect", workshop / "run" / "adapter", "-p", "word " * 200)
    assert code == 2
    assert "positions" in err


def test_inspect_draws_a_route(workshop, run):
    code, out, _ = run("inspect", workshop / "run" / "adapter", "-p", "What is 2 + 2?", "--json")
    assert code == 0
    assert len(json.loads(out)["run_probability"]) == 4


@pytest.mark.parametrize("scope", get_args(Scope))
def test_inspect_draws_the_route_that_generate_follows(workshop, run, tmp_path, scope):
    backbone = load_backbone(str(workshop / "backbone"), dtype="float32")
    routed = attach(backbone.model, AdapterConfig(router=RouterConfig(scope=scope)))
    draw = torch.Generator().manual_seed(0)
    for router in routed.routers:
        torch.nn.init.normal_(router.score.weight, std=5.0, generator=draw)
    save_adapter(tmp_path, routed, backbone)
    drawn = json.loads(run("inspect", tmp_path, "-p", "What is 2 + 2?", "--json")[1])["gates"]
    assert 0 < sum(drawn) < len(drawn), "the routers decide nothing: the test could not fail"
    asked = ("generate", tmp_path, "-p", "What is 2 + 2?", "--max-tokens", 4, "--precision", "fp32", "--json")
    assert json.loads(run(*asked)[1])["route"]["gates"] == drawn


def test_export_bakes_a_route_in(workshop, run, tmp_path):
    from transformers import AutoModelForCausalLM

    code, _, _ = run("export", workshop / "run" / "adapter", tmp_path / "out", "--skip", "1", "--dtype", "float32")
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 3
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    code, _, err = run("export", workshop / "run" / "adapter", tmp_path / "out", "--skip", "1")
    assert code == 2
    assert "not an empty folder" in err


def test_an_export_that_cannot_be_written_leaves_nothing(workshop, run, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def full(*_):
        raise Exception("No space left on device (os error 28)")  # tokenizers has no exception of its own

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    code, _, err = run("export", workshop / "run" / "adapter", tmp_path / "out", "--dtype", "float32")
    assert code == 1
    assert "out: could not be written (No space left on device (os error 28))" in err
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_data_validates_and_names_every_bad_line(run, tmp_path):
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    path = tmp_path / "log[old].jsonl"  # which is no markup
    path.write_text(json.dumps(good) + "\nnot json\n" + json.dumps({"messages": []}) + "\n")
    code, _, err = run("data", path)
    assert code == 1
    assert "log[old].jsonl:2" in err
    assert "log[old].jsonl:3" in err
    code, out, _ = run("data", path, "--skip-bad", "--json")
    assert code == 0
    assert len(json.loads(out)["bad_rows"]) == 2
    assert "steps" not in json.loads(out)  # none were cut, which is not the same as none being there
    code, out, _ = run("data", path, "--skip-bad")
    assert code == 0
    assert "2 bad rows left out, the first: " in out
    assert "log[old].jsonl:2" in out
    assert "│ log[old]" in out


def test_data_counts_tokens_by_kind(run, workshop):
    code, out, _ = run("data", "builtin:60", "--tokenizer", workshop / "backbone", "--max-length", 900, "--json")
    assert code == 0
    document = json.loads(out)
    code, out, _ = run("data", "builtin:60", "--tokenizer", workshop / "backbone", "--max-length", 900)
    assert code == 0
    assert f"{document['cut']['kept']} of {document['cut']['turns']} turns of the assistant are steps" in out
    assert f" {document['tokens']['planning']['step']['median']} " in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("train", "--preset", "bugdet"), 2, "Did you mean 'budget'"),
        (("train", "--steps", "many"), 2, "steps: 'many'"),
        (("train", "--seed", 2**32), 2, "2**32 - 1"),
        (("evaluate", "nowhere", "--seed", -1), 2, "2**32 - 1"),
        (("train", "--router.pooling", "lats"), 2, "Did you mean 'last'"),
        (("evaluate", "nowhere"), 1, "no adapter here"),
        (("evaluate", "nowhere", "--save"), 1, "no adapter here"),
        (("evaluate", "hf:someone/adapter", "--save"), 2, "not yours to write to"),
        (("evaluate", "nowhere", "--tasks", "tool_call"), 2, "Did you mean 'tool_calls'"),
        (("evaluate", "nowhere", "--against", "x"), 2, "--tasks"),
        (("evaluate", "nowhere", "--fallback", 0.9), 2, "--fallback does nothing without --tasks"),
        (("evaluate", "nowhere", "--tasks", "gsm8k", "--fallback", 9), 2, "a probability, from 0 to 1"),
        (("generate", "nowhere", "-p", "x", "--fallback", 0.9, "--draft", 2), 2, "leave --draft or --fallback out"),
        (("generate", "nowhere", "-p", "x"), 1, "no adapter here"),
        (("generate", "nowhere", "-p", "x", "--seed", 1), 2, "give --temperature above 0"),
        (("generate", "nowhere", "-p", "\udcff"), 2, "--prompt: not UTF-8"),
        (("inspect", "nowhere"), 1, "no such model"),
        (("inspect", "nowhere", "--model", "smollm2"), 2, "leave it out"),
        (("inspect", "nowhere", "--tools", "t.json"), 2, "give --prompt"),
        (("inspect", "nowhere", "-p", "Hi", "--context", 9), 2, "leave them out"),
        (("bench", "--quick", "--plot", "x.svg"), 2, "leave out --plot"),
        (("bench", "--parts", "rows", "--plot", "x.svg"), 2, "add it to --parts"),
        (("evaluate", "nowhere", "--report", "x.json"), 2, "ends in .html"),
        (("evaluate", "nowhere", "--report", "."), 2, "is a folder"),
        (("data", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (("data", "builtin:4", "--max-length", 9), 2, "give --tokenizer"),
        (("data", "builtin:4", "--max-length", 0), 2, "or equal to 8"),
        (("evaluate", "nowhere", "--curve-offsets", "0,inf"), 2, "finite numbers"),
        (("data", "builtin:4", "--tokenizer", "nowhere"), 1, "no such model"),
        (("train", "--nonsense"), 2, "nonsense"),
        (("train", "--objective", "open", "--settle.at", 0.5), 2, "--settle.at does nothing with --objective open"),
        (("train", "--objective", "open", "--router-rate", 1), 2, "--router-rate does nothing with --objective open"),
        (("train", "--preset", "paper", "--budget.planning", 0.1), 2, "does nothing with --objective paper"),
        (("train", "--gate-weight", 7), 2, "--gate-weight does nothing with --objective budget"),
        (("study", "nowhere.yaml"), 2, "nowhere.yaml"),
        (("evaluate", "nowhere", "--task-limit", 3), 2, "--task-limit does nothing without --tasks"),
        (("evaluate", "nowhere", "--calibration", 9), 2, "--calibration does nothing without --controls"),
        (("evaluate", "nowhere", "--curve-steps", 0, "--curve-offsets", "1"), 2, "does nothing with --curve-steps 0"),
        (("bench", "--adapter", "smollm2-tool10", "--skip", 0.5), 2, "--skip does nothing with --adapter"),
        (("bench", "--parts", "rows", "--gguf", "x.gguf"), 2, "--gguf does nothing without 'peers'"),
        (("bench", "--parts", ""), 2, "parts: () is not allowed; give at least one"),
        (("data", "builtin:4", "--json", "--preview", 3), 2, "--preview does nothing with --json"),
        (("evaluate", "smollm2-tool10", "--report", "file/r.html"), 1, "file/r.html: could not be written"),
    ],
)
def test_wrong_usage_is_named(run, arguments, code, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    got, _, err = run(*arguments)
    assert got == code
    assert says in err


def test_yaml_errors_name_file_line_and_the_near_key(run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\nrouterrate: 1\n")
    code, _, err = run("train", "--config", path)
    assert code == 2
    assert "router_rate" in err
    assert "run.yaml" in err
    path.write_text("steps: many\n")
    code, _, err = run("train", "--config", path)
    assert code == 2
    assert "run.yaml: steps: 'many'" in err
    for text, says in {
        "model: [a, b]\n": "run.yaml: model",
        "output: 2024-13-01\n": "run.yaml: not valid YAML",
        "train: []\n": "run.yaml: train: expected options under it, found []",
        "bypass: {rank: 0}\n": "Did you mean 'adapter.bypass'",
        "router.scope: step\n": "Did you mean 'adapter.router.scope'",
        "train: {steps: 3}\nevalute: {limit: 3}\n": "'evalute' is no verb's section. Did you mean 'evaluate'",
        "bench: {steps: 3}\n": "no options of train in it, only of bench",
    }.items():
        path.write_text(text)
        code, _, err = run("train", "--config", path)
        assert code == 2
        assert says in err
    path.write_text("steps: [3\n")
    code, _, err = run("train", "--config", path)
    assert code == 2
    assert "run.yaml:2" in err
    code, _, err = run("train", "--config", tmp_path / "missing.yaml")
    assert code == 2
    assert "missing.yaml" in err


def test_study_lists_its_runs_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text("seeds: [0, 1]\nvariants: {budget: {}, open: {train: {objective: open}}}\n")
    code, out, _ = run("study", path, "--dry-run", "--only", "open", "--only", "budget/1", "--json")
    assert code == 0
    assert [(row["run"], row["state"]) for row in json.loads(out)] == [
        ("budget/1", "new"), ("open/0", "new"), ("open/1", "new"),
    ]  # fmt: skip
    assert [found.name for found in tmp_path.iterdir()] == ["study.yaml"]
    code, _, err = run("study", path, "--only", "opne")
    assert code == 2
    assert "Did you mean 'open'" in err


def test_env_names_the_versions(run):
    code, out, _ = run("env", "--json")
    assert code == 0
    assert json.loads(out)["torch"]


def test_export_by_kind_keeps_the_blocks_that_run_for_half_its_steps():
    manifest = SimpleNamespace(measured={"kinds": {"tool_call": {"run_rate": [1.0, 0.5, 0.49, 0.0]}}})
    assert exporting._usual_route("x", manifest, "tool_call").gates == (True, True, False, False)
    with pytest.raises(ConfigError, match="no planning step measured"):
        exporting._usual_route("x", manifest, "planning")
    with pytest.raises(ConfigError, match="Did you mean 'planning'"):
        exporting._usual_route("x", manifest, "planing")


def test_an_export_has_the_template_it_was_trained_on(workshop, run, tmp_path):
    from transformers import AutoTokenizer

    from layerroute.data.rendering import Renderer

    assert run("export", workshop / "run" / "adapter", tmp_path / "out", "--dtype", "float32")[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == Renderer(tiny_tokenizer()).chat_template
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # readable by whoever serves it


def test_a_prompt_from_stdin_that_is_not_utf8_is_refused_in_any_locale(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors="strict"))
    monkeypatch.setattr(generating, "load_engine", lambda *_, **__: (None, SimpleNamespace(tokenizer=None)))
    code, _, err = run("generate", "x", "-p", "-")
    assert code == 2
    assert "--prompt: not UTF-8 text" in err


def test_help_says_what_the_preset_begins_with(run):
    code, out, _ = run("train", "--help")
    assert code == 0
    assert "[0; 64 in preset budget]" in " ".join(out.replace("│", " ").split())


def test_generate_asks_the_engine_for_what_it_was_asked(run, tmp_path, monkeypatch):
    asked, rendered = [], []

    class Asked(ConfigError):
        pass

    def stream(request):
        asked.append(request)
        raise Asked("that is all")

    engine = SimpleNamespace(decoder="native", weights=SimpleNamespace(shape=SimpleNamespace(blocks=4)), stream=stream)
    backbone = SimpleNamespace(tokenizer=tiny_tokenizer())
    monkeypatch.setattr(generating, "load_engine", lambda *_, **__: (engine, backbone))
    ids = generating.prompt_ids
    monkeypatch.setattr(generating, "prompt_ids", lambda context, tok: rendered.append(context) or ids(context, tok))
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "paint"}]))
    run(
        "generate", "x", "-p", "Hi", "--system", "Be short.", "--tools", tools, "--max-tokens", 7, "--temperature", 0.5,
        "--top-p", 0.9, "--seed", 11, "--skip", "none", "--draft", 3,
    )  # fmt: skip
    (context,), (request,) = rendered, asked
    assert [(message.role, message.content) for message in context.messages] == [
        ("system", "Be short."),
        ("user", "Hi"),
    ]
    assert context.tools[0]["name"] == "paint"
    for spec in ('{"name": "f", "description": "\\ud800"}', '{"name": "f", "parameters": {"maximum": 1e999}}'):
        tools.write_text(f"[{spec}]")
        assert run("generate", "x", "-p", "Hi", "--tools", tools)[0] == 1
    assert len(asked) == 1
    assert (request.max_new_tokens, request.draft, request.route) == (7, 3, (True,) * 4)
    assert request.stop_ids == stop_ids(backbone.tokenizer)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 11)


def test_a_stopped_training_says_so_by_its_exit_code(run, monkeypatch):
    from layerroute.training import run as training

    for finished, dry, code in ((True, (), 0), (False, (), 130), (False, ("--dry-run",), 0)):
        monkeypatch.setattr(training, "train", lambda *_, done=finished, **__: training.Run(Path("x"), done, 1.0))
        assert run("train", *dry)[0] == code


def test_the_version_is_the_installed_packages(run):
    assert run("--version") == (0, f"{version('layerroute')}\n", "")
