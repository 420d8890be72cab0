"""Turn the options of a dataclass into command-line flags, so that each is declared once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from layerroute.config import build, checked, leaves, read_yaml
from layerroute.errors import ConfigError, near

VERBS = ("train", "evaluate", "bench")


def flag_name(option: str) -> str:
    """Return the flag of a dotted option: `adapter.router.always_run` is --router.always-run."""
    return "--" + option.removeprefix("adapter.").replace("_", "-")


def with_flags(
    kind: type, preset: Mapping[str, Any] = MappingProxyType({}), named: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb one flag for each option of `kind`; those given arrive in its first argument by dotted name.

    `preset`, which is `named` so, is where options start from unless the user says otherwise; help shows its values.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(verb).parameters.values())[1:]
        flags = {name.replace(".", "__"): (name, spec) for name, spec in leaves(kind).items()}

        def command(**values: Any) -> None:
            given = {flags[key][0]: values.pop(key) for key in flags if key in values}
            verb({name: value for name, value in given.items() if value is not None}, **values)

        added = [
            _parameter(key, name, *spec, other=f"{shown(preset[name])} in preset {named}" if name in preset else "")
            for key, (name, spec) in flags.items()
        ]
        command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        command.__name__, command.__doc__ = verb.__name__, verb.__doc__
        return command

    return decorate


def resolve(kind: type, preset: Mapping[str, Any], config: Path | None, given: Mapping[str, Any], verb: str) -> Any:
    """Build the options of a verb: defaults, then the preset, then the YAML file, then flags.

    A file may hold the options of several verbs, each under the verb's name.

    Raises:
        ConfigError: an unknown option, a value of the wrong type, or a file of other verbs' options alone.
    """
    document = read_yaml(config) if config else {}
    if set(document) & set(VERBS):
        if other := [name for name in document if name not in VERBS]:
            raise ConfigError(f"{config}: {other[0]!r} is no verb's section.{near(str(other[0]), VERBS)}")
        if verb not in document:
            raise ConfigError(f"{config}: no options of {verb} in it, only of {', '.join(document)}.")
        document = {} if document[verb] is None else document[verb]
        if not isinstance(document, Mapping):
            raise ConfigError(f"{config}: {verb}: expected options under it, found {document!r}.")
    try:
        document = checked(kind, document)
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}") from error
    return build(kind, preset, document, given)


def refuse_idle(given: Mapping[str, Any], options: Sequence[str], idle: bool, why: str) -> None:
    """Raise a ConfigError where a flag was given for one of `options`, which do nothing now if `idle`."""
    if idle and (named := [name for name in options if name in given]):
        raise ConfigError(f"{flag_name(named[0])} does nothing {why}; leave it out.")


def shown(default: Any) -> str:
    """Return a default as help and reference show it."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _parameter(key: str, name: str, hint: Any, default: Any, help: str, other: str) -> inspect.Parameter:
    group = name.removeprefix("adapter.").rpartition(".")[0]
    defaults = [text for text in ("" if default in (None, ()) else shown(default), other) if text]
    text = f"{help} \\[{'; '.join(defaults)}]" if defaults else help
    panel = f"Options of {group}" if group else "Options"
    is_flag = hint is bool
    flag = flag_name(name)
    declared = f"{flag}/--no-{flag.removeprefix('--')}" if is_flag else flag
    info = typer.Option(
        declared, help=text, metavar=None if is_flag else _metavar(hint), rich_help_panel=panel, show_default=False
    )
    annotation: Any = Annotated[bool | None, info] if is_flag else Annotated[str | None, info]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "A,B,..."
    names = [getattr(arg, "__name__", "") for arg in get_args(hint) or (hint,)]
    return names[0].upper()
