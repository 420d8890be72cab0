"""A conversation in OpenAI chat format, read strictly: what can't be understood is an error, never a guess."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from layerroute.config import Kind
from layerroute.errors import DataError, near

Role = Literal["system", "user", "assistant", "tool"]
ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"developer": "system", "function": "tool"}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool: its name and its arguments by parameter name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Only the assistant's carry tool calls; a tool's `name` says which tool answered."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    weight: int = 1  # 0: context alone, no step; as in OpenAI's fine-tuning files


@dataclass(frozen=True, slots=True)
class Conversation:
    """A transcript: its turns and the tools on offer, as function specs without the outer wrapper."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    source: str = ""
    split: str | None = None


def kind_of(message: Message) -> Kind:
    """Return the kind of an assistant turn, from its structure alone."""
    return "tool_call" if message.tool_calls else "planning"


def parse_conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Read a row of the form {"messages": [...], "tools": [...]}; `where` (file:line) goes into every error.

    Raises:
        DataError: what is wrong and how to mend it.
    """
    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"{where}: 'messages' must be a non-empty list of chat messages.")
    parsed = tuple(_message(item, f"{where}: messages[{index}]") for index, item in enumerate(messages))
    parsed = _in_order_of_calls(parsed, messages)
    if not any(message.role == "assistant" for message in parsed):
        raise DataError(f"{where}: no assistant message, so there is no step to learn from.")
    if parsed[0].role == "assistant":
        raise DataError(f"{where}: messages[0] is the assistant's; a step needs a context before it.")
    tools = parse_tools(row.get("tools") or row.get("functions"), where)  # `functions`: before there were `tools`
    split = row.get("split")
    return Conversation(str(row.get("id") or where), parsed, tools, str(row.get("source") or ""), split and str(split))


def _in_order_of_calls(parsed: tuple[Message, ...], rows: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Put results that say which call they answer in the order of the calls, and name their tools.

    Rendered transcripts have no ids: the order is all that tells whose result is whose.
    """
    ordered = list(parsed)
    for start, (message, row) in enumerate(zip(parsed, rows, strict=True), start=1):
        ids = [call.get("id") for call in row.get("tool_calls") or ()]
        if not message.tool_calls or not all(isinstance(one, str) for one in ids) or len(set(ids)) < len(ids):
            continue
        end = start
        while end < len(parsed) and parsed[end].role == "tool" and rows[end].get("tool_call_id") in ids:
            end += 1
        places = {index: ids.index(rows[index]["tool_call_id"]) for index in range(start, end)}
        ordered[start:end] = [
            replace(parsed[index], name=parsed[index].name or message.tool_calls[place].name)
            for index, place in sorted(places.items(), key=lambda item: item[1])
        ]
    return tuple(ordered)


def parse_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Read tool specs, wrapped ({"type": "function", "function": {...}}) or bare, also as a JSON string.

    Raises:
        DataError: a spec without a name or with parameters that are no object, or no list.
    """
    if isinstance(value, str):
        value = _from_json(value, f"{where}: tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: 'tools' must be a list of function specs, not {type(value).__name__}.")
    specs = []
    for index, item in enumerate(value):
        spec = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str) or not spec["name"]:
            raise DataError(f"{where}: tools[{index}] has no 'name'. Give OpenAI function specs.")
        # The Responses API has `type` beside the name; it says no more than that this is a function.
        kept = {key: part for key, part in spec.items() if (key, part) != ("type", "function")}
        if isinstance(schema := kept.get("parameters"), str) and schema.strip():
            kept["parameters"] = _from_json(schema, f"{where}: tools[{index}]: parameters")
        if kept.get("parameters") and not isinstance(kept["parameters"], Mapping):
            raise DataError(f"{where}: tools[{index}]: 'parameters' must be a JSON schema, an object.")
        specs.append(kept)
    return tuple(specs)


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where} must be an object with 'role' and 'content', not {type(item).__name__}.")
    role = str(item.get("role"))
    role = ALIASES.get(role, role)
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}.{near(role, ROLES)}")
    older = item.get("function_call")  # one call, before there were `tool_calls`
    calls = item.get("tool_calls") or ([older] if older else ())
    if not isinstance(calls, (list, tuple)):
        raise DataError(f"{where}: 'tool_calls' must be a list.")
    if calls and role != "assistant":
        raise DataError(f"{where}: only the assistant calls tools; this message is the {role}'s.")
    parsed = tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))
    content = _text(item.get("content"), where)
    if role == "assistant" and not content.strip() and not parsed:
        raise DataError(f"{where}: the assistant says nothing and calls nothing. Remove the message.")
    name, weight = item.get("name"), item.get("weight")
    weight = 1 if weight is None else weight
    if weight not in (0, 1):
        raise DataError(f"{where}: 'weight' is {weight!r}; it is 1, or 0 for an answer not to learn from.")
    return Message(cast(Role, role), content, parsed, None if name is None else str(name), int(weight))


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(cast(list[str], texts))
        odd = next(part for part, text in zip(content, texts, strict=True) if not isinstance(text, str))
        kind = odd.get("type", "untyped") if isinstance(odd, Mapping) else type(odd).__name__
        raise DataError(f"{where}: a part of 'content' is {kind}; only text parts are read.")
    raise DataError(f"{where}: 'content' must be text or a list of text parts, not {type(content).__name__}.")


def _call(call: Any, where: str) -> ToolCall:
    spec = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str) or not spec["name"]:
        raise DataError(f"{where}: a call needs the 'name' of its function.")
    arguments = spec.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{where}: arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: 'arguments' must be an object, not {type(arguments).__name__}.")
    return ToolCall(spec["name"], dict(arguments))


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error


def no_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(f"{name} is no JSON number")
