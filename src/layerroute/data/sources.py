"""Where conversations come from: JSONL and Parquet files, the Hugging Face hub, the built-in generator."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

from layerroute.config import require
from layerroute.data.conversation import Conversation, no_constant, parse_conversation
from layerroute.data.schemas import to_chat_row
from layerroute.errors import ConfigError, DataError, near

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "testing": "test",
}
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
BUILTIN_COUNT = 2000
SHOWN = 20

Bad = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a source's rows; `rows` counts those read, `kept` the conversations returned."""

    source: str
    rows: int
    kept: int
    bad: tuple[Bad, ...]  # (file:line, reason)
    begun: int = 0  # rows left out because another goes on from them


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    value: Any  # the row, a Conversation, or the DataError that says why there is none
    source: str
    split: str | None = None  # the split the hub files it under


def load_conversations(
    source: str, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> tuple[list[Conversation], LoadReport]:
    """Read conversations, each in its split.

    A row's own `split` counts; a row without one is assigned by the hash of its messages (80/10/10), or goes with an
    equal row that has a split, so that exact duplicates are never apart. A log of requests holds a conversation once
    for every answer, each row with all that went before: of rows without a split, those that another goes on from,
    with the same weights, are left out, because their steps are in the longer one. With other weights (earlier
    answers as context alone) they are kept, in the split of the longest row that goes on from them.

    Args:
        source: a .jsonl, .jsonl.gz or .parquet file or a directory of those, a .json file that holds a list of
            rows, `hf:owner/name[:config]`, `builtin[:N]` for the generator's first N
            conversations, or `builtin:A-N` for those without the first A.
        split: keep only "train", "validation" or "test".
        limit: keep the first so many conversations, in the source's order. Rows behind them are only read
            where rows have no split.
        skip_bad: leave out rows that can't be read, and count them in the report.

    Raises:
        DataError: the source can't be read, has bad rows (all are collected) or nothing to keep.
        ConfigError: an impossible `split` or `limit`.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split: {split!r} is no split.{near(split, SPLITS)}")
    require(limit is None or limit >= 1, "limit", limit, "1 or more")
    kept: list[tuple[Conversation, tuple[str, str] | None]] = []  # and, if its split was assigned, its two hashes
    bad: list[Bad] = []
    beginnings = _Beginnings()
    seen: Counter[str] = Counter()
    rows = 0
    for row in _rows(source):
        rows += 1
        try:
            conversation, assigned = _conversation(row)
        except DataError as error:
            bad.append((row.where, str(error).removeprefix(f"{row.where}: ")))
            continue
        hashes = beginnings.note(conversation, assigned=assigned)
        if not assigned:
            seen[str(conversation.split)] += 1
        if assigned or split in (None, conversation.split):
            kept.append((conversation, hashes if assigned else None))
            if len(kept) == limit and not any(hashes for _, hashes in kept):
                break
    if bad and not skip_bad:
        raise DataError(_all_bad(source, rows, bad))
    placed = [beginnings.place(conversation, hashes) for conversation, hashes in kept]
    mine = [(conversation, begun) for conversation, begun in placed if split in (None, conversation.split)]
    found = [conversation for conversation, begun in mine if not begun][:limit]
    if not found:
        seen.update(str(c.split) for (c, begun), (_, hashes) in zip(placed, kept, strict=True) if hashes and not begun)
        raise DataError(_nothing(source, split, seen, bad))
    return found, LoadReport(source, rows, len(found), tuple(bad), sum(begun for _, begun in mine))


class _Beginnings:
    """Which conversations of a source go on from which."""

    def __init__(self) -> None:
        self._weighted: set[str] = set()  # the hash of each beginning, with weights
        self._longest: dict[str, tuple[int, str | None]] = {}  # without: length and split of what goes on furthest

    def note(self, conversation: Conversation, *, assigned: bool) -> tuple[str, str]:
        """Note how `conversation` begins, and return the hashes of all of it, without and with weights.

        Where its split was not `assigned`, equal rows follow it.
        """
        *beginnings, whole = plain = beginning_hashes(conversation)
        all_count = all(message.weight for message in conversation.messages)  # then weights change no hash
        *weighted, whole_weighted = plain if all_count else beginning_hashes(conversation, weights=True)
        self._weighted.update(weighted)
        length = len(conversation.messages)
        for beginning in beginnings if assigned else plain:
            if self._longest.get(beginning, (0, None))[0] < length:
                self._longest[beginning] = (length, conversation.split)
        return whole, whole_weighted

    def place(self, conversation: Conversation, hashes: tuple[str, str] | None) -> tuple[Conversation, bool]:
        """Return it in the split of what goes on from it, and whether that has all its steps.

        Without hashes it is returned as it is.
        """
        if hashes is None:
            return conversation, False
        _, split = self._longest.get(hashes[0], (0, conversation.split))
        return replace(conversation, split=split), hashes[1] in self._weighted


def load_sources(
    sources: Sequence[str],
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Conversation], list[Bad]]:
    """Read the conversations of every source, at most `limit` of each, and `say` where rows were left out.

    Raises:
        DataError, ConfigError: as for `load_conversations`.
    """
    conversations: list[Conversation] = []
    bad: list[Bad] = []
    for source in sources:
        loaded, report = load_conversations(source, split=split, limit=limit, skip_bad=skip_bad)
        conversations += loaded
        bad += report.bad
        if report.bad:
            where, reason = report.bad[0]
            say(f"{source}: {len(report.bad)} bad rows left out, the first at {where}: {reason}")
        if report.begun:
            say(f"{source}: {report.begun} rows left out, because another row goes on from each")
    return conversations, bad


def content_hash(conversations: Iterable[Conversation]) -> str:
    """Return 16 hex digits that name this set of conversations: messages, tools, splits and weights, in any order."""
    digests = sorted(_digest([_messages(c), c.tools, c.split, *_unweighted(c)]) for c in conversations)
    return sha256("\n".join(digests).encode()).hexdigest()[:16]


def messages_hash(conversation: Conversation) -> str:
    """Return the sha256 of the messages alone; exact duplicates share it."""
    return _digest(_messages(conversation))


def beginning_hashes(conversation: Conversation, *, weights: bool = False) -> list[str]:
    """Return, for each message, a hash of it and all before it: conversations that begin alike share the first.

    With `weights` an answer to learn from is another than the same one that is context alone.
    """
    running, found = sha256(), []
    for row, message in zip(_messages(conversation), conversation.messages, strict=True):
        running.update(_digest(row if message.weight or not weights else [row, 0]).encode())
        found.append(running.hexdigest())
    return found


def split_of(conversation: Conversation) -> str:
    """Return the split the messages' hash falls in: 80% train, 10% validation, 10% test."""
    place = int(messages_hash(conversation)[:8], 16) % 10
    return "train" if place < 8 else "validation" if place == 8 else "test"


def _conversation(row: _Row) -> tuple[Conversation, bool]:
    """Return the conversation, and whether its split had to be assigned."""
    if isinstance(row.value, DataError):
        raise row.value
    found = row.value
    if not isinstance(found, Conversation):
        if not isinstance(found, Mapping):
            raise DataError(f"{row.where}: a row must be a JSON object, not {type(found).__name__}.")
        found = parse_conversation(to_chat_row(found, row.where), row.where)
    split = (found.split or row.split or "").lower()
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{row.where}: 'split' is {found.split!r}.{near(split, SPLITS)}")
    try:
        assigned = split_of(found)
        _digest([found.tools, found.id, found.source, [message.name for message in found.messages]])
    except UnicodeEncodeError as error:
        raise DataError(f"{row.where}: text with a lone surrogate, which is no character. Remove it.") from error
    except (TypeError, ValueError, RecursionError) as error:  # a Parquet file holds dates, bytes and NaN as such
        raise DataError(f"{row.where}: a value of a call or a tool that JSON can't write ({error}).") from error
    return replace(found, split=SPLIT_NAMES.get(split, assigned), source=found.source or row.source), not split


def _messages(conversation: Conversation) -> list[Any]:
    return [[m.role, m.content, [[call.name, call.arguments] for call in m.tool_calls]] for m in conversation.messages]


def _unweighted(conversation: Conversation) -> list[int]:
    return [place for place, message in enumerate(conversation.messages) if not message.weight]


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()


def _all_bad(source: str, rows: int, bad: list[Bad]) -> str:
    lines = [f"  {where}: {reason}" for where, reason in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more")
    listed = "\n".join(lines)
    return (
        f"{source}: {len(bad)} of {rows} rows can't be read:\n{listed}\nMend them, or leave them out with --skip-bad."
    )


def _nothing(source: str, split: str | None, seen: Mapping[str, int], bad: list[Bad]) -> str:
    if seen:
        counts = ", ".join(f"{name} ({seen[name]})" for name in SPLITS if name in seen)
        return f"{source}: no conversation in split {split!r}. It has {counts}."
    if bad:
        where, reason = bad[0]
        return f"{source}: none of its {len(bad)} rows can be read. The first is {where}: {reason}"
    return f"{source}: holds no rows. Give a source with at least one conversation."


def _rows(source: str) -> Iterator[_Row]:
    if source.startswith("hf:"):
        return _hub_rows(source)
    if source == "builtin" or source.startswith("builtin:"):
        return _builtin_rows(source)
    return (row for path in _files(source) for row in _file_rows(path))


def _files(source: str) -> list[Path]:
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, no such user
        raise DataError(f"{source}: no such file ({getattr(error, 'strerror', None) or error}).") from error
    if is_folder:
        found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and _counts(p, path))
        if not found:
            raise DataError(f"{source}: no {', '.join(SUFFIXES)} file in this directory.")
        return found
    if not exists:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        match = get_close_matches(path.name, [*siblings, "builtin"], n=1)
        hint = f" Did you mean {match[0]!r}?" if match else " Give a file, a directory, hf:owner/name or builtin."
        raise DataError(f"{source}: no such file.{hint}")
    if not path.name.endswith((*SUFFIXES, ".json")):
        raise DataError(f"{source}: unknown kind of file. Give one of {', '.join(SUFFIXES)}, .json.")
    return [path]


def _counts(path: Path, folder: Path) -> bool:
    """Return whether `path` is no folder, and neither it nor a folder on the way to it is hidden."""
    return not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _file_rows(path: Path) -> Iterator[_Row]:
    name = path.name.removesuffix(".gz").rpartition(".")[0]
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path, name)
        elif path.name.endswith(".json"):
            yield from _json_rows(path, name)
        else:
            opener: Any = gzip.open if path.name.endswith(".gz") else open
            with opener(path, "rb") as file:
                yield from _lines(file, path, name)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}). Fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}).") from error


