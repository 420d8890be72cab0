"""Files are written whole or not at all: temporary name, fsync, rename."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerroute.errors import LayerRouteError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on failure it is removed.

    Raises:
        LayerRouteError: the disk is full or the folder can't be written; `path` is as it was before.
    """
    temporary = _beside(path)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes the file anew, for its owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        if (reason := unwritten(error)) is None:
            raise
        raise LayerRouteError(_as_it_was(path, reason)) from error
    finally:
        temporary.unlink(missing_ok=True)


def expanded(path: str | Path) -> Path:
    """Return `path` with a leading ~ as the home it stands for; as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_writable(path: Path) -> None:
    """Raise now what writing `path` would raise after hours of work: its folder can't be made or written."""
    _beside(path).unlink()


def open_up(folder: Path) -> None:
    """Give the files in `folder` the permissions of any new file; safetensors makes its own for the owner alone."""
    probe = _beside(folder / "new")
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():  # folders have theirs from the umask
            path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write `document` to `path` as indented JSON, whole or not at all. NaN is refused."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file that this package wrote; an empty one where there is no such file.

    Raises:
        LayerRouteError: it can't be read or is damaged; `remedy` says what to do then.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise LayerRouteError(f"{path}: damaged ({error}). {remedy}") from error
    return document


def unwritten(error: BaseException | None) -> str | None:
    """Return why a file could not be written, or None where `error` is about something else.

    Libraries hide the system's error: safetensors and tokenizers raise what Rust gives them, torch a RuntimeError.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, LayerRouteError):
        return unwritten(error.__cause__)
    hidden = any(word in str(error) for word in ("(os error ", "PytorchStreamWriter", "inline_container"))
    return str(error) if hidden else None


def _beside(path: Path) -> Path:
    """Make an empty file beside `path`, with the permissions that any new file has, and its folder with it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise LayerRouteError(_as_it_was(path, unwritten(error))) from error
    return temporary


def _as_it_was(path: Path, reason: str | None) -> str:
    return f"{path}: could not be written ({reason}). It is as it was; free some space or choose another folder."
