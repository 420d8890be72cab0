"""The engine's words: what is asked, what comes back, and a conversation that outlives its steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from weakref import finalize

import torch

from layerroute.errors import LayerRouteError
from layerroute.inference.cache import Cache, Fill, Memory
from layerroute.inference.routers import Route
from layerroute.inference.sampling import Sampling, TokenLogprobs
from layerroute.inference.weights import Weights

if TYPE_CHECKING:
    from layerroute.inference.drafting import Lookup

FinishReason = Literal["stop", "length", "cancelled"]


class Session:
    """A conversation whose cache serves many steps, each under its own route.

    A token belongs to the step that first runs it. A response's last token is drawn but not run, so the next step
    runs it with its own context. `fill` says when a skipped block gets the keys and values it lacks: `lazy` keeps
    the residual and fills when a later step runs the block, `eager` fills by the end of the step. It belongs to the
    thread that steps the engine: other threads cancel its stream, and leave `truncate` and `close` alone.
    """

    def __init__(self, weights: Weights, memory: Memory, fill: Fill = "lazy") -> None:
        self.cache = Cache(weights, memory, fill)
        finalize(self, memory.drop, self.cache).atexit = False  # what nobody holds, nobody can close
        self.tokens: list[int] = []
        self.busy = False

    def __len__(self) -> int:
        return self.cache.length

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values and owed residuals."""
        return self.cache.nbytes

    def truncate(self, length: int) -> None:
        """Roll back to the first `length` tokens; at or beyond the present length nothing happens.

        Raises:
            LayerRouteError: a response of this session is being generated.
        """
        self._at_rest()
        if length < self.cache.length:
            self.cache.truncate(max(length, 0))
            del self.tokens[self.cache.length :]

    def close(self) -> None:
        """Free all memory. The session is empty afterwards.

        Raises:
            LayerRouteError: a response of this session is being generated.
        """
        self._at_rest()
        self.cache.close()
        self.tokens.clear()

    def _at_rest(self) -> None:
        if self.busy:
            raise LayerRouteError("this session's response is being generated; end or cancel its stream first.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One step to generate.

    `prompt_ids` is the whole context, also in a session: what the session's cache already holds is found and not run
    again but for what the routers read, and where the two differ the session is rolled back, even if the request is
    then refused for its memory. `route` forces the gates instead of asking the routers, for the tokens that the
    adapter's scope covers. `stop_ids` end the response; the stop token is part of it. `draft` is how many tokens may
    be guessed from the text so far and run in one pass; it changes the time, and the tokens at most where another
    order of sums breaks a near tie (never with the compiled decoder).
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()
    route: Route | None = None
    session: Session | None = None
    draft: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a request.

    `route` is what the response followed, `context_route` what the new context tokens followed (and the response's
    first under scope `continuation`, where a response of no second token has the open route). `cached_tokens` of the
    `prompt_tokens` were in the session already. Of `drafted_tokens` that were guessed `kept_tokens` held;
    `fallback_tokens` were run a second time, by every block. Seconds are wall-clock, those of a batch counted in full.
    """

    token_ids: tuple[int, ...]
    route: Route
    context_route: Route
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float
    logprobs: tuple[TokenLogprobs, ...] | None = None
    drafted_tokens: int = 0
    kept_tokens: int = 0
    fallback_tokens: int = 0

    @property
    def skip_rate(self) -> float:
        """Share of the blocks that the response's route skips, less the passes of tokens that were run again."""
        passes = max(len(self.token_ids) - 1, 1)  # the last token is never run
        return 1.0 - sum(self.route) / len(self.route) - self.fallback_tokens / passes


@dataclass(eq=False, slots=True)
class Row:
    """A request on its way: its cache, its routes and what it has generated so far."""

    request: Request
    cache: Cache
    start: int = 0
    context_route: Route = ()
    gates: list[bool] = field(default_factory=list)
    route: Route = ()
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    generator: torch.Generator | None = None
    lookup: "Lookup | None" = None
    drafted: int = 0
    kept: int = 0
    fallback_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: LayerRouteError | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    passed_over: int = 0

    @property
    def new_ids(self) -> Sequence[int]:
        """The context tokens this step has to run."""
        return self.request.prompt_ids[self.start :]

    def result(self) -> Result:
        """Return the finished row as a Result.

        Raises:
            OverBudget: the row never ran, because open sessions held the memory it needed.
            LayerRouteError: a pass of it broke off, or it has not ended.
        """
        if self.error is not None:
            raise self.error
        if self.finish_reason is None:
            raise LayerRouteError("the response has not ended; take its stream to the end, or cancel it.")
        return Result(
            token_ids=tuple(self.token_ids),
            route=self.route,
            context_route=self.context_route,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.start,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            logprobs=tuple(self.logprobs) if self.request.sampling.logprobs is not None else None,
            drafted_tokens=self.drafted,
            kept_tokens=self.kept,
            fallback_tokens=self.fallback_tokens,
        )
