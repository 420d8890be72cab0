"""Row shapes of public data sets, brought to OpenAI chat rows. The shape is told from the fields alone."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from layerroute.errors import DataError, near

SHAPES = {
    "chat": "messages [, tools] (OpenAI chat format)",
    "sharegpt": "conversations [, tools] (Hermes function calling)",
    "glaive": "system, chat (Glaive function calling v2)",
    "xlam": "query, tools, answers (xLAM function calling)",
    "qa": "question, answer [, reasoning] (GSM8K, Turing-Open-Reasoning)",
}
OPENAI = {"tool_calls", "function_call", "tool_call_id", "weight"}
"""Fields by which messages of OpenAI's are known where they stand under `conversations`."""
QUESTIONS = ("question", "problem", "prompt")
ANSWERS = ("answer", "final_answer", "response", "output")
REASONINGS = ("reasoning", "rationale", "solution", "explanation", "chain_of_thought", "cot", "thinking", "steps")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
JSON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def to_chat_row(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return `row` as {"messages", "tools", "id", "source", "split"}; of one that has `messages` only tags are read.

    Raises:
        DataError: the shape is unknown (the known ones are listed) or the row is malformed.
    """
    shape = shape_of(row)
    if shape == "chat":
        return _with_tags_read(row, where)
    if shape is None:
        known = "; ".join(SHAPES.values())
        raise DataError(
            f"{where}: the fields ({', '.join(map(str, row)) or 'none'}) match no known row shape. Known: {known}."
        )
    mapped = {"sharegpt": _sharegpt, "glaive": _glaive, "xlam": _xlam, "qa": _qa}[shape](row, where)
    kept = {key: row[key] for key in ("source", "split") if row.get(key) is not None}
    number = next((row[key] for key in ("id", "conversation_id", "uuid") if row.get(key) is not None), None)
    return mapped | kept | ({} if number is None else {"id": str(number)})


def _with_tags_read(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a chat row in which calls that the assistant's text holds in <tool_call> tags are calls."""
    messages = row["messages"]
    if not isinstance(messages, (list, tuple)) or not any(map(_is_tagged, messages)):
        return row
    read = [
        {**message, **_assistant(message["content"], f"{where}: messages[{index}]", "tool_call", closed=True)}
        if _is_tagged(message)
        else message
        for index, message in enumerate(messages)
    ]
    return {**row, "messages": read}


def _is_tagged(message: Any) -> bool:
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return False
    text = message.get("content")
    calls = message.get("tool_calls") or message.get("function_call")
    return isinstance(text, str) and "<tool_call>" in text and not calls


def shape_of(row: Mapping[str, Any]) -> str | None:
    """Return the key of `SHAPES` that fits the row's fields, or None."""
    if "messages" in row:
        return "chat"
    if "conversations" in row:
        return "sharegpt"
    if "chat" in row:
        return "glaive"
    if "query" in row and "answers" in row:
        return "xlam"
    names = _plain_names(row)
    if _first(names, QUESTIONS) and _first(names, (*ANSWERS, *REASONINGS)):
        return "qa"
    return None


def _sharegpt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Map Hermes rows: <tool_call> and <tool_response> tags become calls and tool messages.

    Specs come from `tools`, else from the <tools> block of the system text. The sentence that opens the block
    and all behind it (Hermes' format instructions) are taken out of the text: rendering writes its own.
    """
    turns = row["conversations"]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"{where}: 'conversations' must be a non-empty list of turns.")
    if any(isinstance(turn, Mapping) and "role" in turn and turn.keys() & OPENAI for turn in turns):
        return dict(_with_tags_read({"messages": turns, "tools": row.get("tools")}, where))
    messages: list[dict[str, Any]] = []
    tools: Any = row.get("tools")
    if isinstance(tools, str) and re.fullmatch(r"(null|None|\[\s*\])?", tools.strip()):
        tools = None
    for index, turn in enumerate(turns):
        here = f"{where}: conversations[{index}]"
        speaker, text = _turn(turn, here)
        if speaker == "assistant":
            weight = {"weight": turn["weight"]} if "weight" in turn else {}
            messages.append(_assistant(text, here, "tool_call", closed=True) | weight)
        elif speaker == "tool":
            messages += _tool_messages(text)
        elif speaker == "system":
            text, specs = _without_tools(text, here)
            tools = tools or specs
            messages += [{"role": "system", "content": text}] if text else []
        else:
            messages.append({"role": "user", "content": text})
    return {"messages": messages, "tools": tools}


def _turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} must be an object with 'from' and 'value', not {type(turn).__name__}.")
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise DataError(f"{where}: unknown speaker {speaker!r}.{near(str(speaker), SPEAKERS)}")
    text = turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise DataError(f"{where}: 'value' must be text, not {type(text).__name__}.")
    return SPEAKERS[speaker], text


def _assistant(text: str, where: str, tag: str, *, closed: bool) -> dict[str, Any]:
    """Split an assistant's text into what it says and the calls in its tags; a call that can't be read is an error."""
    end = f"</{tag}>" if closed else rf"(?=<{tag}>)|\Z"
    calls = []
    for body in re.findall(rf"<{tag}>(.*?)(?:{end})", text, re.DOTALL):
        calls.append(_call(body.strip(), where))
    said = re.sub(rf"<{tag}>.*?(?:{end})", "", text, flags=re.DOTALL)
    if f"<{tag}>" in said:
        raise DataError(f"{where}: a <{tag}> is never closed. Mend or remove the row.")
    message: dict[str, Any] = {"role": "assistant", "content": said.strip()}
    return message | ({"tool_calls": calls} if calls else {})


def _call(body: str, where: str) -> dict[str, Any]:
    quoted = re.fullmatch(r"""\{\s*"name":\s*"([^"]*)",\s*"arguments":\s*'(.*)'\s*\}""", body, re.DOTALL)
    if quoted:  # Glaive's: a JSON object in single quotes, whose own apostrophes may or may not be escaped
        value: Any = {"name": quoted[1], "arguments": read_literal(quoted[2].replace("\\'", "'"))}
    else:
        value = read_literal(body)
    if isinstance(value, Mapping) and isinstance(value.get("arguments"), str):
        value = {**value, "arguments": read_literal(value["arguments"]) if value["arguments"].strip() else {}}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise DataError(f"{where}: can't read the call {_short(body)}. It needs 'name' and 'arguments' as JSON.")
    arguments = value.get("arguments", {})
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: the arguments of {value['name']!r} are no JSON object: {_short(body)}.")
    return {"name": value["name"], "arguments": dict(arguments)}


