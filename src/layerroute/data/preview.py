"""What `layerroute data` shows: counts, token lengths and short texts. Plain data, ready for JSON."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from layerroute.config import KINDS, Kind
from layerroute.data.conversation import Conversation, Message, kind_of
from layerroute.data.rendering import with_calls
from layerroute.data.sources import SPLITS, beginning_hashes, content_hash, messages_hash
from layerroute.data.steps import Step

QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
TEXT_WIDTH = 160


def summary(conversations: Sequence[Conversation], steps: Sequence[Step] | None = None) -> dict[str, Any]:
    """Return the counts of conversations and, if they were cut, of steps, with quantiles of their tokens by kind."""
    document = {"content_hash": content_hash(conversations), "conversations": _conversations(conversations)}
    if steps is None:
        return document
    lengths = {kind: _lengths([step for step in steps if step.kind == kind]) for kind in KINDS}
    return document | {"steps": _steps(steps), "tokens": lengths}


def preview_rows(conversations: Sequence[Conversation], n: int) -> list[dict[str, str]]:
    """Return `n` conversations, evenly spaced, as one short text each: {"id", "source", "split", "kinds", "text"}."""
    count = max(0, min(n, len(conversations)))
    chosen = [conversations[index * len(conversations) // count] for index in range(count)]
    return [
        {
            "id": conversation.id,
            "source": conversation.source,
            "split": conversation.split or "",
            "kinds": " ".join(_kinds(conversation)),
            "text": shorten(" | ".join(_said(message) for message in conversation.messages)),
        }
        for conversation in chosen
    ]


def shorten(text: str, width: int = TEXT_WIDTH) -> str:
    """Return `text` on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _conversations(conversations: Sequence[Conversation]) -> dict[str, Any]:
    sources = sorted({conversation.source for conversation in conversations})
    hashes: dict[str, set[str | None]] = {}
    for conversation in conversations:
        hashes.setdefault(messages_hash(conversation), set()).add(conversation.split)
    steps: dict[str, set[str | None]] = {}
    learnt: set[str] = set()
    for conversation in conversations:
        for message, digest in zip(conversation.messages, beginning_hashes(conversation), strict=True):
            if message.role == "assistant":  # one of weight 0 is read all the same
                steps.setdefault(digest, set()).add(conversation.split)
                learnt.update([digest] if message.weight else [])
    names = {str(tool.get("name")) for conversation in conversations for tool in conversation.tools}
    return {
        "count": len(conversations),
        "turns": sum(len(_kinds(conversation)) for conversation in conversations),
        "by_source": {source: _by_split([c for c in conversations if c.source == source]) for source in sources},
        "by_split": _by_split(conversations),
        "by_kind": _by_kind(kind for conversation in conversations for kind in _kinds(conversation)),
        "with_tools": sum(bool(conversation.tools) for conversation in conversations),
        "distinct_tools": len(names),
        "duplicates": len(conversations) - len(hashes),
        "in_two_splits": sum(len(splits) > 1 for splits in hashes.values()),
        "steps_in_two_splits": sum(len(splits) > 1 for digest, splits in steps.items() if digest in learnt),
    }


def _steps(steps: Sequence[Step]) -> dict[str, Any]:
    sources = sorted({step.source for step in steps})
    return {
        "count": len(steps),
        "by_kind": _by_kind(step.kind for step in steps),
        "by_source": {source: _by_kind(s.kind for s in steps if s.source == source) for source in sources},
        "tools_offered": _by_kind(step.kind for step in steps if step.tools_offered),
    }


def _lengths(steps: Sequence[Step]) -> dict[str, dict[str, int]]:
    return {
        "step": quantiles([len(step.input_ids) for step in steps]),
        "context": quantiles([step.context_length for step in steps]),
        "response": quantiles([len(step.input_ids) - step.context_length for step in steps]),
    }


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Return lengths that occur (nearest rank below) at each of `QUANTILES`; nothing for no lengths."""
    ordered = sorted(lengths)
    return {name: ordered[int(q * (len(ordered) - 1))] for name, q in QUANTILES.items()} if ordered else {}


def _by_split(conversations: Iterable[Conversation]) -> dict[str, int]:
    counts = Counter(conversation.split for conversation in conversations)
    return {split: counts[split] for split in SPLITS} | ({"none": counts[None]} if counts[None] else {})


def _by_kind(kinds: Iterable[Kind]) -> dict[str, int]:
    counts = Counter(kinds)
    return {kind: counts[kind] for kind in KINDS}


def _kinds(conversation: Conversation) -> list[Kind]:
    return [kind_of(message) for message in conversation.messages if message.role == "assistant" and message.weight]


def _said(message: Message) -> str:
    return f"{message.role}: {with_calls(message.content, message.tool_calls)}"
