"""Cut conversations into steps: one assistant turn each, with all that precedes it as its context."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerroute.config import Kind
from layerroute.data.conversation import Conversation, Message, kind_of
from layerroute.data.rendering import Renderer
from layerroute.data.sources import beginning_hashes, messages_hash
from layerroute.errors import DataError


@dataclass(frozen=True, slots=True)
class Step:
    """Token ids of one step: the context, then the response up to and including its end-of-turn token."""

    input_ids: tuple[int, ...]
    context_length: int
    kind: Kind
    conversation: str  # the hash of its messages, or of the longest one that goes on from it
    source: str
    tools_offered: bool

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return len(self.input_ids) - self.context_length


@dataclass(frozen=True, slots=True)
class CutReport:
    """What became of the assistant turns."""

    turns: int
    kept: int
    too_long: int  # dropped
    empty: int  # dropped: the response had no token
    unrendered: int  # dropped: the chat template refuses them, or rewrites what precedes them

    def left_out(self, max_length: int) -> str:
        """Say what was dropped, in words."""
        words = f"{self.too_long} longer than {max_length} tokens left out"
        words += f", {self.empty} without a token" if self.empty else ""
        return words + (f", {self.unrendered} that the chat template does not serve" if self.unrendered else "")


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn as text: what the backbone is given, and what it shall say."""

    context: str
    response: str
    kind: Kind
    message: Message
    conversation: Conversation
    digest: str  # as `Step.conversation`; ids of several files may coincide


def cut_steps(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    *,
    max_length: int,
) -> tuple[list[Step], CutReport]:
    """Cut every conversation into steps.

    Context and response are tokenised apart, so that the context's ids are the very ones inference will have.

    Args:
        conversations: what to cut.
        tokenizer: the backbone's tokenizer.
        max_length: longest step in tokens; longer ones are dropped.
    """
    render, conversations = Renderer(tokenizer), list(conversations)
    asked = sum(len(_answers(conversation)) for conversation in conversations)
    turns = [turn for found in turns_of(conversations, render) for turn in found]
    contexts = _encode(tokenizer, [turn.context for turn in turns])
    responses = _encode(tokenizer, [turn.response for turn in turns])
    steps: list[Step] = []
    too_long = empty = 0
    for turn, context, response in zip(turns, contexts, responses, strict=True):
        if not response or not context:
            empty += 1
            continue
        if len(context) + len(response) > max_length:
            too_long += 1
            continue
        whole, ids = turn.conversation, (*context, *response)
        steps.append(Step(ids, len(context), turn.kind, turn.digest, whole.source, bool(whole.tools)))
    return steps, CutReport(asked, len(steps), too_long, empty, asked - len(turns))


def prompt_ids(conversation: Conversation, tokenizer: Any) -> list[int]:
    """Return the context ids (tokens) of the step that would come next in `conversation`.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    text = Renderer(tokenizer)(conversation.messages, conversation.tools, add_generation_prompt=True)
    ids: list[int] = _encode(tokenizer, [text])[0]
    return ids


def turns_of(conversations: Sequence[Conversation], render: Renderer) -> list[list[Turn]]:
    """Return, for each conversation, the assistant turns that have a context and that the chat template serves.

    Rows of one conversation (a row for every answer, earlier ones as context alone) share a digest: their steps are
    not independent, and intervals are drawn over conversations.
    """
    hashes = [beginning_hashes(conversation) for conversation in conversations]
    longest: dict[str, Conversation] = {}
    for conversation, beginnings in zip(conversations, hashes, strict=True):
        for beginning in beginnings:
            if len(longest.setdefault(beginning, conversation).messages) < len(conversation.messages):
                longest[beginning] = conversation
    wholes = [longest[beginnings[-1]] for beginnings in hashes]
    return [_turns(one, messages_hash(whole), render) for one, whole in zip(conversations, wholes, strict=True)]


def _turns(conversation: Conversation, digest: str, render: Renderer) -> list[Turn]:
    turns, tools = [], conversation.tools
    for index in _answers(conversation):
        before, message = conversation.messages[:index], conversation.messages[index]
        # Leading blanks would change how the context's last token is split.
        through = (*before, replace(message, content=message.content.strip()))
        try:
            context = render(before, tools, add_generation_prompt=True)
            whole = render(through, tools)
        except DataError:
            continue
        if whole.startswith(context):
            response = whole[len(context) :].rstrip("\n")
            turns.append(Turn(context, response, kind_of(message), message, conversation, digest))
    return turns


def _answers(conversation: Conversation) -> list[int]:
    """Return the places of the assistant's messages that have a context and a weight."""
    return [
        i for i, message in enumerate(conversation.messages) if message.role == "assistant" and message.weight and i
    ]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids
