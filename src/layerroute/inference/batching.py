"""Many steps at once: who is admitted, who decodes together, who is done. Continuous at step granularity."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import Tensor

from layerroute.config import RouterConfig
from layerroute.errors import LayerRouteError
from layerroute.inference.cache import Cache, Fill, Memory, OverBudget
from layerroute.inference.classes import RouteClasses
from layerroute.inference.drafting import guesses, places
from layerroute.inference.fallback import run_again, unsure
from layerroute.inference.forward import Decoder, prefill
from layerroute.inference.requests import FinishReason, Request, Row
from layerroute.inference.routers import Gates, Route
from layerroute.inference.sampling import draw, generator_for
from layerroute.inference.weights import Weights

PREFILL_TOKENS = 4096
"""New context tokens run in one prefill; a longer context runs alone."""
PATIENCE = 8
"""How often a ready row may be passed over for rows of the class that is decoding."""
PLANS = 32
"""Plans kept for the same rows: their drafts differ in length from pass to pass."""


class Scheduler:
    """Drives rows from submission to result. One thread calls `step`; any thread may submit or cancel."""

    def __init__(
        self,
        weights: Weights,
        gates: Gates,
        decoder: Decoder,
        memory: Memory,
        *,
        max_rows: int,
        classes: RouteClasses | None,
        fallback: float = 0.0,
    ) -> None:
        self.weights, self.gates, self.decoder, self.memory = weights, gates, decoder, memory
        self.max_rows, self.classes, self.fallback = max_rows, classes, fallback
        self._waiting: deque[Row] = deque()
        self._ready: list[Row] = []
        self._running: list[Row] = []
        self._plans: dict[tuple[int, ...], Any] = {}
        self._leaving: list[Row] = []
        self._busy = False
        self._lock = threading.RLock()

    @property
    def idle(self) -> bool:
        """Whether no row is left."""
        return not (self._waiting or self._ready or self._running)

    def submit(self, request: Request) -> Row:
        """Queue a request. Its tokens are copied: whose list they are may change it, this session's among them.

        Raises:
            LayerRouteError: the request can't be run by this model, its words are of other types than they should be,
                or its session is another engine's.
            OverBudget: it would not fit the memory budget even if it had it alone.
        """
        request = copied(request)
        check(request, self.weights)
        if request.draft and self.fallback:
            raise LayerRouteError("draft: not with fallback, which looks at tokens one by one. Leave one of them out.")
        session = request.session
        if session is not None and session.cache.memory is not self.memory:
            raise LayerRouteError("this session belongs to another engine; begin one with this engine's session().")
        settled = not self.fallback and (self.classes is None or request.route is not None)
        fill: Fill = "never" if settled else "lazy"
        cache = session.cache if session is not None else Cache(self.weights, self.memory, fill)
        tokens = len(request.prompt_ids) + request.max_new_tokens
        limit = self.memory.limit
        if limit is not None and (needed := Cache(self.weights, self.memory, cache.fill).worst(tokens)) > limit:
            raise OverBudget(
                f"{tokens} tokens may need {needed / 2**20:.1f} MiB, more than the whole memory budget of "
                f"{limit / 2**20:.1f} MiB. Shorten the prompt or max_new_tokens, or raise the budget."
            )
        row = Row(request, cache)
        with self._lock:
            self._waiting.append(row)
        return row

    def cancel(self, row: Row) -> None:
        """End `row` now and free its memory, unless it is done already. Waits for a step in progress.

        Within a step of this very thread, where Python may collect a stream, the row ends with that step.
        """
        with self._lock:
            self.leave(row)
            if not self._busy:
                self._end_leaving()

    def leave(self, row: Row) -> None:
        """Note that nobody reads `row` any more: it ends before the next step.

        Python drops things at any moment and in any thread: it is only noted here.
        """
        if row.finish_reason is None:
            self._leaving.append(row)

    def _end_leaving(self) -> None:
        self._busy = True
        try:
            while self._leaving:
                row = self._leaving.pop()
                if row in self._waiting:
                    self._waiting.remove(row)
                    row.finish_reason = "cancelled"
                elif row.finish_reason is None:
                    self._finish(row, "cancelled")
        finally:
            self._busy = False

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Admit and prefill what fits, then decode one token for every running row, or more where a draft holds.

        Returns:
            The rows that got a token or ended. A row whose memory open sessions hold ends with its `error` set, and
            so do all rows of a pass that breaks off, whosever they are.
        """
        with self._lock:
            self._end_leaving()
            self._busy = True
            try:
                admitted: list[Row] = []
                with self._together(admitted):
                    touched = self._admit(admitted)
                    if admitted:
                        self._prefill(admitted)
                touched += admitted
                self._choose()
                touched += self._decode()
            finally:
                self._end_leaving()
            return touched

    @contextmanager
    def _together(self, rows: Sequence[Row]) -> Iterator[None]:
        """End `rows` where what they share breaks off: their caches have gone further than their tokens."""
        try:
            yield
        except BaseException as error:
            for row in rows:
                if row.finish_reason is None:
                    row.error = LayerRouteError(f"the pass that this step shared broke off ({error!r}); ask again.")
                    self._finish(row, "cancelled")
            raise

    def _admit(self, admitted: list[Row]) -> list[Row]:
        """Move the waiting rows that fit to `admitted`, and return those that are refused."""
        refused: list[Row] = []
        budget = PREFILL_TOKENS
        # With classes, rows wait prefilled so that those of one class can be put together.
        places = self.max_rows * (2 if self.classes else 1) - len(self._running) - len(self._ready)
        for row in list(self._waiting):
            session = row.request.session
            if len(admitted) == places:
                break
            if session is not None and session.busy:
                continue
            if session is not None:
                session.truncate(_shared(session.tokens, row.request, self.gates.config))
            row.start = row.cache.length
            new = len(row.new_ids)
            if admitted and new > budget:
                break
            try:
                row.cache.reserve(len(row.request.prompt_ids) + row.request.max_new_tokens)
            except OverBudget as error:
                if not (admitted or self._running or self._ready):
                    # Nothing that could end would make room: only whoever holds the sessions can.
                    self._waiting.remove(row)
                    row.finish_reason, row.error = "cancelled", error
                    refused.append(row)
                break
            self._waiting.remove(row)
            admitted.append(row)
            budget -= new
            if session is not None:
                session.busy = True
        return refused

    def _prefill(self, rows: Sequence[Row]) -> None:
        began = time.perf_counter()
        decided = self.gates.config.reads_context
        scores = prefill(self.weights, self.gates, rows)
        for row in rows:
            row.generator = generator_for(row.request.sampling, self.weights.device)
            if decided:
                self._follow(row, tuple(row.gates), row.request.max_new_tokens - 1)
            else:
                row.route = row.context_route
            if row.request.session is not None:
                row.request.session.tokens = list(row.request.prompt_ids)
        wanting = [row for row in rows if row.request.max_new_tokens > 0]
        if len(wanting) < len(rows):
            scores = scores[[number for number, row in enumerate(rows) if row in wanting]]
        self._ready += wanting
        if wanting:
            self._extend(wanting, [()] * len(wanting), scores)
        took = time.perf_counter() - began
        for row in rows:
            row.prefill_seconds = took
            if row not in wanting:
                self._finish(row, "length")
        going = [row for row in wanting if row.finish_reason is None]
        for first in range(0, 0 if decided else len(going), self.max_rows):
            self._decide_late(going[first : first + self.max_rows])

    def _decide_late(self, rows: Sequence[Row]) -> None:
        """Run the first token of each response through every block, and follow the route that routers read in it."""
        began, shape = time.perf_counter(), self.weights.shape
        asking = any(row.request.route is None for row in rows)
        size, where = (shape.blocks, len(rows), shape.hidden), self.weights.device
        entered = torch.empty(size, device=where, dtype=torch.float32) if asking else None
        scores = self.decoder.decode(self.decoder.plan(rows), [row.token_ids[-1] for row in rows], entered)
        read = [row.route for row in rows] if entered is None else self.gates.of_tokens(entered)
        for row, gates in zip(rows, read, strict=True):
            self._follow(row, row.request.route or gates, row.request.max_new_tokens - 2)
        self._extend(rows, [()] * len(rows), scores)
        took = time.perf_counter() - began
        for row in rows:
            row.decode_seconds += took

    def _follow(self, row: Row, gates: Route, room: int) -> None:
        """Let the response go on under `gates`, or their class; up to `room` tokens will be run."""
        row.route = self.classes.round(gates) if self.classes and row.request.route is None else gates
        again = bool(self.fallback)
        row.cache.begin_response(row.route, room, last=row.request.session is None and not again, every=again)

    def _choose(self) -> None:
        free = self.max_rows - len(self._running)
        if not self._ready or not free:
            return
        if self.classes:
            counts = Counter(row.route for row in self._running or self._ready)
            (common, _), *_ = counts.most_common(1)
            self._ready.sort(key=lambda row: (row.passed_over < PATIENCE, row.route != common))
        self._running += self._ready[:free]
        self._ready = self._ready[free:]
        for row in self._ready:
            row.passed_over += 1
        self._plans.clear()

    def _decode(self) -> list[Row]:
        rows = list(self._running)
        if not rows:
            return []
        began = time.perf_counter()
        drafts = guesses(rows)
        counts = tuple(len(draft) for draft in drafts)
        if counts not in self._plans:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[counts] = self.decoder.plan(places(rows, drafts))
        ids = [token for row, draft in zip(rows, drafts, strict=True) for token in (row.token_ids[-1], *draft)]
        with self._together(rows):
            scores = self.decoder.decode(self._plans[counts], ids)
            if self.fallback and (again := unsure(rows, scores, self.fallback)):
                scores = scores.clone()  # the next pass writes over it
                scores[again] = run_again(self.decoder, [rows[n] for n in again], [ids[n] for n in again])
                self._plans.clear()
            self._extend(rows, drafts, scores)
        took = time.perf_counter() - began
        for row in rows:
            row.decode_seconds += took
        return rows

    def _extend(self, rows: Sequence[Row], drafts: Sequence[Sequence[int]], scores: Tensor) -> None:
        """Draw each row's next token from its `scores` (1 + draft, vocab), and more while its draft agrees."""
        best = scores.max(-1)
        if any(math.isnan(score) for score in best.values.tolist()):
            raise LayerRouteError(
                "the model's scores are not numbers: its weights hold NaN, or a residual overflowed. Load it in "
                "another precision, or fetch its files again."
            )
        likeliest = best.indices.tolist() if all(row.request.sampling.plain for row in rows) else None
        at, ended = 0, []
        for row, draft in zip(rows, drafts, strict=True):
            before = len(row.token_ids)
            for place in range(at, at + len(draft) + 1):
                token = likeliest[place] if likeliest else self._draw(row, scores[place])
                row.token_ids.append(token)
                reason = _ending(row)
                if reason or place == at + len(draft) or token != draft[place - at]:
                    break
            at += len(draft) + 1
            drawn = len(row.token_ids) - before
            row.cache.retract(len(draft) + 1 - drawn)
            row.drafted += len(draft)
            row.kept += drawn - 1
            if row.request.session is not None and before:
                # The last token drawn is run by the next pass, or by the next step.
                row.request.session.tokens += row.token_ids[before - 1 : -1]
            if reason:
                ended.append((row, reason))
        for row, reason in ended:
            self._finish(row, reason)

    def _draw(self, row: Row, scores: Tensor) -> int:
        seen = [*row.request.prompt_ids, *row.token_ids]
        token, logprobs = draw(scores, row.request.sampling, seen, row.generator)
        if logprobs is not None:
            row.logprobs.append(logprobs)
        return token

    def _finish(self, row: Row, reason: FinishReason) -> None:
        row.finish_reason = reason
        for group in (self._ready, self._running):
            if row in group:
                group.remove(row)
        self._plans.clear()
        if row.request.session is not None:
            row.request.session.busy = False
            # A pass that broke off has gone further in some blocks than in others.
            row.cache.truncate(min(row.cache.length, len(row.request.session.tokens)))
        else:
            row.cache.close()


