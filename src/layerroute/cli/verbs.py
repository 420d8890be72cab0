"""The verbs. Results go to stdout, progress to stderr; heavy imports stay inside the verb that needs them."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from layerroute.cli.flags import refuse_idle, resolve, with_flags
from layerroute.config import BenchConfig, Precision
from layerroute.errors import ConfigError, near
from layerroute.evaluation.options import EvaluationConfig
from layerroute.training.options import PRESETS, TrainConfig

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Model = Annotated[str | None, typer.Option("--model", help="Backbone to use instead of the one the adapter names.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of options; flags win over it.")]
Adapter = Annotated[
    str, typer.Argument(help="Adapter: folder, name of a shipped one, or hf:owner/name.", show_default=False)
]


def say(line: str) -> None:
    """Print one line of progress."""
    print(line, file=sys.stderr, flush=True)


@with_flags(TrainConfig, PRESETS["budget"], "budget")
def train(
    given: dict[str, Any],
    *,
    preset: Annotated[str, typer.Option(help=f"Recipe to start from: {', '.join(PRESETS)}.")] = "budget",
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load everything, run one batch, write nothing.")] = False,
) -> None:
    """Train an adapter: routers and LoRA on a frozen backbone.

    Ctrl-C saves a checkpoint; --resume goes on exactly where it stopped.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--preset: {preset!r} is unknown.{near(preset, PRESETS)}")
    options = resolve(TrainConfig, PRESETS[preset], config, given, "train")
    held = [name for name in given if name.startswith(("budget.", "settle."))]
    refuse_idle(given, held, options.objective != "budget", f"with --objective {options.objective}")
    refuse_idle(given, ("gate_weight",), options.objective != "paper", f"with --objective {options.objective}")
    refuse_idle(given, ("router_rate", "bias_rate"), options.objective == "open", "with --objective open")
    from layerroute.training.run import train as run

    done = run(options, resume=resume, dry_run=dry_run, say=say)
    if done.finished:
        print(done.adapter)
    elif not dry_run:
        raise typer.Exit(130)


@with_flags(EvaluationConfig)
def evaluate(
    given: dict[str, Any],
    *,
    adapter: Adapter,
    model: Model = None,
    config: Config = None,
    json_: Json = False,
    report: Annotated[Path | None, typer.Option(help="Write the HTML report here, and the JSON beside it.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Write the measured table into the adapter's card.")] = False,
) -> None:
    """Measure an adapter on held-out steps: skip rates, differential, perplexity, gates, controls."""
    options = resolve(EvaluationConfig, {}, config, given, "evaluate")
    refuse_idle(given, ("task_limit", "task_tokens", "timed_steps", "fallback"), not options.tasks, "without --tasks")
    fits = "two_masks_classifier" in options.controls
    refuse_idle(given, ("calibration",), not fits, "without --controls two_masks_classifier")
    refuse_idle(given, ("curve_offsets",), not options.curve_steps, "with --curve-steps 0")
    from layerroute.evaluation.run import evaluate_adapter
    from layerroute.evaluation.table import print_table

    document = evaluate_adapter(adapter, options, model=model, report=report, save=save, say=say)
    print(json.dumps(document, indent=2)) if json_ else print_table(document)