def _lines(file: BinaryIO, path: Path, name: str) -> Iterator[_Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield _Row(where, _from_json(line, where), name)


def _json_rows(path: Path, name: str) -> Iterator[_Row]:
    rows = _from_json(path.read_bytes(), str(path))
    if isinstance(rows, DataError):
        raise rows
    if not isinstance(rows, list):
        raise DataError(f"{path}: a .json file must hold a list of rows. One row a line is .jsonl.")
    for number, row in enumerate(rows, start=1):
        yield _Row(f"{path}:{number}", row, name)


def _from_json(data: bytes, where: str) -> Any:
    """Return the value, or the DataError that says why there is none."""
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        return DataError(f"{where}: not valid JSON ({error.msg}, character {error.pos + 1}).")
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not usable JSON ({error}).")


def _parquet_rows(path: Path, name: str) -> Iterator[_Row]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow. Install it with: pip install 'layerroute[hub]'") from error
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield _Row(f"{path}:{number}", _without_nulls(row), name)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error


def _without_nulls(value: Any) -> Any:
    """Drop null fields: Arrow gives every struct the fields of all rows, also the arguments of other tools."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _hub_rows(source: str) -> Iterator[_Row]:
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?::(.+))?", source)
    if not match:
        raise DataError(f"{source}: not a hub data set. Write hf:owner/name or hf:owner/name:config.")
    name, config = match[1], match[2]
    parts = _fetch(source, name, config)
    for part, rows in parts.items():
        split = SPLIT_NAMES.get(str(part)) if len(parts) > 1 else None
        for number, row in enumerate(rows, start=1):
            yield _Row(f"{name}/{part}:{number}", _without_nulls(row), name, split)


def _fetch(source: str, name: str, config: str | None) -> Mapping[Any, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: hub data sets need the package datasets. Install it with: pip install 'layerroute[hub]'"
        ) from error
    try:
        return cast(Mapping[Any, Any], datasets.load_dataset(name, config))
    except Exception as error:  # the hub client raises many kinds; each means the rows can't be had
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise DataError(
            f"{source}: can't be had from the hub ({reason}); "
            "give a downloaded .jsonl, .json or .parquet file instead, or builtin."
        ) from error


def _builtin_rows(source: str) -> Iterator[_Row]:
    span = re.fullmatch(r"builtin(?::(?:(\d{1,7})-)?(\d{1,7}))?", source)
    first, end = (int(span[1] or 0), int(span[2] or BUILTIN_COUNT)) if span else (0, 0)
    if first >= end:
        raise DataError(
            f"{source}: names no conversations. Write builtin, builtin:500 for the first 500, or builtin:500-800 "
            "for the 300 that follow them."
        )
    from layerroute.data.generator import generate

    for number, conversation in enumerate(generate(end - first, start=first), start=first + 1):
        yield _Row(f"{source}:{number}", conversation, "builtin")
