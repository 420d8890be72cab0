"""The engine: token ids in, token ids and route out. It never sees text."""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args
from weakref import finalize

from layerroute.config import RouterConfig
from layerroute.errors import LayerRouteError, ModelError, near
from layerroute.inference.batching import Scheduler
from layerroute.inference.cache import Memory
from layerroute.inference.classes import RouteClasses
from layerroute.inference.forward import Decoder, TorchDecoder
from layerroute.inference.graphs import GraphDecoder
from layerroute.inference.native import ROWS, NativeDecoder
from layerroute.inference.native_library import Unavailable, at_hand
from layerroute.inference.requests import Request, Result, Row, Session
from layerroute.inference.routers import Gates, Routers
from layerroute.inference.weights import BITS, Weights

DecoderName = Literal["auto", "native", "graphs", "torch"]
SessionFill = Literal["lazy", "eager"]


class Engine:
    """Generates under routes with one model and one adapter's routers.

    Args:
        weights: the model, LoRA merged.
        routers: the adapter's routers; `Routers.open` runs every block.
        config: what routers see and which tokens skip.
        memory_bytes: what all caches together may hold; None is no limit.
        max_rows: how many rows decode together.
        classes: round each route to one of these, towards running more, for the response.
        fallback: a decoded token is run again by every block where the likeliest next one has less than this
            probability; 0 is never.
        decoder: `native` compiles a kernel for fp32, bf16, int8 and int4 on CPU, `graphs` records CUDA graphs, `torch`
            runs everywhere; `auto` takes the quick one of the device if it can and else `decoder_note` says why not.

    Raises:
        LayerRouteError: no row may run, classes of other models, a fallback that is no probability, or no such
            decoder here.
    """

    def __init__(
        self,
        weights: Weights,
        routers: Routers | None = None,
        config: RouterConfig | None = None,
        *,
        memory_bytes: int | None = None,
        max_rows: int = 16,
        classes: RouteClasses | None = None,
        fallback: float = 0.0,
        decoder: DecoderName = "auto",
    ) -> None:
        if max_rows < 1:
            raise LayerRouteError(f"max_rows: {max_rows} is not allowed; give 1 or more.")
        if not 0.0 <= fallback <= 1.0:
            raise LayerRouteError(f"fallback: {fallback} is not allowed; give a probability, from 0 to 1.")
        if decoder not in get_args(DecoderName):
            raise LayerRouteError(f"decoder: {decoder!r} is unknown.{near(decoder, get_args(DecoderName))}")
        shape = weights.shape
        if classes is not None and any(len(route) != shape.blocks for route in classes.routes):
            raise LayerRouteError(f"classes: learn them from routes of this model's {shape.blocks} blocks.")
        routers = routers or Routers.open(shape.blocks, shape.hidden)
        gates = Gates(routers, config or RouterConfig(), shape.blocks, shape.hidden, weights.device)
        self.weights = weights
        self.memory = Memory(memory_bytes)
        chosen = _decoder(weights, decoder, max_rows)
        self.scheduler = Scheduler(
            weights, gates, chosen, self.memory, max_rows=max_rows, classes=classes, fallback=fallback
        )

    @property
    def decoder(self) -> str:
        """The decoder in use: `native`, `graphs` or `torch`."""
        return self.scheduler.decoder.name

    @property
    def decoder_note(self) -> str:
        """Why it is this one, or what holds it back."""
        return self.scheduler.decoder.note

    def session(self, fill: SessionFill = "lazy") -> Session:
        """Return an empty conversation of this engine.

        Raises:
            LayerRouteError: no such `fill`.
        """
        if fill not in get_args(SessionFill):
            raise LayerRouteError(f"fill: {fill!r} is unknown.{near(fill, get_args(SessionFill))}")
        return Session(self.weights, self.memory, fill)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Run all requests to their end, together where memory allows. Results come in the order of requests.

        Raises:
            LayerRouteError: a request the model can't run (none is run then), or a pass that was shared with another
                thread's request broke off there.
            OverBudget: memory held by open sessions leaves no room for a request; the others are cancelled.
        """
        rows: list[Row] = []
        try:
            for request in requests:
                rows.append(self.scheduler.submit(request))
            while any(row.finish_reason is None for row in rows):
                self.scheduler.step()
                if refused := [row for row in rows if row.error is not None]:
                    refused[0].result()
        except BaseException:
            for row in rows:
                self.scheduler.cancel(row)
            raise
        return [row.result() for row in rows]

    def stream(self, request: Request) -> "Stream":
        """Start a request and return its tokens as they come."""
        return Stream(self.scheduler, self.scheduler.submit(request))


class Stream:
    """The tokens of one request, in order. `result` is there once iteration has ended or was cancelled."""

    def __init__(self, scheduler: Scheduler, row: Row) -> None:
        self._scheduler, self._row, self._given = scheduler, row, 0
        finalize(self, scheduler.leave, row).atexit = False  # one that was never begun ends nowhere else

    def __iter__(self) -> Iterator[int]:
        try:
            while True:
                while self._given < len(self._row.token_ids):
                    self._given += 1
                    yield self._row.token_ids[self._given - 1]
                if self._row.error is not None:
                    raise self._row.error
                if self._row.finish_reason is not None:
                    return
                self._scheduler.step()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop generating and free the memory at once; nothing happens if the request is done."""
        self._scheduler.cancel(self._row)

    @property
    def result(self) -> Result:
        """What came of the request.

        Raises:
            LayerRouteError: it has not ended, or ended in an error.
        """
        return self._row.result()


def _decoder(weights: Weights, wanted: str, max_rows: int) -> Decoder:
    library = at_hand() if weights.device.type == "cpu" else None  # prefill asks too: compiled now, not in a request
    packed = weights.precision in BITS and library is None
    slow = f"; {weights.precision} is slow without a kernel for it: each product widens its matrix" if packed else ""
    if wanted == "torch":
        return TorchDecoder(weights, f"as asked{slow}")
    quick = wanted if wanted != "auto" else "graphs" if weights.device.type == "cuda" else "native"
    try:
        if quick == "graphs":
            graphs = GraphDecoder(weights)
            graphs.note += slow
            return graphs
        if max_rows > ROWS:
            raise Unavailable(f"the kernel takes at most {ROWS} rows, max_rows is {max_rows}")
        return NativeDecoder(weights)
    except Unavailable as reason:
        if wanted == quick:
            raise ModelError(f"no decoder {quick!r}: {reason}. Choose decoder 'auto' or 'torch'.") from reason
        return TorchDecoder(weights, f"no decoder {quick!r}: {reason}{slow}")