def _tool_messages(text: str) -> list[dict[str, Any]]:
    bodies = re.findall(r"<tool_response>(.*?)</tool_response>", text, re.DOTALL) or [text]
    messages = []
    for body in bodies:
        value = read_literal(body)
        name = value.get("name") if isinstance(value, Mapping) else None
        message = {"role": "tool", "content": body.strip()}
        messages.append(message | ({"name": name} if isinstance(name, str) else {}))
    return messages


def _without_tools(text: str, where: str) -> tuple[str, list[Any]]:
    for match in re.finditer(r"<tools>(.*?)</tools>", text, re.DOTALL):
        specs = _specs(match[1])
        if not specs and match[1].strip().startswith(("{", "[{")):
            raise DataError(f"{where}: can't read the functions in <tools>: {_short(match[1].strip())}.")
        if specs:
            intro = text[: text.index("<tools>")]
            ends = [m.end() for m in re.finditer(r"[.!?](?=\s)|\n", intro)]
            return intro[: ends[-1]].strip() if ends else "", specs
    return text.strip(), []


def _specs(text: str) -> list[Any]:
    """Read tool specs from a list, or from objects one after the other."""
    value = read_literal(text)
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, Mapping) else _objects(text)


def _objects(text: str) -> list[Any]:
    """Read the JSON objects in a text; none when one of them is broken."""
    decoder, start = json.JSONDecoder(strict=False), text.find("{")
    found = []
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return []
        found.append(value)
        start = text.find("{", end)
    return found