def study(
    config: Annotated[Path, typer.Argument(help="YAML file of the study.", show_default=False)],
    output: Annotated[str | None, typer.Option(help="Folder to use instead of the file's.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Sources to train and evaluate on instead of the file's: A,B,...")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Do only this variant, or variant/seed; may be given several times.")
    ] = None,
    known: Annotated[
        Path | None,
        typer.Option(help="results.json, e.g. of another machine, whose runs of this study are not redone."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and how far each is.")] = False,
    json_: Json = False,
) -> None:
    """Train and measure named variants over seeds; the same command goes on where it stopped.

    Ctrl-C saves the run in progress.
    """
    from layerroute.cli.studying import carry_out, plan

    if dry_run:
        plan(config, output=output, data=data, only=only or (), known=known, as_json=json_)
    elif not carry_out(config, output=output, data=data, only=only or (), known=known, as_json=json_, say=say):
        raise typer.Exit(130)


def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the user says; - reads it from stdin.")],
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON file with a list of OpenAI function specs.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest response.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    skip: Annotated[
        str | None, typer.Option(help="Force a route: blocks to skip, e.g. 3,7,11; 'none' runs all.")
    ] = None,
    draft: Annotated[
        int, typer.Option(help="Guess up to so many tokens from the text so far and check them in one pass.", min=0)
    ] = 0,
    fallback: Annotated[
        float,
        typer.Option(help="Run a token again by every block where no next one has this probability.", min=0.0, max=1.0),
    ] = 0.0,
    precision: Annotated[
        Precision,
        typer.Option(help="What the engine computes in; int8 and int4 pack the matrices when loaded."),
    ] = "bf16",
    json_: Json = False,
) -> None:
    """Answer one prompt, streamed, and show the route it took and what that saved."""
    from layerroute.cli.generating import Question, answer

    # Undecodable bytes come as they do in an argument, whatever the locale, and are refused there.
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if prompt == "-" else prompt
    question = Question(text, system, tools, max_tokens, temperature, top_p, seed, skip, draft, fallback)
    answer(adapter, question, model=model, precision=precision, as_json=json_)


def inspect(
    target: Annotated[str, typer.Argument(help="Adapter, backbone, or folder with a config.json.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Draw the route of this prompt.")] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON file with a list of OpenAI function specs.")] = None,
    context: Annotated[int | None, typer.Option(help="Context tokens for the FLOP count. \\[256]", min=1)] = None,
    response: Annotated[int | None, typer.Option(help="Response tokens for the FLOP count. \\[64]", min=1)] = None,
    model: Model = None,
    json_: Json = False,
) -> None:
    """Show parameter counts and FLOPs of an adapter or a backbone, or the route of a prompt."""
    from layerroute.cli.inspecting import describe, draw_route

    if prompt is None:
        if tools is not None:
            raise ConfigError("--tools belongs to a prompt; give --prompt as well.")
        describe(target, model=model, context=context or 256, response=response or 64, as_json=json_)
    else:
        if context or response:
            raise ConfigError("--context and --response are for the FLOP count without --prompt; leave them out.")
        draw_route(target, prompt, tools, model=model, as_json=json_)


def data(
    sources: Annotated[
        list[str], typer.Argument(help="Transcripts: files, folders, hf:owner/name, or `builtin[:[A-]N]`.")
    ],
    tokenizer: Annotated[str | None, typer.Option(help="Count tokens with this backbone's tokenizer.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest step in tokens, with --tokenizer.", show_default="512", min=8)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many conversations of each source.")] = None,
    preview: Annotated[
        int | None, typer.Option(help="Show this many conversations above the tables.", show_default="2", min=0)
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on past bad rows, and count them.")] = False,
    json_: Json = False,
) -> None:
    """Check transcripts: validate every row, count turns by kind, preview a few."""
    if max_length is not None and tokenizer is None:
        raise ConfigError("--max-length counts tokens; give --tokenizer as well.")
    if preview is not None and json_:
        raise ConfigError("--preview does nothing with --json; leave it out.")
    from layerroute.cli.inspecting import describe_data

    describe_data(
        sources,
        tokenizer=tokenizer,
        max_length=max_length or 512,
        limit=limit,
        preview=2 if preview is None else preview,
        skip_bad=skip_bad,
        as_json=json_,
    )


def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="Folder for the checkpoint.", show_default=False)],
    skip: Annotated[str | None, typer.Option(help="Bake in a route: blocks to skip, e.g. 3,7,11.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Bake in the blocks that this kind closes most: tool_call or planning.")
    ] = None,
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Write an ordinary Hugging Face checkpoint: LoRA merged, all blocks or one fixed route."""
    from layerroute.cli.exporting import export_adapter

    export_adapter(adapter, output, skip=skip, kind=kind, model=model, dtype=dtype)
    print(output)


@with_flags(BenchConfig)
def bench(
    given: dict[str, Any],
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="One row, built-in context: under a minute on SmolLM2 and 2 cores.")
    ] = False,
    config: Config = None,
    plot: Annotated[Path | None, typer.Option(help="Draw speed-up against skip rate into this SVG file.")] = None,
    json_: Json = False,
) -> None:
    """Time prefill and decode, all gates open against routes, alone and together, and against other engines."""
    options = resolve(BenchConfig, {}, config, given, "bench")
    if quick and (plot is not None or config is not None):
        raise ConfigError("--quick takes only --model and --skip; leave out --plot and --config.")
    if plot is not None and "rates" not in options.parts:
        raise ConfigError("--plot draws the part 'rates'; add it to --parts.")
    if quick and (beyond := sorted(set(given) - {"model", "skip"})):
        raise ConfigError(f"--quick takes only --model and --skip; leave out --{beyond[0].replace('_', '-')}.")
    refuse_idle(given, ("skip",), options.adapter is not None, "with --adapter, whose routers decide")
    refuse_idle(given, ("gguf", "onnx", "folder"), "peers" not in options.parts, "without 'peers' in --parts")
    refuse_idle(given, ("draft",), "drafts" not in options.parts, "without 'drafts' in --parts")
    from layerroute.cli.benching import time_engine, time_one_row

    if quick:
        time_one_row(options, as_json=json_)
    else:
        time_engine(options, as_json=json_, drawing=plot, say=say)


def env(json_: Json = False) -> None:
    """Show versions and the machine, for bug reports."""
    from layerroute.machine import describe_machine

    facts = describe_machine()
    if json_:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


ALL = (train, evaluate, study, generate, inspect, data, export, bench, env)
