"""A block that a step may skip."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerroute.config import RouterConfig
from layerroute.routing.bypass import Bypass
from layerroute.routing.router import Pool, Router, threshold_logit


@dataclass(slots=True)
class RoutePass:
    """What one forward pass knows about its steps, and the gates it has decided so far.

    Exactly one of `pool` and `forced` decides: routers score the pooled tokens, or the gates are given.
    With both, the routers are scored (to record their logits) and the given gates are used.
    """

    pool: Pool | None
    forced: Tensor | None = None  # (batch or 1, blocks) bool
    skippable: Tensor | None = None  # (batch, seq) bool: the tokens a closed gate skips; None: all of them
    offset: float = 0.0  # added to every logit: the knob behind the quality-against-skip curve
    detached: bool = False  # no gradient from gates into the residual, so that only routers answer for skip rates
    keep_pooled: bool = False
    keep_residuals: bool = False
    entry: tuple[int, Tensor] | None = None  # start at this block with this residual; earlier blocks are passed by
    until: int | None = None  # stop before this block; it and later blocks are passed by
    logits: dict[int, Tensor] = field(default_factory=dict)  # block -> (batch,)
    gates: dict[int, Tensor] = field(default_factory=dict)  # block -> (batch,) bool
    pooled: dict[int, Tensor] = field(default_factory=dict)  # block -> (batch, dim)
    residuals: dict[int, Tensor] = field(default_factory=dict)  # block -> what entered it, (batch, seq, dim)

    def enter(self, block: int, hidden: Tensor) -> tuple[Tensor, bool]:
        """Return the residual that enters `block`, and whether the block lies within this pass."""
        first = self.entry[0] if self.entry else 0
        if self.entry and block == first:
            hidden = self.entry[1]
        if self.keep_residuals and block >= first:
            self.residuals[block] = hidden
        inside = first <= block and (self.until is None or block < self.until)
        if not inside:
            self.gates[block] = hidden.new_ones(len(hidden), dtype=torch.bool)
        return hidden, inside

    def decide(self, block: int, router: Router, threshold: float, hidden: Tensor) -> Tensor:
        """Return the gates (batch,) bool of `block` for the steps whose residual is `hidden`."""
        logit: Tensor | None = None
        if self.pool is not None:
            pooled = self.pool(hidden.detach() if self.detached else hidden)
            if self.keep_pooled:
                self.pooled[block] = pooled.detach()
            logit = router(pooled) + self.offset
            self.logits[block] = logit
        if self.forced is not None:
            gate = self.forced[:, block].expand(hidden.shape[0])
        elif logit is not None:
            gate = logit.detach() > threshold
        else:
            raise ValueError("a pass needs a pool or forced gates")
        self.gates[block] = gate
        return gate


class Tape:
    """Holds the pass in progress, so that each routed block finds it."""

    def __init__(self) -> None:
        self.current: RoutePass | None = None

    @contextmanager
    def playing(self, route_pass: RoutePass) -> Iterator[RoutePass]:
        """Make `route_pass` the one in progress until the block ends."""
        if self.current is not None:
            raise RuntimeError("a routed model can't run two forward passes at once")
        self.current = route_pass
        try:
            yield route_pass
        finally:
            self.current = None


class RoutedBlock(nn.Module):
    """A decoder block with its router, and its bypass if it has one.

    Rows whose gate is closed really skip the block, unless the gate is to learn.
    """

    def __init__(
        self,
        block: nn.Module,
        router: Router,
        tape: Tape,
        index: int,
        config: RouterConfig,
        bypass: Bypass | None,
        norm: str,
    ) -> None:
        super().__init__()
        self.block, self.router, self.bypass, self.index = block, router, bypass, index
        self.threshold = threshold_logit(config)
        if index in config.always_run:
            self.threshold = float("-inf")
            router.requires_grad_(False)
        self._tape, self._norm = tape, norm

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the residual (batch, seq, dim) as the block's attention reads it, which is what a bypass reads too."""
        normed: Tensor = getattr(self.block, self._norm)(hidden)
        return normed

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map the residual (batch, seq, dim) to the next one; rows whose gate is closed get what the bypass makes."""
        current = self._tape.current
        if current is None:
            raise RuntimeError("call the RoutedModel, or open `with routed.pinned(route):` to use the inner model")
        hidden, inside = current.enter(self.index, hidden)
        if not inside:
            return hidden
        gate = current.decide(self.index, self.router, self.threshold, hidden)
        # Gates that are given owe their router nothing, so they send it no gradient.
        logit = current.logits.get(self.index) if self.training and current.forced is None else None
        rows = gate.nonzero().squeeze(1) if logit is None else None
        if rows is not None and len(rows) == len(gate):
            out: Tensor = self.block(hidden, *args, **kwargs)
            # In training every rank has to call every module, so a token passes by, or a row runs, for nothing.
            for_nothing = self.training and self.bypass is not None
            return out + 0.0 * self._passed_by(hidden[:1, :1]) if for_nothing else out
        if rows is None or current.skippable is not None:
            # A gate with a gradient needs what a closed block would have said; tokens that no gate skips do.
            ran = self.block(hidden, *args, **kwargs)
            return blend(self._passed_by(hidden), ran, gate, logit, current.skippable)
        none = len(rows) == 0
        if none and not self.training:
            return self._passed_by(hidden)
        if none:
            rows = rows.new_zeros(1)
        args, kwargs = _rows((args, kwargs), rows, len(gate))
        passed = self._passed_by(hidden)
        ran = passed.index_copy(0, rows, self.block(hidden[rows], *args, **kwargs))
        return torch.where(gate[:, None, None], ran, passed) if none else ran

    def _passed_by(self, hidden: Tensor) -> Tensor:
        """Return the residual after the block where its gate is closed."""
        if self.bypass is None:
            return hidden
        passed: Tensor = self.bypass(hidden, self.normed(hidden))
        return passed


def blend(passed: Tensor, ran: Tensor, gate: Tensor, logit: Tensor | None, skippable: Tensor | None) -> Tensor:
    """Return `ran` where the gate is open and `passed` elsewhere, exactly: h <- g * Block(h) + (1 - g) * h.

    The gradient is straight-through: g is hard forward and sigmoid(logit) backward (paper, section 3).

    Args:
        passed: the residual that passes the block by, (batch, seq, dim): h, or what the block's bypass makes of it.
        ran: the residual after the block, same shape.
        gate: (batch,) bool.
        logit: (batch,) float32, or None for gates without a gradient.
        skippable: (batch, seq) bool, the tokens that a closed gate skips; None for all.
    """
    if logit is None:
        return torch.where(_open(gate, skippable), ran, passed)
    blended: Tensor = _Blend.apply(passed, ran, gate, torch.sigmoid(logit), skippable)  # type: ignore[no-untyped-call]
    return blended


def straight_through(gates: Tensor, logits: Tensor) -> Tensor:
    """Return the gates as numbers (float32, exactly 0 or 1) whose gradient is that of sigmoid(logits)."""
    soft = torch.sigmoid(logits)
    return gates.float() + (soft - soft.detach())


def _open(gate: Tensor, skippable: Tensor | None) -> Tensor:
    if skippable is None:
        return gate[:, None, None]
    return (gate[:, None] | ~skippable)[:, :, None]


class _Blend(torch.autograd.Function):
    """Exact selection forward (p + (ran - p) would round in bfloat16), the blend's gradient backward."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, ran: Tensor, gate: Tensor, soft: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(passed, ran, gate, *(() if mask is None else (mask,)))
        return torch.where(_open(gate, mask), ran, passed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        passed, ran, gate, *rest = ctx.saved_tensors
        mask = rest[0] if rest else None
        is_open = _open(gate, mask)
        zero = grad.new_zeros(())
        gain = ((ran - passed) * grad).sum(dim=2, dtype=torch.float32)
        gain = gain.sum(dim=1) if mask is None else (gain * mask).sum(dim=1)
        return torch.where(is_open, zero, grad), torch.where(is_open, grad, zero), None, gain, None


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Keep only `rows` of every tensor in `value` whose leading dimension is the batch."""
    if isinstance(value, Tensor):
        return value[rows] if batch > 1 and value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(item, rows, batch) for item in value)
    if isinstance(value, dict):
        return {key: _rows(item, rows, batch) for key, item in value.items()}
    return value
