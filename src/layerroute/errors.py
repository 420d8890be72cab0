"""The errors a user can meet. Each message says what is wrong, where, and what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches


class LayerRouteError(Exception):
    """Something the user can mend: the message names the file, line or flag and the remedy (exit code 1)."""


class ConfigError(LayerRouteError):
    """An option, a YAML key or a combination of options that can't be used (exit code 2)."""


class DataError(LayerRouteError):
    """A transcript that can't be read; the message names the file and the line."""


class ModelError(LayerRouteError):
    """A backbone that can't be loaded or is of no supported family."""


class AdapterError(LayerRouteError):
    """An adapter directory that is incomplete, of another version or made for another backbone."""


def near(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"`, or the list of known names when none is near; nothing when none is known."""
    names = sorted(known)
    if not names:
        return ""
    if match := get_close_matches(name, names, n=1):
        return f" Did you mean {match[0]!r}?"
    return f" Known: {', '.join(names)}."
