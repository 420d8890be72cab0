"""The slots of the built-in tools: what a parameter may hold, how a user says it, and its JSON schema.

A slot is written `name|other name=type` (with `?` at the end when it may be left out); slots are separated by
`; `. Types:

    int:1:9        an integer in that range          price:5:90   a number with two decimals
    num:1:9        a number with one decimal         one:a:b:c    one of these (an enum)
    flag           true or false                     list:TYPE    two or three of TYPE
    address, period, point                           an object with fields of its own
    date, time, email, phone, code, url              made up
    anything else                                    an entry of `phrases.POOLS`
"""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from layerroute.data.phrases import NUMBER_WORDS, POOLS, TYPE_NOTES

MONTHS = (
    ("January", 31), ("February", 28), ("March", 31), ("April", 30), ("May", 31), ("June", 30),
    ("July", 31), ("August", 31), ("September", 30), ("October", 31), ("November", 30), ("December", 31),
)  # fmt: skip
OBJECTS = {
    "address": ("street=street; city=city", "{street}, {city}"),
    "period": ("start=date; end=date", "{start} to {end}"),
    "point": ("x=int:0:90; y=int:0:90", "({x}, {y})"),
}
AS_WRITTEN = frozenset({"file", "folder", "command", "table", "column", "repo", "branch", "service", "email", "url"})
"""Types whose values keep their letters' case, at the start of a sentence too."""
OUT_LOUD = 0.35  # share of small numbers said as a word, and of dates and times said the long way


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter: its canonical name, other names it may bear, its type, and whether a call needs it."""

    name: str
    aliases: tuple[str, ...]
    type: str
    optional: bool = False

    @property
    def noun(self) -> str:
        """The name as words."""
        return self.name.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Value:
    """A drawn value, and how it is said."""

    value: Any
    text: str


@cache
def parse_slots(line: str) -> tuple[Slot, ...]:
    """Read a line of slots (see the head of this module)."""
    slots = []
    for item in filter(None, line.split("; ")):
        names, _, kind = item.partition("=")
        name, *aliases = names.split("|")
        slots.append(Slot(name, tuple(aliases), kind.removesuffix("?"), kind.endswith("?")))
    return tuple(slots)


def draw_value(kind: str, random: Random) -> Value:
    """Draw a value of slot type `kind`; a `flag` has no text, so the request's pattern gives it."""
    head, *rest = kind.split(":")
    if head in ("int", "num", "price"):
        return _number(head, int(rest[0]), int(rest[1]), random)
    if head == "list":
        return _several(":".join(rest), random)
    if head in OBJECTS:
        return _object(head, random)
    if head in MADE_UP:
        return MADE_UP[head](random)
    value, *texts = random.choice(rest if head == "one" else POOLS[head]).split("~")
    return Value(value, random.choice(texts) if texts else value.replace("_", " ") if head == "one" else value)


def schema(slot: Slot, *, described: bool) -> dict[str, Any]:
    """Return the JSON schema of a slot; its format is described even when `described` is false."""
    head = slot.type.split(":")[0]
    note = TYPE_NOTES.get(slot.type.removeprefix("list:"), "")
    spec = _schema_of(slot.type)
    if described or note:
        spec["description"] = note or f"The {slot.noun}"
    if head in OBJECTS:
        spec.pop("description", None)
    return spec


def join(texts: list[str], last: str = "and") -> str:
    """Return `a, b and c`."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def _schema_of(kind: str) -> dict[str, Any]:
    head, *rest = kind.split(":")
    if head == "one":
        return {"type": "string", "enum": rest}
    if head == "list":
        return {"type": "array", "items": _schema_of(":".join(rest))}
    if head in OBJECTS:
        fields = parse_slots(OBJECTS[head][0])
        properties = {field.name: schema(field, described=False) for field in fields}
        return {"type": "object", "properties": properties, "required": [field.name for field in fields]}
    names = {"int": "integer", "num": "number", "price": "number", "flag": "boolean"}
    return {"type": names.get(head, "string")}


def _object(head: str, random: Random) -> Value:
    line, pattern = OBJECTS[head]
    fields = {slot.name: draw_value(slot.type, random) for slot in parse_slots(line)}
    if head == "period":
        month, first = random.randrange(12), random.randint(1, 20)
        days = (first, first + random.randint(1, 8))
        fields = {name: _day(2025, month, day, random) for name, day in zip(fields, days, strict=True)}
    text = pattern.format(**{name: field.text for name, field in fields.items()})
    return Value({name: field.value for name, field in fields.items()}, text)


def _number(head: str, low: int, high: int, random: Random) -> Value:
    whole = random.randint(low, high)
    if head == "int":
        said = 0 <= whole < len(NUMBER_WORDS) and random.random() < OUT_LOUD
        return Value(whole, NUMBER_WORDS[whole] if said else str(whole))
    if head == "num":
        tenths = random.randrange(10)
        value = round(whole + tenths / 10, 1)
        return Value(value, f"{value:.1f}")
    cents = random.choice((0, 25, 49, 50, 75, 90, 95, 99))
    value = round(whole + cents / 100, 2)
    return Value(value, f"{value:.2f}")


def _several(kind: str, random: Random) -> Value:
    wanted = random.choice((2, 2, 3))
    found: list[Value] = []
    while len(found) < wanted:
        drawn = draw_value(kind, random)
        if drawn.value not in [item.value for item in found]:
            found.append(drawn)
    return Value([item.value for item in found], join([item.text for item in found]))


def _date(random: Random) -> Value:
    month = random.randrange(12)
    return _day(random.choice((2024, 2025, 2026)), month, random.randint(1, MONTHS[month][1]), random)


def _day(year: int, month: int, day: int, random: Random) -> Value:
    name = MONTHS[month][0]
    iso = f"{year}-{month + 1:02d}-{day:02d}"
    if random.random() < OUT_LOUD:
        return Value(iso, random.choice((f"{day} {name} {year}", f"{name} {day}, {year}")))
    return Value(iso, iso)


def _time(random: Random) -> Value:
    hour, minute = random.randint(6, 22), random.choice((0, 0, 10, 15, 20, 30, 40, 45, 50))
    clock = f"{hour:02d}:{minute:02d}"
    if random.random() < OUT_LOUD:
        half, short = ("pm" if hour >= 12 else "am"), (hour - 1) % 12 + 1
        return Value(clock, f"{short}:{minute:02d} {half}" if minute else f"{short} {half}")
    return Value(clock, clock)


def _email(random: Random) -> Value:
    name, family = random.choice(POOLS["person"]).lower(), random.choice(POOLS["family"]).lower()
    host = random.choice(POOLS["host"])
    made = random.choice((f"{name}@{host}", f"{name}.{family}@{host}", f"{name[0]}{family}@{host}"))
    return Value(made, made)


def _phone(random: Random) -> Value:
    made = f"+{random.randint(20, 99)} {random.randint(100, 999)} {random.randint(1000, 9999)}"
    return Value(made, made)


def _code(random: Random) -> Value:
    head = random.choice(("A", "B", "C", "K", "M", "Q", "R", "T", "X", "Z"))
    made = f"{head}{random.choice(('-', ''))}{random.randint(100, 99999)}"
    return Value(made, made)


def _url(random: Random) -> Value:
    made = f"https://{random.choice(POOLS['host'])}/{random.choice(POOLS['slug'])}"
    return Value(made, made)


MADE_UP = {"date": _date, "time": _time, "email": _email, "phone": _phone, "code": _code, "url": _url}
