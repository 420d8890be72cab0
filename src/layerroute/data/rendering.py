"""Render messages as the text a backbone expects, and read tool calls back out of text.

A chat template is used as it is if it shows tools, calls and results, leaves a context as it is when the answer is
added, and has answers end in a token that stops generation. Otherwise the rendering is Hermes-style, on ChatML (where
`<|im_end|>` is no token, the tokenizer's own end stands for it):

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

from jinja2 import TemplateError

from layerroute.data.conversation import Message, ToolCall
from layerroute.errors import DataError

END = "<|im_end|>"
# Short on purpose: every step pays for these tokens.
TOOLS_INTRO = "# Tools\n<tools>\n"
TOOLS_OUTRO = '\n</tools>\nTo call one, answer\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
DEFAULT_SYSTEM = "You are a helpful assistant."
# A newline right after a tag of Jinja would be dropped, so it is printed.
HERMES = (
    "{% if messages and messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '" + DEFAULT_SYSTEM + "' %}{% set turns = messages %}{% endif %}"
    "<|im_start|>system\n{{ system }}"
    "{% if tools %}{{ '\n\n' }}" + TOOLS_INTRO + "{% for tool in tools %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ (tool.function if tool.function is defined else tool) | tojson }}{% endfor %}{{ " + repr(TOOLS_OUTRO) + " }}"
    "{% endif %}" + END + "\n"
    "{% for m in turns %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>" + END + "\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>\n"
    '{"name": {{ call.function.name | tojson }}, "arguments": '
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}}"
    "{{ '\n' }}</tool_call>{% endfor %}" + END + "\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What a template is tried on, and what of it must show.
PROBE_TOOL: dict[str, Any] = {
    "name": "find_zebra",
    "description": "Find",
    "parameters": {"type": "object", "properties": {}},
}
PROBE_CALLS = (ToolCall("find_zebra", {"where": "north7"}), ToolCall("find_zebra", {"where": "south7"}))
PROBE = (
    Message("system", "Short."),
    Message("user", "Both?"),
    Message("assistant", "Looking6.", PROBE_CALLS),
    Message("tool", "result8", name="find_zebra"),
    Message("tool", "result9", name="find_zebra"),
    Message("assistant", "Found."),
    Message("user", "Thanks"),
    Message("assistant", "Welcome"),
)
SHOWN = ("Looking6.", "result8", "result9")
REFUSALS = (TemplateError, TypeError, ValueError, RecursionError)  # ValueError: no template at all


class Renderer:
    """Renders conversations for one tokenizer: all by its chat template, or all Hermes-style."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        end = END if _whole(tokenizer, END) else tokenizer.eos_token or END
        begun = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        start = tokenizer.bos_token if begun else ""  # what the tokenizer itself would put before a text
        self._template: str | None = None
        if not self._serves():
            self._template = start + HERMES.replace(END, end)

    @property
    def chat_template(self) -> str:
        """The template by which this renders: the tokenizer's own, or the Hermes-style one."""
        return self._template or self._tokenizer.chat_template

    def __call__(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of `messages`, ending where the assistant begins if `add_generation_prompt`.

        Raises:
            DataError: the chat template refuses these messages.
        """
        try:
            return self._render(messages, tools, add_generation_prompt)
        except REFUSALS as error:
            raise DataError(
                f"the backbone's chat template refuses this conversation ({error}). Leave it out."
            ) from error

    def _serves(self) -> bool:
        """Return whether the own chat template meets the conditions at the head of this module, tried on `PROBE`."""
        answers = [index for index, message in enumerate(PROBE) if message.role == "assistant"]
        try:
            self._render(PROBE[1:2], (), True)
            whole = self._render(PROBE, (PROBE_TOOL,), False)
            contexts = [self._render(PROBE[:index], (PROBE_TOOL,), True) for index in answers]
            through = [self._render(PROBE[: index + 1], (PROBE_TOOL,), False) for index in answers]
        except REFUSALS:
            return False
        pairs = list(zip(contexts, through, strict=True))
        if not all(text.startswith(context) for context, text in pairs):
            return False
        responses = [text[len(context) :].rstrip("\n") for context, text in pairs]
        ends = [ids[-1:] for ids in self._tokenizer(responses, add_special_tokens=False)["input_ids"]]
        stops = stop_ids(self._tokenizer)
        return (
            PROBE_TOOL["name"] in contexts[0]
            and all(word in whole for word in SHOWN)
            and parse_tool_calls(responses[0])[1] == PROBE_CALLS
            and all(stops.issuperset(end) and end for end in ends)
        )

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], prompt: bool) -> str:
        template = {"chat_template": self._template} if self._template else {}  # some backends know no such argument
        text: str = self._tokenizer.apply_chat_template(
            [openai_message(message) for message in messages],
            tools=[{"type": "function", "function": tool} for tool in tools] or None,
            add_generation_prompt=prompt,
            tokenize=False,
            **template,
        )
        return text


def with_calls(content: str, calls: Sequence[ToolCall]) -> str:
    """Return an assistant's text with its calls in Hermes tags, as the Hermes-style rendering has them."""
    spelt = [json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False) for call in calls]
    tags = [f"<tool_call>\n{one}\n</tool_call>" for one in spelt]
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
    ends = {tokenizer.eos_token_id} - {None}
    return frozenset(ends | {tokenizer.convert_tokens_to_ids(END)} if _whole(tokenizer, END) else ends)


def response_text(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of a response: without the token that ended it, with every other special one.

    Some tokenizers count `<tool_call>` among the special ones.
    """
    said = ids[:-1] if ids and ids[-1] in stop_ids(tokenizer) else ids
    text: str = tokenizer.decode(said, skip_special_tokens=False)
    return text


def parse_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Split generated text into what is said and the calls in it.

    Calls are read from Hermes tags (the last one may be unclosed), else from the first ``` fence, else from an
    object or list that the text begins with: small models often leave the tags out. Text in which no call
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


def _whole(tokenizer: Any, text: str) -> bool:
    """Return whether `text` is one token."""
    found = tokenizer.convert_tokens_to_ids(text)
    return isinstance(found, int) and found != tokenizer.unk_token_id
