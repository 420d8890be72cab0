"""What all routes of a batch have in common: the columns that no gate skips, which run once for all of them."""

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from layerroute.models.attaching import RoutedModel, RoutedOutput
from layerroute.models.families import changing_rope
from layerroute.routing.route import Route
from layerroute.routing.routed import RoutePass
from layerroute.routing.router import read_and_skipped


class SharedPrefix:
    """A batch of right-padded steps whose first columns have run; passes under given gates go on from there.

    Under scope `step` a closed gate skips every token, so nothing is shared and each pass runs the whole batch; so it
    does where the rotary embedding changes with the length.
    """

    @torch.no_grad()
    def __init__(self, routed: RoutedModel, input_ids: Tensor, context_mask: Tensor, response_mask: Tensor) -> None:
        """Run the columns before the first token that a closed gate skips in any row, with every gate open.

        Args:
            routed: the model. What is kept holds as long as nothing in it changes.
            input_ids: (batch, seq) int64.
            context_mask: (batch, seq) bool, true on context tokens.
            response_mask: (batch, seq) bool, true on response tokens.
        """
        _, skippable = read_and_skipped(context_mask, response_mask, routed.config.router.scope)
        width, start = input_ids.shape[1], 0
        if skippable is not None and changing_rope(routed.base.config) is None:
            start = min([width - 1, *skippable.any(dim=0).nonzero().flatten().tolist()])
        self.routed, self.start = routed, start
        self._rest, self._response = input_ids[:, start:], response_mask[:, start:]
        self._skippable = None if skippable is None else skippable[:, start:]
        self._cache = DynamicCache()
        self._nll: Tensor | float = 0.0  # of what the shared columns predict
        self._tokens = response_mask[:, 1:].sum(dim=1)
        if start:
            opened = RoutePass(None, Route.open(len(routed.blocks)).tensor()[None].to(routed.device))
            hidden = routed.residuals(input_ids[:, :start], opened, self._cache)
            self._nll = routed.losses(hidden, input_ids, response_mask)
            # Or, with torch 2.10 and older, weights that autocast rounded here would have no gradient in a later pass.
            torch.clear_autocast_cache()

    def run(self, gates: Tensor, **options: Any) -> tuple[RoutedOutput, RoutePass]:
        """Score the responses under `gates` (batch or 1, blocks) bool, and return the pass too.

        Gradients stop at the shared columns. Residuals, given (`entry`) and kept, are those of the columns after them.

        Args:
            gates: True runs the block.
            options: further fields of RoutePass.
        """
        route_pass = RoutePass(None, gates, self._skippable, **options)
        out = self.routed.run(self._rest, self._response, route_pass, _fork(self._cache))
        return out._replace(nll=out.nll + self._nll, tokens=self._tokens), route_pass


def _fork(cache: DynamicCache) -> DynamicCache:
    """Return a cache that grows by itself: a layer that grows makes new tensors and leaves the old as they are."""
    forked = copy(cache)
    forked.layers = [copy(layer) for layer in cache.layers]
    return forked
