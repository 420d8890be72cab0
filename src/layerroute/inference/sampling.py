"""From next-token scores to a token: pure functions of one row's scores (vocab,)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerroute.errors import LayerRouteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. The default is greedy.

    `temperature` 0 takes the likeliest token. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    `seed` makes the draw repeatable. `logprobs` n reports each token's log-probability and the n likeliest.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**64, "a number of at most 64 bits"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
        }
        for name, (holds, wanted) in bounds.items():
            if not holds:
                raise LayerRouteError(f"{name}: {getattr(self, name)!r} is not allowed; give {wanted}.")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.logprobs is None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities under the model's own distribution, before temperature and cuts."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def penalise(scores: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Return scores with every token of `seen` made less likely: divided if positive, multiplied if negative."""
    if penalty == 1 or not seen:
        return scores
    index = torch.tensor(sorted(set(seen)), device=scores.device)
    picked = scores[index]
    return scores.index_put((index,), torch.where(picked > 0, picked / penalty, picked * penalty))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Return scores with all but the `k` best at -inf (ties of the k-th stay); 0 keeps all."""
    if k == 0 or k >= scores.numel():
        return scores
    return scores.masked_fill(scores < torch.topk(scores, k).values[-1], float("-inf"))


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Return scores with only the smallest set of best tokens whose probability reaches `p`; at least one."""
    if p >= 1:
        return scores
    ordered, index = torch.sort(scores, descending=True)
    shares = torch.softmax(ordered, dim=-1)
    drop = shares.cumsum(-1) - shares >= p
    return scores.index_put((index[drop],), torch.tensor(float("-inf"), dtype=scores.dtype, device=scores.device))


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Return scores with every token at -inf that is less likely than `p` times the likeliest."""
    if p == 0:
        return scores
    shares = torch.softmax(scores, dim=-1)
    return scores.masked_fill(shares < p * shares.max(), float("-inf"))


def warp(scores: Tensor, sampling: Sampling) -> Tensor:
    """Return scores after temperature, top-k, top-p and min-p, in that order. Temperature must be above 0."""
    # From the best score down: a temperature near 0 makes others -inf, and none inf. Below float32's least it were 0.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    scores = keep_top_k((scores - scores.max()) / temperature, sampling.top_k)
    return keep_min_p(keep_top_p(scores, sampling.top_p), sampling.min_p)


def draw(
    scores: Tensor, sampling: Sampling, seen: Sequence[int], generator: torch.Generator | None
) -> tuple[int, TokenLogprobs | None]:
    """Choose the next token from raw `scores` (vocab,) given all earlier tokens `seen`.

    Effects: advances `generator` when temperature is above 0.
    """
    shaped = penalise(scores, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = int(shaped.argmax())
    else:
        shares = torch.softmax(warp(shaped, sampling), dim=-1)
        token = int(torch.multinomial(shares, 1, generator=generator))
    return token, None if sampling.logprobs is None else logprobs(scores, token, sampling.logprobs)


def logprobs(scores: Tensor, token: int, count: int) -> TokenLogprobs:
    """Return the log-probability of `token` and of the `count` likeliest tokens under raw `scores` (vocab,)."""
    all_logs = torch.log_softmax(scores, dim=-1)
    values, index = torch.topk(all_logs, min(count, scores.numel()))
    top = tuple(zip(index.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(all_logs[token]), top)


def generator_for(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """Return the request's own generator, or None when nothing is drawn."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator(device=device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator
