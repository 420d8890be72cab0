"""A tool as one conversation offers it, and a request for it: the text a user writes, the values it holds."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from layerroute.data.catalogue import Tool
from layerroute.data.conversation import ToolCall
from layerroute.data.slots import AS_WRITTEN, Slot, Value, draw_value, parse_slots, schema

CLAUSE_SHARE = 0.4  # how often an optional clause is said
OPTIONAL_SHARE = 0.4  # how many of a tool's optional parameters one conversation's version has
NAME_STYLES = ("snake", "snake", "snake", "camel", "dotted", "domain")
# What a result must be to the request: its field, the parameter, and what holds between the two values.
FITTING: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
    ("price", "max_price", operator.le),
    ("starts", "after", operator.ge),
    ("manager", "name", operator.ne),
    ("email", "name", lambda email, name: email.startswith(name.lower())),
    ("top", "site", operator.contains),
    ("newest", "extension", str.endswith),
    ("first", "extension", str.endswith),
)


@dataclass(frozen=True, slots=True)
class Offer:
    """A tool under the names this conversation gives it."""

    tool: Tool
    spec: dict[str, Any]
    names: dict[str, str]  # canonical parameter name: name in the spec

    @property
    def name(self) -> str:
        """The tool's name."""
        return str(self.spec["name"])

    @property
    def required(self) -> list[Slot]:
        """The parameters a call needs."""
        return [slot for slot in parse_slots(self.tool.slots) if not slot.optional]

    def call(self, values: dict[str, Value]) -> ToolCall:
        """Return the call with `values` (by canonical name), in the order of the spec."""
        return ToolCall(self.name, {name: values[key].value for key, name in self.names.items() if key in values})


@dataclass(frozen=True, slots=True)
class Request:
    """What the user wants of an offered tool."""

    offer: Offer
    text: str
    values: dict[str, Value]  # by canonical parameter name
    imperative: bool = True  # else a whole sentence

    def again(self, slot: Slot, value: Value) -> "Request":
        """Return the same request with another value."""
        return replace(self, values=self.values | {slot.name: value})


def make_offer(tool: Tool, style: str, *, detail: int, random: Random) -> Offer:
    """Offer `tool` under drawn names.

    Args:
        tool: the tool.
        style: one of `NAME_STYLES`.
        detail: 0 describes nothing, 1 the tool, 2 its parameters as well.
        random: draws the names.
    """
    slots = [slot for slot in parse_slots(tool.slots) if not slot.optional or random.random() < OPTIONAL_SHARE]
    names: dict[str, str] = {}
    for slot in slots:
        free = [name for name in (slot.name, *slot.aliases) if name not in names.values()]
        names[slot.name] = _styled([random.choice(free)], "camel" if style == "camel" else "snake")
    parameters = {
        "type": "object",
        "properties": {names[slot.name]: schema(slot, described=detail == 2) for slot in slots},
        "required": [names[slot.name] for slot in slots if not slot.optional],
    }
    verb, noun = (random.choice(line.split("|")) for line in (tool.verbs, tool.nouns))
    if style == "dotted":
        name = f"{tool.domain}.{verb}_{noun}"
    else:
        name = _styled([tool.domain, verb, noun] if style == "domain" else [verb, noun], style)
    about = {"description": random.choice(tool.about.split("|"))} if detail else {}
    return Offer(tool, {"name": name, **about, "parameters": parameters}, names)


def draw_request(offer: Offer, random: Random, *, imperative: bool | None = None) -> Request:
    """Draw a request that holds all an unambiguous call needs; `imperative` asks for that form."""
    asks = [ask for ask in offer.tool.asks if imperative is None or is_imperative(ask) == imperative]
    slots = {slot.name: slot for slot in parse_slots(offer.tool.slots)}
    values: dict[str, Value] = {}

    def clause(match: re.Match[str]) -> str:
        flags = re.findall(r"\{(\w+)=(true|false)\}", match[1])
        names = [name for name, _ in flags] + fields_of(match[1])
        if random.random() > CLAUSE_SHARE or any(name in values or name not in offer.names for name in names):
            return ""
        values.update({name: Value(said == "true", "") for name, said in flags})
        return re.sub(r"\{\w+=\w+\}", "", match[1])

    ask = random.choice(asks)
    pattern = re.sub(r"\[([^\]]*)\]", clause, ask)
    values |= {name: draw_value(slots[name].type, random) for name in fields_of(pattern)}
    return Request(offer, _apart(pattern, values, slots, random), values, is_imperative(ask))


def fields_of(pattern: str) -> list[str]:
    """Return the names of the `{fields}` in a pattern, each once."""
    return list(dict.fromkeys(re.findall(r"\{(\w+)\}", pattern)))


def is_imperative(ask: str) -> bool:
    """Tell whether a pattern, not yet filled in, is an imperative: it starts with a small letter."""
    return ask[0].islower()


def lone_slots(offer: Offer) -> list[Slot]:
    """Return the required parameters whose type no other parameter of the tool has: their values explain themselves."""
    types = [slot.type for slot in parse_slots(offer.tool.slots)]
    return [slot for slot in offer.required if types.count(slot.type) == 1]


def draw_result(request: Request, random: Random) -> dict[str, Value]:
    """Draw what the tool answers, so that it fits what was asked for."""
    types = {slot.name: slot.type for slot in parse_slots(request.offer.tool.result)}
    result = {name: draw_value(kind, random) for name, kind in types.items()}
    for name, parameter, holds in FITTING:
        if name in result and (asked := request.values.get(parameter)):
            while not holds(result[name].value, asked.value):
                result[name] = draw_value(types[name], random)
    return {name: _in_digits(value) for name, value in result.items()}


def said_of(offer: Offer, values: dict[str, Value], result: dict[str, Value], random: Random) -> str:
    """Return an answer to the user that reports `result`."""
    types = {slot.name: slot.type for line in (offer.tool.slots, offer.tool.result) for slot in parse_slots(line)}
    reply = random.choice(offer.tool.replies)
    first = re.match(r"\{(\w+)\}", reply)
    said = reply.format(**{name: value.text for name, value in (values | result).items()})
    return said if first and types[first[1]] in AS_WRITTEN else capital(said)


def capital(text: str) -> str:
    """Return `text` with its first letter large."""
    return text[:1].upper() + text[1:]


def _apart(pattern: str, values: dict[str, Value], slots: dict[str, Slot], random: Random) -> str:
    """Fill `pattern`; two values of one type are never the same (no flight from Oslo to Oslo)."""
    names = fields_of(pattern)
    for index, name in enumerate(names):
        others = [values[other].value for other in names[:index] if slots[other].type == slots[name].type]
        while values[name].value in others:
            values[name] = draw_value(slots[name].type, random)
    return pattern.format(**{name: values[name].text for name in names})


def _in_digits(value: Value) -> Value:
    return Value(value.value, str(value.value)) if isinstance(value.value, int) else value


def _styled(words: Sequence[str], style: str) -> str:
    parts = "_".join(words).split("_")
    return parts[0] + "".join(part.capitalize() for part in parts[1:]) if style == "camel" else "_".join(parts)
