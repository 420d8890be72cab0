"""`layerroute generate`: text on the outside, token ids inside."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerroute.config import Precision
from layerroute.data.conversation import Conversation, Message, parse_tools
from layerroute.data.rendering import parse_tool_calls, response_text, stop_ids
from layerroute.data.steps import prompt_ids
from layerroute.errors import ConfigError, DataError
from layerroute.inference.engine import Engine
from layerroute.inference.loading import load_engine
from layerroute.inference.requests import Request, Result
from layerroute.inference.sampling import Sampling
from layerroute.machine import default_device
from layerroute.routing.route import Route


@dataclass(frozen=True, slots=True)
class Question:
    """What `generate` was asked."""

    prompt: str
    system: str | None
    tools: Path | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    skip: str | None
    draft: int = 0
    fallback: float = 0.0


def read_tools(path: Path | None) -> tuple[dict[str, Any], ...]:
    """Read a JSON file of OpenAI function specs."""
    if path is None:
        return ()
    try:
        tools = parse_tools(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"{path}: can't be read ({reason}).") from error
    try:
        json.dumps(tools, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise DataError(f"{path}: a lone surrogate, or a number out of range ({error}). Remove it.") from error
    return tools


def context_of(prompt: str, system: str | None, tools: Path | None) -> Conversation:
    """Return the conversation that ends with the user's `prompt`.

    Raises:
        ConfigError: a text that is not UTF-8.
        DataError: `tools` can't be read.
    """
    for flag, text in (("--prompt", prompt), ("--system", system or "")):
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python reads other bytes
            raise ConfigError(f"{flag}: not UTF-8 text. Give it in UTF-8.")
    first = (Message("system", system),) if system else ()
    return Conversation("prompt", (*first, Message("user", prompt)), read_tools(tools))


def read_route(skip: str | None, count: int) -> Route | None:
    """Read `--skip`: blocks to skip, 'none' for all open, None for the routers' own decision."""
    if skip is None:
        return None
    try:
        blocks = [] if skip.strip().lower() == "none" else [int(part) for part in skip.split(",")]
        return Route.skipping(blocks, count)
    except ValueError as error:
        raise ConfigError(f"--skip: {skip!r} is no list of blocks ({error}). Example: --skip 3,7,11") from error


def answer(adapter: str, question: Question, *, model: str | None, precision: Precision, as_json: bool) -> None:
    """Load, generate, stream the text to stdout and the route to stderr (or one JSON document to stdout)."""
    if question.temperature == 0 and (question.top_p != 1 or question.seed is not None):
        raise ConfigError("--top-p and --seed are for drawing tokens; give --temperature above 0 as well.")
    if question.draft and question.fallback:
        raise ConfigError("--fallback looks at tokens one by one; leave --draft or --fallback out.")
    context = context_of(question.prompt, question.system, question.tools)
    where = default_device()
    engine, backbone = load_engine(adapter, model=model, precision=precision, device=where, fallback=question.fallback)
    tokenizer = backbone.tokenizer
    if engine.decoder == "torch":
        print(f"decoding by torch, which is slower: {engine.decoder_note}", file=sys.stderr)
    route = read_route(question.skip, engine.weights.shape.blocks)
    request = Request(
        prompt_ids=prompt_ids(context, tokenizer),
        max_new_tokens=question.max_tokens,
        stop_ids=stop_ids(tokenizer),
        sampling=Sampling(temperature=question.temperature, top_p=question.top_p, seed=question.seed),
        route=route.gates if route else None,
        draft=question.draft,
    )
    result = _run(engine, request, tokenizer, show=not as_json)
    if as_json:
        print(json.dumps(_document(response_text(result.token_ids, tokenizer), result), indent=2))
    else:
        print(_saved(result), file=sys.stderr)


def _run(engine: Engine, request: Request, tokenizer: Any, *, show: bool) -> Result:
    stream = engine.stream(request)
    ids: list[int] = []
    written = ""
    for token in stream:
        ids.append(token)
        if show and not (text := response_text(ids, tokenizer)).endswith("\ufffd"):  # half of a character so far
            print(text[len(written) :], end="", flush=True)
            written = text
    if show:
        print(response_text(ids, tokenizer)[len(written) :])
    return stream.result


def _document(text: str, result: Result) -> dict[str, Any]:
    said, calls = parse_tool_calls(text)
    route = Route(tuple(result.route))
    return {
        "text": text,
        "content": said,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in calls],
        "finish_reason": result.finish_reason,
        "route": {"gates": [int(g) for g in route.gates], "skipped": list(route.skipped), "skip_rate": route.skip_rate},
        "usage": {"prompt_tokens": result.prompt_tokens, "completion_tokens": len(result.token_ids)},
        "draft": {"drafted_tokens": result.drafted_tokens, "kept_tokens": result.kept_tokens},
        "fallback_tokens": result.fallback_tokens,
        "seconds": {"prefill": result.prefill_seconds, "decode": result.decode_seconds},
    }


def _saved(result: Result) -> str:
    route = Route(tuple(result.route))
    tokens = max(len(result.token_ids) - 1, 1)
    speed = tokens / result.decode_seconds if result.decode_seconds else 0.0
    skipped = f"skipped {len(route.skipped)} of {len(route.gates)} blocks ({100 * route.skip_rate:.1f} %)"
    prefill = f"{result.prompt_tokens} context tokens in {result.prefill_seconds:.2f} s"
    drafted = f"\n{result.kept_tokens} of {result.drafted_tokens} drafted tokens held" if result.drafted_tokens else ""
    again = f"\n{result.fallback_tokens} tokens run again by every block" if result.fallback_tokens else ""
    return f"\nroute {route}  {skipped}\n{prefill}, {len(result.token_ids)} tokens at {speed:.1f}/s{drafted}{again}"
