"""EleutherAI's lm-evaluation-harness on a routed model, as the model `layerroute`.

The harness finds a model once its module is imported, so this module is also its command line:

    python -m layerroute.integrations.lm_eval --model layerroute --model_args adapter=runs/mine/adapter \\
        --tasks gsm8k --include_path my_tasks

Model arguments: `adapter`; `model` (another backbone), `dtype`, `max_length`, `max_gen_toks`, `batch_tokens`, `routes`:
`routed` or `open` (every block runs, for comparison), and `fallback` (the engine's, so for texts alone).
"""

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from layerroute.data.rendering import Renderer
from layerroute.errors import ConfigError, LayerRouteError, near
from layerroute.inference.loading import load_engine
from layerroute.inference.sampling import Sampling
from layerroute.integrations.routed_text import Ids, Wanted, generate_until, likelihoods, windows
from layerroute.models.adapter import load_adapter
from layerroute.models.loading import Backbone, load_backbone

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    lacking = f"the harness needs more than the core: pip install 'layerroute[lm-eval]' ({error})."
    if __name__ == "__main__":
        sys.exit(f"error: {lacking}")
    raise LayerRouteError(lacking) from error

CHUNK = 32  # texts generated between two moves of the progress bar
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed")


@register_model("layerroute")
class LayerRouteLM(TemplateLM):  # type: ignore[misc]
    """A routed model as the harness sees it: text in; log-likelihoods and text out."""

    def __init__(
        self,
        adapter: str,
        model: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_tokens: int = 4096,
        routes: str = "routed",
        fallback: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if routes not in ("routed", "open"):
            raise ConfigError(f"routes: {routes!r} is unknown.{near(routes, ('routed', 'open'))}")
        if unknown := set(options) - {"batch_size", "max_batch_size", "device"}:  # the harness always gives these
            name = min(unknown)
            raise ConfigError(
                f"model_args: unknown {name!r}.{near(name, ('adapter', 'model', 'dtype', 'routes', 'fallback'))}"
            )
        self.adapter, self.model_name, self.dtype = adapter, model, str(dtype)
        self.opened, self.fallback = routes == "open", float(fallback)
        self.max_gen_toks, self.batch_tokens, self._max_length = int(max_gen_toks), int(batch_tokens), max_length
        asked = str(options.get("device") or "cuda")  # the harness names cuda:0 on machines without one
        self._where = asked if torch.cuda.is_available() or not asked.startswith("cuda") else "cpu"

    @cached_property
    def routed(self) -> Any:
        """The routed model, which scores."""
        backbone = load_backbone(self.model_name, dtype=self.dtype, device=self._where) if self.model_name else None
        return _as_trained(*load_adapter(self.adapter, backbone, dtype=self.dtype, device=self._where))

    @cached_property
    def engine(self) -> Any:
        """The engine, which generates."""
        loaded = load_engine(
            self.adapter, model=self.model_name, dtype=self.dtype, device=self._where, fallback=self.fallback
        )
        return _as_trained(*loaded)

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer."""
        loaded = "engine" if "engine" in self.__dict__ else "routed"
        return getattr(self, loaded)[1].tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Name the tokenizer for the harness's cache of rendered prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has none: the beginning-of-text token where there is one."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Most tokens of context and continuation together."""
        if self._max_length is not None:
            return int(self._max_length)
        if "engine" in self.__dict__:
            return int(self.engine[0].weights.shape.positions)
        return int(self.routed[0].base.config.max_position_embeddings)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, begun as the tokenizer begins one unless told not to or it has begun."""
        begin = self.tokenizer.bos_token
        own = begin is None or not string.startswith(begin)
        ids: list[int] = self.tokenizer(string, add_special_tokens=own and add_special_tokens is not False)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat as training did."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        scored = self._likelihoods([(context, continuation) for _, context, continuation in requests])
        found = [(each.logprob, each.greedy) for each in scored]
        for (asked, _, _), pair in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, pair)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each token scored once."""
        cuts = [
            windows(self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id, self.max_length)
            for request in requests
        ]
        scored = iter(self._likelihoods([pair for pairs in cuts for pair in pairs]))
        totals = [sum(next(scored).logprob for _ in pairs) for pairs in cuts]
        for text, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", text.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the engine says to each context, up to the first stop string."""
        from tqdm.auto import tqdm

        engine, backbone = self.engine
        said, skipped = [], 0.0
        with tqdm(total=len(requests), desc="layerroute generates", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), CHUNK):
                chunk = requests[start : start + CHUNK]
                wanted = [self._wanted(*request.args) for request in chunk]
                for request, one in zip(
                    chunk, generate_until(engine, wanted, backbone.tokenizer, opened=self.opened), strict=True
                ):
                    said.append(one.text)
                    skipped += one.skip_rate
                    self.cache_hook.add_partial("generate_until", request.args, one.text)
                bar.update(len(chunk))
        _tell("generated", len(requests), skipped)
        return said

    def _likelihoods(self, pairs: list[tuple[Ids, Ids]]) -> list[Any]:
        found = likelihoods(
            self.routed[0], pairs, max_length=self.max_length, batch_tokens=self.batch_tokens, opened=self.opened
        )
        _tell("scored", len(found), sum(each.skip_rate for each in found))
        return found

    def _wanted(self, context: str, options: dict[str, Any]) -> Wanted:
        if unknown := set(options) - set(KNOWN):
            raise ConfigError(f"generation_kwargs: {min(unknown)!r} is not supported.{near(min(unknown), KNOWN)}")
        until = options.get("until") or []
        most = int(options.get("max_gen_toks") or self.max_gen_toks)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        drawn = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        sampling = Sampling()
        if drawn:
            asked = options.get("temperature")
            temperature = 1.0 if asked is None else float(asked)
            top_p, top_k = float(options.get("top_p") or 1.0), int(options.get("top_k") or 0)
            sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=options.get("seed"))
        room = self.max_length - most
        if room < 1:
            raise ConfigError(f"max_gen_toks: {most} leave no room for a context within {self.max_length} tokens.")
        return Wanted(ids[-room:], most, tuple([until] if isinstance(until, str) else until), sampling)


def _as_trained(loaded: Any, backbone: Backbone) -> tuple[Any, Backbone]:
    """Give the backbone's tokenizer the template that training rendered with, and return both."""
    backbone.tokenizer.chat_template = Renderer(backbone.tokenizer).chat_template
    return loaded, backbone


def _tell(what: str, count: int, skipped: float) -> None:
    if count:
        print(f"layerroute: {what} {count}, {100 * skipped / count:.1f} % of blocks skipped", file=sys.stderr)


def main() -> None:
    """Run the harness's own command with the model `layerroute` known to it."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LayerRouteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    # Under `-m` this module is `__main__`; importing it under its own name as well would register the model twice.
    main()
