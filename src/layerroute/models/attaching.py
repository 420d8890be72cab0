"""Put routers, bypasses and LoRA around the blocks of a Hugging Face causal LM."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerroute.config import AdapterConfig
from layerroute.errors import ConfigError, ModelError
from layerroute.models.families import Family, Head, family_of
from layerroute.models.nll import head_logits, response_nll
from layerroute.routing.bypass import Bypass
from layerroute.routing.route import Route
from layerroute.routing.routed import RoutedBlock, RoutePass, Tape
from layerroute.routing.router import Pool, Router, initial_bias, read_and_skipped


class RoutedOutput(NamedTuple):
    """What one forward pass over a batch of steps gives back."""

    nll: Tensor  # (batch,) float32: summed negative log-likelihood of the response tokens, nats
    tokens: Tensor  # (batch,) int64: response tokens summed over
    gates: Tensor  # (batch, blocks) bool: True ran, False was skipped
    logits: Tensor  # (batch, blocks) float32: the routers' run logits; empty where gates were forced


class RoutedModel(nn.Module):
    """A frozen causal LM with a router before each block and LoRA inside; `attach` makes one."""

    def __init__(self, inner: Any, config: AdapterConfig, family: Family, tape: Tape) -> None:
        super().__init__()
        self.inner = inner
        self.config, self.family = config, family
        self._tape = tape

    @property
    def base(self) -> Any:
        """The transformers causal LM, its blocks wrapped."""
        return self.inner.get_base_model() if hasattr(self.inner, "get_base_model") else self.inner

    @property
    def blocks(self) -> list[RoutedBlock]:
        """The routed blocks, in the order they run."""
        return [block for block in self.family.blocks_of(self.base) if isinstance(block, RoutedBlock)]

    @property
    def routers(self) -> list[Router]:
        """One router a block."""
        return [block.router for block in self.blocks]

    @property
    def bypasses(self) -> dict[int, Bypass]:
        """The bypasses that change anything, by block."""
        found = ((block.index, block.bypass) for block in self.blocks)
        return {index: bypass for index, bypass in found if bypass is not None and not bypass.is_idle}

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        device: torch.device = next(self.base.parameters()).device
        return device

    def residuals(self, input_ids: Tensor, route_pass: RoutePass, cache: Any = None) -> Tensor:
        """Run the decoder under `route_pass`, which records the gates; (batch, seq, dim) after the final norm.

        Rows are right-padded. No mask is needed: causal attention keeps pads from every earlier token.

        Args:
            input_ids: (batch, seq) int64.
            route_pass: which gates are open.
            cache: a transformers cache of the columns before, which grows by these (`SharedPrefix`).
        """
        with self._tape.playing(route_pass):
            decoder = self.family.decoder_of(self.base)
            out: Tensor = decoder(
                input_ids=input_ids, past_key_values=cache, use_cache=cache is not None
            ).last_hidden_state
        return out

    def begin(
        self,
        context_mask: Tensor,
        response_mask: Tensor | None,
        *,
        forced: Tensor | Route | None = None,
        score: bool = False,
        **options: Any,
    ) -> RoutePass:
        """Return a pass for a batch of steps: routers decide, unless `forced` gives the gates.

        Args:
            context_mask: (batch, seq) bool, true on context tokens.
            response_mask: (batch, seq) bool, true on response tokens; scope `step` does without.
            forced: a route, or gates (batch or 1, blocks) bool.
            score: score the routers also where gates are forced.
            options: further fields of RoutePass.

        Raises:
            ValueError: there is no response, and the scope asks for it.
        """
        if isinstance(forced, Route):
            forced = forced.tensor()[None].to(self.device)
        scored = score or forced is None
        read, skippable = read_and_skipped(context_mask, response_mask, self.config.router.scope)
        pool = Pool.over(read, self.config.router) if scored else None
        return RoutePass(pool, forced, skippable, **options)

    def forward(
        self,
        input_ids: Tensor,
        context_mask: Tensor,
        response_mask: Tensor,
        forced: Tensor | Route | None = None,
        **options: Any,
    ) -> RoutedOutput:
        """Score the responses of a batch of right-padded steps, each under its own route.

        Args:
            input_ids: (batch, seq) int64.
            context_mask: (batch, seq) bool, true on context tokens.
            response_mask: (batch, seq) bool, true on response tokens; the LM head runs on these only.
            forced: gates to use instead of the routers' (`begin`).
            options: further options of `begin`.
        """
        route_pass = self.begin(context_mask, response_mask, forced=forced, **options)
        return self.run(input_ids, response_mask, route_pass)

    def run(self, input_ids: Tensor, response_mask: Tensor, route_pass: RoutePass, cache: Any = None) -> RoutedOutput:
        """Score the responses of a batch under `route_pass` (from `begin`), which keeps what it was asked to.

        With a `cache` the ids, masks and what the pass knows are those of the columns after the cached ones.
        """
        nll = self.losses(self.residuals(input_ids, route_pass, cache), input_ids, response_mask)
        gates, logits = stacked(route_pass)
        return RoutedOutput(nll, response_mask[:, 1:].sum(dim=1), gates, logits)

    def losses(self, hidden: Tensor, input_ids: Tensor, response_mask: Tensor) -> Tensor:
        """Return the summed loss (batch,) of the response tokens that `hidden` predicts, nats.

        Args:
            hidden: (batch, columns, dim) after the final norm, the first columns of the batch or all.
            input_ids: (batch, seq) int64.
            response_mask: (batch, seq) bool.
        """
        # The token before predicts the response token.
        row, column = response_mask[:, 1 : hidden.shape[1] + 1].nonzero(as_tuple=True)
        nll = response_nll(hidden[row, column], input_ids[row, column + 1], Head.of(self.base))
        return nll.new_zeros(len(input_ids)).index_add(0, row, nll)

    def token_logits(
        self,
        input_ids: Tensor,
        context_mask: Tensor,
        response_mask: Tensor | None = None,
        forced: Tensor | Route | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return all logits (batch, seq, vocab) float32 and the gates (batch, blocks); for tests and inspection."""
        route_pass = self.begin(context_mask, response_mask, forced=forced)
        hidden = self.residuals(input_ids, route_pass)
        return head_logits(hidden, Head.of(self.base)), stacked(route_pass)[0]

    def likeliest_next(self, input_ids: Tensor) -> Tensor:
        """Return the token (batch, 1) int64 that is likeliest after `input_ids` (batch, seq) with every gate open."""
        context = torch.ones_like(input_ids, dtype=torch.bool)
        route_pass = self.begin(context, ~context, forced=Route.open(len(self.blocks)))
        hidden = self.residuals(input_ids, route_pass)[:, -1:]
        return head_logits(hidden, Head.of(self.base)).argmax(dim=-1)

    @contextmanager
    def pinned(self, route: Route) -> Iterator[Any]:
        """Yield the transformers model with every token on `route`, whatever the scope, e.g. for `generate`.

        Don't skip block 0 with a transformers cache: it counts its tokens there. The engine has no such limit.
        """
        forced = route.tensor()[None].to(self.device)
        with self._tape.playing(RoutePass(None, forced)):
            yield self.base

    def precision(self) -> torch.autocast:
        """Return the context in which LoRA (float32) computes in bfloat16 when the backbone does, as in training.

        Routers and the loss stay in float32 whatever the context. Rounded weights are not kept for later passes: what
        settling fits between two of them would not take effect until the context ends (lab notes, 2026-11-27).
        """
        enabled = next(self.base.parameters()).dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)

    def recompute(self) -> None:
        """Keep no activations of the blocks in training: the backward pass computes them again."""
        if hasattr(self.base, "activation_checkpointing_enable"):
            self.base.activation_checkpointing_enable()
        else:  # its name in transformers 5.19, which vLLM 0.32 asks for
            self.base.gradient_checkpointing_enable()

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """Turn the LoRA part off until the block ends: with all gates open this is the untouched backbone."""
        disable = getattr(self.inner, "disable_adapter", None)
        with disable() if disable else nullcontext():
            yield


def stacked(route_pass: RoutePass) -> tuple[Tensor, Tensor]:
    """Return gates (batch, blocks) bool and logits (batch, blocks) float32 of a finished pass."""
    gates = torch.stack([route_pass.gates[b] for b in sorted(route_pass.gates)], dim=1)
    if not route_pass.logits:
        return gates, gates.new_zeros((len(gates), 0), dtype=torch.float32)
    return gates, torch.stack([route_pass.logits[b] for b in sorted(route_pass.logits)], dim=1)


def attach(model: Any, config: AdapterConfig | None = None) -> RoutedModel:
    """Freeze `model` and give it routers, bypasses and LoRA, in place.

    Its logits are unchanged until training changes them. With `router.init: paper` the paper's blocks 8..16 start
    closed, so there the logits do change.

    Args:
        model: a transformers causal LM of a supported family, also on the meta device.
        config: what to attach; the default is the paper's shape with our router input.

    Raises:
        ModelError: the family is not supported, or the model is routed already.
        ConfigError: `router.always_run` names a block that does not exist, or bypasses are wider than the model.
    """
    config = config or AdapterConfig()
    family = family_of(model.config)
    blocks = family.blocks_of(model)
    count = len(blocks)
    if any(isinstance(block, RoutedBlock) for block in blocks):
        raise ModelError("this model is routed already. Load its backbone again to attach to that.")
    if outside := [b for b in config.router.always_run if b >= count]:
        raise ConfigError(
            f"router.always_run: block {outside[0]} does not exist; this model has blocks 0..{count - 1}."
        )
    if config.bypass.rank > model.config.hidden_size:
        raise ConfigError(
            f"bypass.rank: {config.bypass.rank} is more than the width of this model. Give at most "
            f"{model.config.hidden_size}."
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    inner = _with_lora(model, config, family)
    blocks, tape = family.blocks_of(model), Tape()
    for index, block in enumerate(blocks):
        weight = next(block.parameters())
        with torch.device(weight.device):
            router = Router(model.config.hidden_size)
            bypass = Bypass(model.config.hidden_size, config.bypass.rank) if config.bypass.rank else None
        router.reset(bias=initial_bias(index, config.router))
        blocks[index] = RoutedBlock(block, router, tape, index, config.router, bypass, family.norm)
    return RoutedModel(inner, config, family, tape)


def peft_config(config: AdapterConfig, family: Family) -> Any:
    """Return the PEFT configuration of the LoRA part."""
    from peft import LoraConfig, TaskType

    lora = config.lora
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(family.attention + (family.mlp if lora.targets == "all" else ())),
    )


def _with_lora(model: Any, config: AdapterConfig, family: Family) -> Any:
    if not config.lora.rank:
        return model
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft asks transformers for a name that transformers 5 renames.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return get_peft_model(model, peft_config(config, family))