def copied(request: Request) -> Request:
    """Return a copy of `request` in numbers, sets and tuples of Python's own, its tokens out of the caller's reach.

    What is not to be had so would be found in a pass that others share.

    Raises:
        LayerRouteError: something in it is of another type.
    """
    try:
        return replace(
            request,
            prompt_ids=tuple(map(index, request.prompt_ids)),
            stop_ids=frozenset(map(index, request.stop_ids)),
            max_new_tokens=index(request.max_new_tokens),
            draft=index(request.draft),
            route=None if request.route is None else tuple(map(bool, request.route)),
        )
    except (TypeError, ValueError) as error:
        raise LayerRouteError(
            f"a request that can't be read ({error}): token ids and counts are whole numbers, prompt_ids and stop_ids "
            "collections of them, and a route is one true or false a block."
        ) from error


def check(request: Request, weights: Weights) -> None:
    """Refuse a request that the model can't run.

    Raises:
        LayerRouteError: empty prompt, unknown token ids, a negative count, too many tokens or a misfit route.
    """
    shape, ids = weights.shape, request.prompt_ids
    if not len(ids):
        raise LayerRouteError("the prompt is empty; give at least one token.")
    if min(ids) < 0 or max(ids) >= shape.vocab:
        raise LayerRouteError(f"token ids must be from 0 to {shape.vocab - 1}; found {min(ids)} to {max(ids)}.")
    if request.max_new_tokens < 0:
        raise LayerRouteError(f"max_new_tokens: {request.max_new_tokens} is not allowed; give 0 or more.")
    if request.draft < 0:
        raise LayerRouteError(f"draft: {request.draft} is not allowed; give 0 or more.")
    if len(ids) + request.max_new_tokens > shape.positions:
        raise LayerRouteError(
            f"a prompt of {len(ids)} and up to {request.max_new_tokens} new tokens exceed the model's "
            f"{shape.positions} positions. Shorten one of them, or raise max_position_embeddings in the backbone's "
            "config.json if it is made for more (YaRN)."
        )
    if request.route is not None and len(request.route) != shape.blocks:
        raise LayerRouteError(
            f"a route of {len(request.route)} gates for a model of {shape.blocks} blocks; give one gate a block."
        )


def _ending(row: Row) -> FinishReason | None:
    if row.token_ids[-1] in row.request.stop_ids:
        return "stop"
    return "length" if len(row.token_ids) >= row.request.max_new_tokens else None


def _shared(cached: Sequence[int], request: Request, config: RouterConfig) -> int:
    """Return how many leading tokens agree, leaving as many of the prompt to run as its routers read; one at least."""
    prompt = request.prompt_ids
    deciding = request.route is None and config.reads_context and config.pooling == "last"
    most = max(min(len(cached), len(prompt) - (config.window if deciding else 1)), 0)
    return next((n for n in range(most) if cached[n] != prompt[n]), most)


__all__ = ["Scheduler", "check"]
