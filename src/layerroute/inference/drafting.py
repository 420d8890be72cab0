"""Drafting by look-up: guess the next tokens from a row's own text, and run them in one pass to see which hold.

An agent's tool call repeats names and values of its context. So the tokens that followed the last n-gram before are a
free guess at what follows it now. The guess runs with the token before it, each guessed token as a row of its own at
the next position; since a decoder writes the keys of all rows before any row attends, and owed residuals go by
position, that is the same arithmetic as one token at a time. Tokens are then drawn one by one from the true scores, and
the guess counts only as long as the draws agree with it. So greedy tokens are those without a draft, and so are drawn
ones under the same seed: each token costs one draw from its true distribution either way.
"""

from collections.abc import Sequence
from typing import Any, cast

from layerroute.inference.cache import Cache
from layerroute.inference.native import ROWS
from layerroute.inference.requests import Row

GRAMS = (3, 2)
"""Lengths of n-gram looked up, the longest first."""


class Lookup:
    """Where each n-gram of a row's tokens was last seen, and what followed it there."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append `tokens` to what is looked up."""
        for token in tokens:
            end = len(self._tokens)
            for size in GRAMS:
                if end >= size:
                    self._after[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def guess(self, most: int) -> list[int]:
        """Return up to `most` tokens that may follow: none if no n-gram at the end was seen before."""
        for size in GRAMS:
            at = self._after.get(tuple(self._tokens[-size:]), 0)
            if at:
                seen = list(self._tokens[at : at + most])
                # Where the guess reaches the present, the text repeats itself: so does the guess.
                period = len(self._tokens) - at
                while len(seen) < most:
                    seen.append(seen[len(seen) - period])
                return seen
        return []


class _Ahead:
    """A cache as it will be `tokens` later; all else is the cache itself."""

    def __init__(self, cache: Cache, tokens: int) -> None:
        self._cache, self._tokens = cache, tokens

    @property
    def length(self) -> int:
        return self._cache.length + self._tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Place:
    """A token of a row, as a decoder sees a row."""

    def __init__(self, row: Row, ahead: int) -> None:
        self.route, self.cache = row.route, _Ahead(row.cache, ahead)


def places(rows: Sequence[Row], guesses: Sequence[Sequence[int]]) -> list[Row]:
    """Return what a decoder is to run: every row's last token, each followed by the row's guessed tokens."""
    made: list[Row] = []
    for row, guess in zip(rows, guesses, strict=True):
        made += [row, *(cast(Row, _Place(row, ahead)) for ahead in range(1, len(guess) + 1))]
    return made


def guesses(rows: Sequence[Row]) -> list[list[int]]:
    """Return each row's guess, empty if it asks for none or nothing in its text repeats.

    Effects: brings the rows' look-ups up to date.
    """
    asking = [row for row in rows if row.request.draft]
    if not asking:
        return [[] for _ in rows]
    share = max(ROWS - len(rows), 0) // len(asking)
    return [_guess(row, share) if row.request.draft else [] for row in rows]


def _guess(row: Row, share: int) -> list[int]:
    prompt = row.request.prompt_ids
    row.lookup = row.lookup or Lookup()
    known = len(row.lookup)
    row.lookup.extend([*prompt[known:], *row.token_ids[max(known - len(prompt), 0) :]])
    # The last token of a response is drawn, never run.
    left = row.request.max_new_tokens - len(row.token_ids) - 1
    return row.lookup.guess(max(min(row.request.draft, left, share), 0))


def replay(context: Sequence[int], response: Sequence[int], draft: int) -> int:
    """Return how many passes a known `response` takes with a `draft`, its first token given by the prefill."""
    lookup, done, passes = Lookup(), 1, 0
    lookup.extend([*context, *response[:1]])
    while done < len(response):
        guess = lookup.guess(min(draft, len(response) - done - 1))
        held = next((n for n, token in enumerate(guess) if token != response[done + n]), len(guess))
        lookup.extend(response[done : done + held + 1])
        done, passes = done + held + 1, passes + 1
    return passes
