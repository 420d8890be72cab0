"""Write docs/reference.md: the command's own help and the public Python names. `make docs` runs it."""

import sys
from pathlib import Path

import typer

from layerroute.cli.app import app
from layerroute.config import BenchConfig, leaves
from layerroute.evaluation.options import EvaluationConfig
from layerroute.study.options import StudyConfig
from layerroute.training.options import PRESETS, TrainConfig

TARGET = Path(__file__).with_name("reference.md")


def table(kind: type) -> list[str]:
    """Return the options of a dataclass as a Markdown table."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, (_, default, text) in leaves(kind).items():
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        rows.append(f"| `{name}` | `{shown}` | {text.replace('|', chr(92) + '|')} |")
    return rows


def document() -> str:
    """Return the whole page."""
    lines = ["# Reference", "", "Written by `make docs` from the code; do not edit.", "", "## Verbs", ""]
    command = typer.main.get_command(app)
    lines += [f"- `layerroute {name}`: {verb.help.splitlines()[0]}" for name, verb in command.commands.items()]
    options = {"train": TrainConfig, "evaluate": EvaluationConfig, "bench": BenchConfig}
    for title, kind in ((f"Options of `{verb}`", kind) for verb, kind in options.items()):
        keys = "YAML keys; the flag is the same with dashes (`adapter.` left out)."
        keys += " A run begins from the preset `budget` (below)." if kind is TrainConfig else ""
        lines += ["", f"## {title}", "", keys, ""]
        lines += table(kind)
    lines += ["", "## Options of `study`", "", "YAML keys, beside the sections `train`, `evaluate` and `variants`.", ""]
    lines += table(StudyConfig)
    lines += ["", "## Presets", ""]
    for name, values in PRESETS.items():
        changed = ", ".join(f"`{key}: {value}`" for key, value in values.items())
        lines.append(f"- `{name}`: {changed}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
    print(TARGET, file=sys.stderr)
