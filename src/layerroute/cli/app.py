"""The `layerroute` command."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from layerroute.cli import verbs
from layerroute.errors import ConfigError, LayerRouteError

app = typer.Typer(
    name="layerroute",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version("layerroute"))
        raise typer.Exit


@app.callback()
def layerroute(
    shown: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adaptive depth for agents: tool calls skip transformer blocks, planning keeps them."""


for verb in verbs.ALL:
    app.command(no_args_is_help=verb.__name__ in {"evaluate", "study", "generate", "inspect", "export"})(verb)


def main() -> None:
    """Run the command. Exit 0, 1 for an error the message explains, 2 for wrong usage, 130 after Ctrl-C (by typer)."""
    try:
        app()
    except LayerRouteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
