"""The built-in generator: transcripts of an agent at work, made up, without network.

Every conversation depends on the seed and its index alone, on every platform. Half of the steps call tools, half are
planning: answers to results, questions back, refusals, small talk, worked arithmetic, plans. Tools are on offer in
most conversations, also in those without a call.

Splits go by index: of ten in a row, eight train, one validation, one test. More than half of the test conversations
offer tools of domains that occur in no other split (`catalogue.HELD_OUT`), so that test measures more than recall.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from layerroute.data import phrases
from layerroute.data.catalogue import HELD_OUT, Tool
from layerroute.data.catalogue_work import CHAINS, KNOWN, Chain
from layerroute.data.conversation import Conversation, Message, ToolCall
from layerroute.data.problems import arithmetic, reasoning
from layerroute.data.slots import Value, draw_value, join, parse_slots
from layerroute.data.sources import split_of
from layerroute.data.toolbox import (
    NAME_STYLES,
    Offer,
    Request,
    capital,
    draw_request,
    draw_result,
    fields_of,
    lone_slots,
    make_offer,
    said_of,
)

HELD_OUT_SHARE = 0.6  # of the test conversations
OFFERS = (1,) * 14 + (2,) * 4 + (3, 4)  # how many tools are on offer
BROAD = ("web", "people", "contacts", "shell")  # domains that could stand in for others
SPLIT_OF_TEN = ("train",) * 8 + ("validation", "test")


def generate(count: int, seed: int = 0, start: int = 0) -> list[Conversation]:
    """Return conversations `start` to `start + count - 1` of the endless series of `seed`."""
    return [_conversation(seed, index) for index in range(start, start + count)]


class Scene:
    """A conversation in the making: the tools on offer and what has been said."""

    def __init__(self, random: Random, tools: tuple[Tool, ...]) -> None:
        self.random = random
        self.tools = tools
        self.offers: list[Offer] = []
        self.messages: list[Message] = []
        self.style = random.choice(NAME_STYLES)
        if random.random() < 0.4:
            self._say("system", random.choice(phrases.SYSTEMS))

    def offer(self, *tools: Tool) -> list[Offer]:
        """Put `tools` on offer among others, and return their offers."""
        wanted = max(len(tools), self.random.choice(OFFERS))
        others = [tool for tool in self.tools if tool not in tools]
        extra = self.random.sample(others, min(wanted - len(tools), len(others)))
        detail = self.random.choice((0, 1, 2)) if wanted == 1 else self.random.choice((0, 1))
        made: list[Offer] = []
        for tool in (*tools, *extra):
            offer = self._fresh(tool, detail, {other.name for other in made})
            made.append(offer)
        self.offers = self.random.sample(made, len(made))
        return made[: len(tools)]

    def user(self, text: str) -> None:
        """Let the user speak."""
        self._say("user", text)

    def assistant(self, text: str) -> None:
        """Let the assistant speak."""
        self._say("assistant", text)

    def ask(self, text: str, *, imperative: bool = True) -> None:
        """Let the user make a request, an imperative or a whole sentence, dressed in some words."""
        self.user(self.dressed(text, imperative))

    def dressed(self, text: str, imperative: bool) -> str:
        """Return a request with the words around it."""
        frame = self.random.choice(phrases.ASKING if imperative else phrases.QUESTIONING)
        parts = [frame.format(x=text, X=capital(text) if imperative else text)]
        if self.random.random() < 0.35:
            parts.insert(0, self.random.choice(phrases.BEFORE))
        if self.random.random() < 0.15:
            parts.append(self.random.choice(phrases.AFTER))
        return " ".join(parts)

    def call(self, *requests: Request) -> None:
        """Let the assistant call, at times with a word before."""
        lead = self.random.choice(phrases.LEAD_IN) if self.random.random() < 0.15 else ""
        calls: tuple[ToolCall, ...] = tuple(request.offer.call(request.values) for request in requests)
        self.messages.append(Message("assistant", lead, calls))

    def result(self, offer: Offer, result: dict[str, Value]) -> None:
        """Let the tool answer."""
        self.answer(offer, {name: value.value for name, value in result.items()})

    def answer(self, offer: Offer, content: dict[str, Any]) -> None:
        """Let the tool answer with `content`."""
        self.messages.append(Message("tool", json.dumps(content, ensure_ascii=False), name=offer.name))

    def chance(self, share: float) -> bool:
        """Return true in `share` of the cases."""
        return self.random.random() < share

    def _fresh(self, tool: Tool, detail: int, taken: set[str]) -> Offer:
        while True:
            offer = make_offer(tool, self.style, detail=detail, random=self.random)
            if offer.name not in taken:
                return offer

    def _say(self, role: Any, text: str) -> None:
        self.messages.append(Message(role, text))


def _conversation(seed: int, index: int) -> Conversation:
    random = Random(f"layerroute builtin {seed} {index}")  # a text is hashed the same everywhere
    split = SPLIT_OF_TEN[index % 10]
    held_out = split == "test" and random.random() < HELD_OUT_SHARE
    stories, weights = zip(*STORIES, strict=True)
    while True:
        scene = Scene(random, HELD_OUT if held_out else KNOWN)
        random.choices(stories, weights)[0](scene)
        specs = tuple(offer.spec for offer in scene.offers)
        made = Conversation(f"builtin-{seed}-{index}", tuple(scene.messages), specs, "builtin", split)
        answered = 1 + next(place for place, message in enumerate(made.messages) if message.role == "assistant")
        if split_of(replace(made, messages=made.messages[:answered])) == split:  # so that no two splits share a step
            return made


def _one_call(scene: Scene) -> None:
    """Request, call; mostly the result and an answer; at times more of the same, or thanks."""
    (offer,) = scene.offer(scene.random.choice(scene.tools))
    request = draw_request(offer, scene.random)
    scene.ask(request.text, imperative=request.imperative)
    scene.call(request)
    if scene.chance(0.35):
        return
    _report(scene, request)
    lone = lone_slots(offer)
    if lone and scene.chance(0.5):
        slot = scene.random.choice(lone)
        other = _another(slot.type, request.values[slot.name], scene.random)
        scene.user(scene.random.choice(phrases.AGAIN).format(noun=slot.noun, text=other.text))
        again = request.again(slot, other)
        scene.call(again)
        if scene.chance(0.4):
            _report(scene, again)
    if scene.messages[-1].role == "assistant" and not scene.messages[-1].tool_calls and scene.chance(0.2):
        _thank(scene)


def _two_calls(scene: Scene) -> None:
    """Two requests in one sentence: two calls at once, or one after the other."""
    same = scene.chance(0.6)
    first, second = scene.random.sample(scene.tools, 2)
    offers = scene.offer(first) * 2 if same else scene.offer(first, second)
    requests = [draw_request(offer, scene.random, imperative=True) for offer in offers]
    lone = lone_slots(offers[0])
    if same and lone:
        slot = scene.random.choice(lone)
        requests[1] = requests[0].again(slot, _another(slot.type, requests[0].values[slot.name], scene.random))
        text = f"{requests[0].text}, and the same with {slot.noun} {requests[1].values[slot.name].text}"
    else:
        text = scene.random.choice(phrases.BOTH).format(a=requests[0].text, b=requests[1].text)
    scene.ask(text)
    results = [draw_result(request, scene.random) for request in requests]
    batches = [[0, 1]] if scene.chance(0.6) else [[0], [1]]
    for batch in batches:
        scene.call(*(requests[i] for i in batch))
        if batch != batches[-1]:
            scene.result(offers[batch[0]], results[batch[0]])
    if scene.chance(0.5):
        for i in batches[-1]:
            scene.result(offers[i], results[i])
        said = (said_of(offers[i], requests[i].values, results[i], scene.random) for i in (0, 1))
        scene.assistant(" ".join(said))


def _chain(scene: Scene) -> None:
    """Two calls, the second with what the first returned."""
    by_key = {f"{tool.domain}/{tool.nouns.split('|')[0]}": tool for tool in scene.tools}
    fitting = [chain for chain in CHAINS if chain.first in by_key and chain.second in by_key]
    if not fitting:
        return _two_calls(scene)
    chain = scene.random.choice(fitting)
    offers = scene.offer(by_key[chain.first], by_key[chain.second])
    first, result, second, text = _linked(chain, offers, scene.random)
    scene.ask(text)
    scene.call(first)
    scene.result(offers[0], result)
    scene.call(second)
    if scene.chance(0.6):
        _report(scene, second)
    return None


def _linked(chain: Chain, offers: list[Offer], random: Random) -> tuple[Request, dict[str, Value], Request, str]:
    """Return the first request, what it returns, the second request and the text for both."""
    kinds = [{slot.name: slot.type for slot in parse_slots(offer.tool.slots)} for offer in offers]
    said: dict[str, Value] = {}
    for field in fields_of(chain.ask):
        side, name = field.split("_", 1)
        taken = [value.value for value in said.values()] + list(chain.fixed.values())
        said[field] = draw_value(kinds[side == "b"][name], random)
        while said[field].value in taken:
            said[field] = draw_value(kinds[side == "b"][name], random)
    a, b = ({key[2:]: value for key, value in said.items() if key[0] == side} for side in "ab")
    text = chain.ask.format(**{key: value.text for key, value in said.items()})
    first = Request(offers[0], text, a)
    result = draw_result(first, random)
    b |= {name: result[field] for name, field in chain.linked.items()}
    b |= {name: Value(value, value) for name, value in chain.fixed.items()}
    return first, result, Request(offers[1], text, b), text


def _ask_back(scene: Scene) -> None:
    """A request that leaves something out, the question for it, the answer, the call."""
    (offer,) = scene.offer(scene.random.choice(scene.tools))
    values = draw_request(offer, scene.random).values
    known = {name: values[name] for name in fields_of(offer.tool.vague)}
    scene.ask(offer.tool.vague.format(**{name: value.text for name, value in known.items()}))
    missing = [slot for slot in offer.required if slot.name not in known]
    scene.assistant(scene.random.choice(phrases.ASK_BACK).format(missing=join([slot.noun for slot in missing])))
    if scene.chance(0.1):
        return
    given = {slot.name: values[slot.name] for slot in missing}
    parts = [scene.random.choice(phrases.GIVE).format(noun=s.noun, text=given[s.name].text) for s in missing]
    scene.user(" ".join(f"{capital(part)}." for part in parts))
    request = Request(offer, "", known | given)
    scene.call(request)
    if scene.chance(0.5):
        _report(scene, request)


def _failure(scene: Scene) -> None:
    """A call that fails, what the assistant says to that, and mostly a second try."""
    (offer,) = scene.offer(scene.random.choice(scene.tools))
    request = draw_request(offer, scene.random)
    scene.ask(request.text, imperative=request.imperative)
    scene.call(request)
    error = scene.random.choice(phrases.ERRORS)
    scene.answer(offer, {"error": error})
    scene.assistant(scene.random.choice(phrases.FAILED).format(tool=offer.name, error=error))
    if scene.chance(0.7):
        scene.user(scene.random.choice(phrases.RETRY))
        scene.call(request)
        if scene.chance(0.4):
            _report(scene, request)


def _no_fitting_tool(scene: Scene) -> None:
    """A request that none of the tools on offer can meet."""
    wanted = scene.random.choice(scene.tools)
    scene.tools = tuple(tool for tool in scene.tools if tool.domain not in (wanted.domain, *BROAD))
    scene.offer(scene.random.choice(scene.tools))
    stranger = make_offer(wanted, scene.style, detail=0, random=scene.random)
    request = draw_request(stranger, scene.random, imperative=True)
    scene.ask(request.text)
    domains = join(sorted({offer.tool.domain for offer in scene.offers}))
    scene.assistant(scene.random.choice(phrases.NO_TOOL).format(x=_for_you(request.text), can=domains))
    if scene.chance(0.4):
        _turn_to_a_tool(scene)


def _small_talk(scene: Scene) -> None:
    """A remark that needs no tool though some are on offer; at times a request follows."""
    if scene.chance(0.9):
        scene.offer(scene.random.choice(scene.tools))
    remark, answers = scene.random.choice(phrases.CHITCHAT)
    fill = {
        name: draw_value(name, scene.random).text for name in ("person", "city", "genre", "topic", "meeting", "dish")
    }
    text = remark.format(**fill)
    scene.user(f"{scene.random.choice(phrases.BEFORE)} {text}" if scene.chance(0.25) else text)
    scene.assistant(capital(scene.random.choice(answers).format(**fill)))
    if scene.offers and scene.chance(0.5):
        _turn_to_a_tool(scene)


def _thinking(scene: Scene) -> None:
    """A question for the head, with or without tools on offer; at times a request for one of them follows."""
    if scene.chance(0.6):
        scene.offer(scene.random.choice(scene.tools))
    question, answer = (arithmetic if scene.chance(0.5) else reasoning)(scene.random)
    scene.user(f"{scene.random.choice(phrases.BEFORE)} {question}" if scene.chance(0.25) else question)
    scene.assistant(answer)
    if scene.offers and scene.chance(0.4):
        _turn_to_a_tool(scene)


def _turn_to_a_tool(scene: Scene) -> None:
    """Go on with a request for a tool on offer."""
    request = draw_request(scene.random.choice(scene.offers), scene.random)
    scene.ask(request.text, imperative=request.imperative)
    scene.call(request)
    if scene.chance(0.3):
        _report(scene, request)


def _report(scene: Scene, request: Request) -> None:
    """Let the tool answer and the assistant tell the user."""
    result = draw_result(request, scene.random)
    scene.result(request.offer, result)
    scene.assistant(said_of(request.offer, request.values, result, scene.random))


def _thank(scene: Scene) -> None:
    scene.user(scene.random.choice(phrases.THANKS).format(person=scene.random.choice(phrases.POOLS["person"])))
    scene.assistant(scene.random.choice(phrases.WELCOME))


def _another(kind: str, value: Value, random: Random) -> Value:
    while True:
        other = draw_value(kind, random)
        if other.value != value.value:
            return other


def _for_you(text: str) -> str:
    swapped = {"my": "your", "me": "you", "I": "you"}
    parts = text.split('"')  # every other one is a quotation
    parts[::2] = [" ".join(swapped.get(word, word) for word in part.split(" ")) for part in parts[::2]]
    return '"'.join(parts)


STORIES: tuple[tuple[Callable[[Scene], None], float], ...] = (
    (_one_call, 0.32),
    (_two_calls, 0.14),
    (_chain, 0.05),
    (_ask_back, 0.10),
    (_failure, 0.05),
    (_no_fitting_tool, 0.08),
    (_small_talk, 0.08),
    (_thinking, 0.18),
)
