"""Render messages as the text a backbone expects, and read tool calls back out of text.

A chat template that takes tools is used as it is. Otherwise the rendering is Hermes-style, on ChatML:

    <|im_start|>system
    {system text}

    # Tools
    <tools>
    {one JSON spec a line}
    </tools>
    {how to call}<|im_end|>
    <|im_start|>assistant
    <tool_call>
    {"name": ..., "arguments": {...}}
    </tool_call><|im_end|>
    <|im_start|>user
    <tool_response>
    {result}
    </tool_response><|im_end|>
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from layerroute.data.conversation import Message, ToolCall

# Short on purpose: every step pays for these tokens.
TOOLS_INTRO = "# Tools\n<tools>\n"
TOOLS_OUTRO = '\n</tools>\nTo call one, answer\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
DEFAULT_SYSTEM = "You are a helpful assistant."


class Renderer:
    """Renders conversations for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.native = _takes_tools(getattr(tokenizer, "chat_template", None))

    def __call__(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of `messages`, ending where the assistant begins if `add_generation_prompt`."""
        if self.native:
            return self._from_template(messages, tools, add_generation_prompt)
        return hermes(messages, tools, add_generation_prompt=add_generation_prompt)

    def _from_template(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [openai_message(message) for message in messages],
            tools=[{"type": "function", "function": tool} for tool in tools] or None,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        return text


def hermes(messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """Return the Hermes-style rendering (see the head of this module)."""
    turns = list(messages)
    system = turns.pop(0).content if turns and turns[0].role == "system" else DEFAULT_SYSTEM
    if tools:
        system += "\n\n" + TOOLS_INTRO + "\n".join(_json(tool) for tool in tools) + TOOLS_OUTRO
    parts = [_turn("system", system)]
    for message in turns:
        if message.role == "tool":
            parts.append(_turn("user", f"<tool_response>\n{message.content}\n</tool_response>"))
        else:
            parts.append(_turn(message.role, with_calls(message.content, message.tool_calls)))
    return "".join(parts) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def with_calls(content: str, calls: Sequence[ToolCall]) -> str:
    """Return an assistant's text with its calls in Hermes tags."""
    tags = [f"<tool_call>\n{_json({'name': c.name, 'arguments': c.arguments})}\n</tool_call>" for c in calls]
    return "\n".join([content, *tags] if content else tags)


def openai_message(message: Message) -> dict[str, Any]:
    """Return the message in OpenAI chat format, arguments as an object (what chat templates expect)."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.name:
        row["name"] = message.name
    return row


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end a response."""
    ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    return frozenset(i for i in ids if isinstance(i, int) and i != tokenizer.unk_token_id)


def response_text(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of a response: without the token that ended it, with every other special one.

    Some tokenizers count `<tool_call>` among the special ones.
    """
    said = ids[:-1] if ids and ids[-1] in stop_ids(tokenizer) else ids
    text: str = tokenizer.decode(said, skip_special_tokens=False)
    return text


def parse_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Split generated text into what is said and the calls in it.

    Calls are read from Hermes tags (the last one may be unclosed), else from a ```json fence or a bare
    object or list that is the whole text: small models often leave the tags out. Text in which no call
    can be read is returned as it is.
    """
    calls: list[ToolCall] = []
    said: list[str] = []
    position = 0
    for match in re.finditer(r"<tool_call>\s*", text):
        if match.start() < position:
            continue
        value, end = _leading_json(text, match.end())
        found = _calls_of(value, tagged=True)
        if not found:
            continue
        said.append(text[position : match.start()])
        calls += found
        closing = re.compile(r"\s*</tool_call>").match(text, end)
        position = closing.end() if closing else end
    if calls:
        said.append(text[position:])
        return "".join(said).strip(), tuple(calls)
    fence = re.search(r"```(?:json)?\s*\n?(.*?)```", text, re.DOTALL)
    bare = (fence.group(1) if fence else text).strip()
    value, end = _leading_json(bare, 0)
    if found := _calls_of(value, tagged=False):
        rest = text[: fence.start()] + text[fence.end() :] if fence else bare[end:]
        return rest.strip(), tuple(found)
    return text, ()


def _calls_of(value: Any, *, tagged: bool) -> list[ToolCall]:
    """Return the calls that `value` holds. Without a tag a name alone is no call: answers have names too."""
    items = value if isinstance(value, list) else [value]
    calls = []
    for item in items:
        spec = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            return []
        arguments = spec.get("arguments", spec.get("parameters", {} if tagged or spec is not item else None))
        if isinstance(arguments, str):
            arguments = _leading_json(arguments, 0)[0]
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(spec["name"], arguments))
    return calls


def _leading_json(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # a model that repeats one bracket nests deeper than the parser goes
        return None, start


def _takes_tools(template: Any) -> bool:
    templates = template.values() if isinstance(template, dict) else [template]
    return any(isinstance(text, str) and re.search(r"\btools\b", text) for text in templates)


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