def _glaive(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Map Glaive v2 rows: one text with speaker marks, <functioncall> with arguments in a quoted JSON string."""
    chat, system = row["chat"], row.get("system") or ""
    if not isinstance(chat, str) or not isinstance(system, str):
        raise DataError(f"{where}: 'system' and 'chat' must be text.")
    parts = re.split(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):", chat)
    if parts[0].strip() or len(parts) == 1:
        raise DataError(f"{where}: 'chat' must begin with USER: or ASSISTANT:, not {_short(parts[0].strip())}.")
    messages, tools = _glaive_system(system, where)
    for index, (speaker, said) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        text = said.replace("<|endoftext|>", "").strip()
        if speaker == "ASSISTANT":
            messages.append(_assistant(text, f"{where}: turn {index + 1}", "functioncall", closed=False))
        else:
            messages.append({"role": "user" if speaker == "USER" else "tool", "content": text})
    return {"messages": messages, "tools": tools}


def _glaive_system(system: str, where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    text = system.strip().removeprefix("SYSTEM:").strip()
    start = text.find("{")
    tools = _objects(text) if start >= 0 else []
    if start >= 0 and not tools:
        raise DataError(f"{where}: can't read the functions in 'system': {_short(text[start:])}.")
    said = text[:start].strip(" \n-") if start >= 0 else text
    return ([{"role": "system", "content": said}] if said else []), tools


def _xlam(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Map xLAM rows: `tools` and `answers` are JSON strings; Python type names become JSON schema types.

    A type that JSON schema has no single word for (a union, any) is left out.
    """
    if not isinstance(row["query"], str) or not row["query"].strip():
        raise DataError(f"{where}: 'query' must be text.")
    answers = _list(row["answers"], f"{where}: 'answers'")
    if not answers:
        raise DataError(f"{where}: 'answers' is empty; there is no call to learn from.")
    tools = [_xlam_tool(tool) for tool in _list(row.get("tools") or [], f"{where}: 'tools'")]
    reply = {"role": "assistant", "content": "", "tool_calls": answers}
    return {"messages": [{"role": "user", "content": row["query"]}, reply], "tools": tools}


def _list(value: Any, what: str) -> list[Any]:
    found = read_literal(value) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)):
        raise DataError(f"{what} must be a JSON list, not {_short(str(value))}.")
    return list(found)


def _xlam_tool(tool: Any) -> Any:
    parameters = tool.get("parameters") if isinstance(tool, Mapping) else None
    if not isinstance(parameters, Mapping) or _is_schema(parameters):
        return tool
    properties, required = {}, []
    for name, spec in parameters.items():
        if not isinstance(spec, Mapping):
            return tool
        kind, properties[name] = spec.get("type"), dict(spec)
        if isinstance(kind, str):
            inner = re.sub(r"typing\.|Optional\[", "", kind.strip(), flags=re.IGNORECASE)
            base = re.split(r"[\[\],\s]", inner, maxsplit=1)[0].lower()
            properties[name]["type"] = base if base in JSON_TYPES.values() else JSON_TYPES.get(base)
            if properties[name]["type"] is None:
                del properties[name]["type"]
        if "optional" not in str(kind).lower() and "default" not in spec:
            required.append(name)
    schema = {"type": "object", "properties": properties}
    return {**tool, "parameters": schema | ({"required": required} if required else {})}


def _is_schema(parameters: Mapping[str, Any]) -> bool:
    """Tell a JSON schema from xLAM's flat {parameter: spec}, in which a parameter may be called `properties`."""
    properties = parameters.get("properties")
    return isinstance(properties, Mapping) and not isinstance(properties.get("type"), str)


def _qa(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Map question-and-answer rows to one planning turn: the reasoning, if any, then the answer.

    GSM8K has `question` and `answer`; its <<1+1=2>> calculator marks are removed. Turing-Open-Reasoning is
    read by tolerant names, whatever their case: `question` (or problem, prompt), `answer` (or final_answer,
    response, output) and, where there is one, a reasoning field (reasoning, rationale, solution, explanation,
    chain_of_thought, cot, thinking, steps; a list is joined by lines). `conversation_id` is the id; domain and
    sub-domain are left out.
    """
    names = _plain_names(row)
    question = _said(row, _first(names, QUESTIONS), where)
    parts = [_said(row, _first(names, fields), where) for fields in (REASONINGS, ANSWERS)]
    reasoning, answer = (re.sub(r"<<[^<>\nA-Za-z]*=[^<>\nA-Za-z]*>>", "", part) for part in parts)
    if not question or not (reasoning or answer):
        raise DataError(f"{where}: the question or its answer is empty. Remove the row.")
    reply = f"{reasoning}\n\n{answer}".strip()
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def _said(row: Mapping[str, Any], field: str | None, where: str) -> str:
    value = row[field] if field is not None else None
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = "\n".join(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {field!r} must be text, not {type(value).__name__}.")
    return (value or "").strip()


def _plain_names(row: Mapping[str, Any]) -> dict[str, str]:
    return {re.sub(r"[\s-]+", "_", str(key).strip().lower()): key for key in row}


def _first(names: Mapping[str, str], wanted: tuple[str, ...]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)


def read_literal(text: str) -> Any:
    """Read JSON, or a Python literal as some data sets have it; None when it is neither."""
    text = text.strip()
    try:
        return json.loads(text, strict=False, parse_constant=ast.literal_eval)  # which refuses NaN
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in foreign text
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
