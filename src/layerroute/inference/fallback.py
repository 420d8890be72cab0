"""Fallback: a token after which the routed model is unsure is run again by every block.

What a closed block costs lies in few tokens, most of them values of arguments, and the scores after them tell: no
token stands out. So where the likeliest one has less than a given probability, the token just run is taken back, the
blocks it passed by get the keys and values they lack, and it is run once more under the open route. The step's route
stands for the tokens that follow. A large model stands in for a small one so in BiLD (arXiv 2302.07863, the fallback
policy); here both are one model with one cache.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from layerroute.inference.forward import Decoder
from layerroute.inference.requests import Row


class _Opened:
    """A row under the open route, as a decoder sees a row."""

    def __init__(self, row: Row) -> None:
        self.route, self.cache = (True,) * len(row.route), row.cache


def unsure(rows: Sequence[Row], scores: Tensor, fallback: float) -> list[int]:
    """Return which rows have closed gates, and in their `scores` (rows, vocab) no token of probability `fallback`."""
    skipping = [number for number, row in enumerate(rows) if not all(row.route)]
    if not skipping:
        return []
    likeliest = scores[skipping].float().softmax(-1).amax(-1).tolist()
    return [number for number, probability in zip(skipping, likeliest, strict=True) if probability < fallback]


def run_again(decoder: Decoder, rows: Sequence[Row], ids: Sequence[int]) -> Tensor:
    """Take back the last token of each row, one of `ids`, and return its scores (rows, vocab) under the open route.

    Effects: the rows' caches hold the token as every block ran it, and their routes go on. Plans made before are void.
    """
    opened = [cast(Row, _Opened(row)) for row in rows]
    for row in rows:
        row.cache.retract(1)
        row.cache.begin_response((True,) * len(row.route), 0, last=False)
    scores = decoder.decode(decoder.plan(opened), ids)
    for row in rows:
        row.fallback_tokens += 1
        # The last token of a response is drawn, never run.
        row.cache.begin_response(row.route, row.request.max_new_tokens - len(row.token_ids) - 1, last=False)
    return scores
