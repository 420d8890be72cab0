"""Negative log-likelihood of response tokens without ever holding their full logits."""

from typing import Any

import torch
from torch import Tensor

from layerroute.models.families import Head

CHUNK = 512  # tokens whose logits live at once: 512 x 49,152 float32 = 100 MB on SmolLM2


def response_nll(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return -log p(target) in nats for each token, (tokens,) float32.

    Args:
        hidden: last residuals after the final norm, (tokens, dim).
        targets: the token that follows each, (tokens,) int64.
        head: the frozen LM head.
    """
    nll: Tensor = _ResponseNll.apply(hidden, targets, head)  # type: ignore[no-untyped-call]
    return nll


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return logits (..., vocab) float32 for `hidden` (..., dim)."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


class _ResponseNll(torch.autograd.Function):
    """The head is frozen, so the gradient towards `hidden` is known in the forward pass:
    (softmax - one_hot) @ weight. Computing it there, chunk by chunk, saves a second pass through the head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(targets), CHUNK):
            piece = slice(start, start + CHUNK)
            logits, target = head_logits(hidden[piece], head), targets[piece, None]
            log_total = logits.logsumexp(dim=1)
            nll[piece] = log_total - logits.gather(1, target).squeeze(1)
            if slope is None:
                continue
            error = torch.exp(logits - log_total[:, None])
            error.scatter_add_(1, target, error.new_full(target.shape, -1.0))
            if head.softcap is not None:
                error *= 1 - (logits / head.softcap).square()
            slope[piece] = error.to(hidden.dtype) @ head.weight
        if slope is not None:
            ctx.save_for_backward(slope)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0][:, None].to(slope.dtype), None, None
