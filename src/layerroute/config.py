"""Every option LayerRoute has, declared once: CLI flags, YAML keys and the docs table are read from here."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from layerroute.errors import ConfigError, near

Kind = Literal["tool_call", "planning"]
Precision = Literal["fp32", "bf16", "int8", "int4"]  # what the engine computes in
Scope = Literal["step", "response", "continuation"]  # what a closed gate skips
Dtype = Literal["auto", "bfloat16", "float32"]  # what a backbone is held in outside the engine
KINDS: tuple[Kind, ...] = ("tool_call", "planning")
BATCH_TOKENS = 2048  # of a batch that is only measured, pads counted

C = TypeVar("C")


def dtype_of(precision: Precision) -> Literal["bfloat16", "float32"]:
    """Return what a backbone is held in for an engine that computes in `precision`."""
    return "float32" if precision == "fp32" else "bfloat16"


def option(default: Any, help: str) -> Any:
    """Declare one field: its default and the one sentence that documents it everywhere."""
    return field(default=default, metadata={"help": help})


def part(kind: type[C], help: str) -> C:
    """Declare a nested group of options."""
    return field(default_factory=kind, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """What a router sees and how its score becomes a gate."""

    scope: Scope = option(
        "step",
        "What a closed gate skips: the whole step; only the response (the context then runs every block); or only what "
        "follows the response's first token, which then runs every block too and is what routers read.",
    )
    pooling: Literal["last", "mean"] = option(
        "last", "Average the last `window` context tokens, or the whole context (the paper)."
    )
    window: int = option(4, "How many tokens `pooling: last` averages; scope `continuation` has one alone.")
    skip_first: bool = option(True, "Leave token 0 out of the pool: it carries a massive activation.")
    normalise: bool = option(True, "RMS-normalise each token's residual before pooling.")
    threshold: float = option(0.5, "A block runs when its run probability is above this.")
    always_run: tuple[int, ...] = option((), "Blocks that always run, whatever their router says.")
    init: Literal["open", "paper"] = option(
        "open", "Routers at birth: weight 0 and every gate open, or the paper's biases (+1, blocks 8..16: -1)."
    )

    def __post_init__(self) -> None:
        require(0.0 < self.threshold < 1.0, "router.threshold", self.threshold, "a number between 0 and 1")
        require(self.window >= 1, "router.window", self.window, "at least 1")
        require(all(b >= 0 for b in self.always_run), "router.always_run", self.always_run, "block indices from 0")
        whole = self.pooling == "mean" and not self.reads_context
        require(not whole, "router.pooling", self.pooling, "last: scope `continuation` reads one token")

    @property
    def reads_context(self) -> bool:
        """Whether routers read the context; if not, the first token of the response."""
        return self.scope != "continuation"

    @property
    def skips_context(self) -> bool:
        """Whether a closed gate skips the context as well."""
        return self.scope == "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The low-rank update that lets the blocks that run make up for those that do not."""

    rank: int = option(8, "Rank of the update; 0 attaches routers only.")
    alpha: float = option(16.0, "Scale of the update: the factor applied is alpha / rank.")
    dropout: float = option(0.05, "Dropout on the input of the update, in training only.")
    targets: Literal["attention", "all"] = option(
        "attention", "Which projections carry LoRA: Q/K/V/O (the paper), or the MLP's as well."
    )

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(0.0 <= self.dropout < 1.0, "lora.dropout", self.dropout, "at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class BypassConfig:
    """What stands in for a closed block."""

    rank: int = option(
        0, "Rank of the linear map that stands in for a closed block; with 0 its residual passes untouched (the paper)."
    )

    def __post_init__(self) -> None:
        require(self.rank >= 0, "bypass.rank", self.rank, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """All that is needed to rebuild an adapter around its backbone."""

    router: RouterConfig = part(RouterConfig, "The routers.")
    lora: LoraConfig = part(LoraConfig, "The LoRA part.")
    bypass: BypassConfig = part(BypassConfig, "The bypasses of closed blocks.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """The target skip rate of each kind, and how hard training holds it."""

    tool_call: float = option(0.1, "Share of block FLOPs that tool calls shall skip.")
    planning: float = option(0.03, "Share of block FLOPs that planning shall skip.")
    multiplier_rate: float = option(2.0, "Step size of the multiplier that integrates the violation.")
    quadratic: float = option(50.0, "Weight of the squared violation.")

    def __post_init__(self) -> None:
        for kind in KINDS:
            require(
                0.0 <= self.target(kind) < 1.0,
                f"budget.{kind}",
                self.target(kind),
                "a rate from 0 to below 1",
            )
        for name in ("multiplier_rate", "quadratic"):
            require(getattr(self, name) >= 0, f"budget.{name}", getattr(self, name), "0 or more")

    def target(self, kind: Kind) -> float:
        """Return the target skip rate of `kind`."""
        rate: float = getattr(self, kind)
        return rate


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What a benchmark times, on which steps, and how often."""

    model: str | None = option(None, "Backbone to time; the adapter's own, else smollm2.")
    adapter: str | None = option(None, "Adapter folder: time the routes that its routers decide.")
    precision: Precision = option(
        "bf16",
        "What the engine computes in (without --quick); transformers and vLLM in float32 for fp32, else bfloat16.",
    )
    skip: float = option(0.25, "Share of blocks that evenly spread routes skip when there is no adapter.")
    data: str = option(
        "builtin", "Transcripts whose steps are timed: a file, a folder, hf:owner/name, or `builtin[:[A-]N]`."
    )
    parts: tuple[Literal["rows", "rates", "classes", "drafts", "peers"], ...] = option(
        ("rows", "rates", "classes", "drafts", "peers"), "Parts of the benchmark to run."
    )
    batches: tuple[int, ...] = option((1, 4, 16), "Rows that run together.")
    steps: int = option(16, "Steps of each kind.")
    context: int = option(
        256,
        "Longest context in tokens; steps with longer ones are left out. N rows together have at most 4096 / N each.",
    )
    new_tokens: int = option(32, "Tokens that each row decodes.")
    repeats: int = option(3, "Turns, each running all that is compared (drafts: each step once).")
    draft: int = option(4, "Tokens to guess at most, in the part `drafts`.")
    gguf: str | None = option(None, "GGUF file for llama.cpp, if llama-cpp-python is installed.")
    onnx: str | None = option(None, "Model folder for ONNX Runtime GenAI, if onnxruntime-genai is installed.")
    folder: str | None = option(None, "Hugging Face model folder for vLLM, if vllm is installed.")

    def __post_init__(self) -> None:
        require(0.0 <= self.skip <= 0.9, "skip", self.skip, "0 to 0.9")
        require(bool(self.parts), "parts", self.parts, "at least one")
        require(all(rows >= 1 for rows in self.batches) and bool(self.batches), "batches", self.batches, "1 or more")
        for name in ("steps", "context", "repeats", "draft"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.new_tokens >= 2, "new_tokens", self.new_tokens, "at least 2")


def require(holds: bool, name: str, value: Any, wanted: str) -> None:
    """Raise a ConfigError that names the option unless `holds`."""
    if not holds:
        raise ConfigError(f"{name}: {value!r} is not allowed; give {wanted}.")


def leaves(kind: type, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    """Map each option's dotted name to its (type, default, help), nested groups flattened."""
    hints = get_type_hints(kind)
    found: dict[str, tuple[Any, Any, str]] = {}
    for item in fields(kind):
        name, hint = prefix + item.name, hints[item.name]
        if is_dataclass(hint):
            found |= leaves(hint, f"{name}.")  # type: ignore[arg-type]
        else:
            default = item.default if item.default is not MISSING else None
            found[name] = (hint, default, item.metadata["help"])
    return found


def build(kind: type[C], *layers: Mapping[str, Any]) -> C:
    """Build a `kind` from its defaults and `layers` of {dotted name or nested mapping: value}, later ones winning.

    Raises:
        ConfigError: an unknown option (with the near name) or a value of the wrong type.
    """
    flat: dict[str, Any] = {}
    for layer in layers:
        flat |= checked(kind, layer)
    return _assemble(kind, flat)


def checked(kind: type, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return `layer`, nested or dotted, as {dotted name: value of the option's type}.

    Raises:
        ConfigError: an unknown option (with the near name) or a value of the wrong type.
    """
    known = leaves(kind)
    flat = _flatten(layer, known)
    if unknown := [name for name in flat if name not in known]:
        inside = f"adapter.{unknown[0]}"  # flags leave the group out
        hint = f" Did you mean {inside!r}?" if any(f"{name}.".startswith(f"{inside}.") for name in known) else ""
        raise ConfigError(f"unknown option {unknown[0]!r}.{hint or near(unknown[0], known)}")
    return {name: _coerce(value, known[name][0], name) for name, value in flat.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ConfigError: the file is missing or is no YAML mapping; the message gives the line.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}).") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that is none
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping of options, found {type(document).__name__}.")
    return document


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as plain nested data, ready for JSON or YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in asdict(config).items()}


def _flatten(layer: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    groups = {name[:dot] for name in known for dot, letter in enumerate(name) if letter == "."}
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if name in groups:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}: this is a group of options; give a mapping, not {value!r}.")
            flat |= _flatten(value, known, f"{name}.")
        else:
            flat[name] = value
    return flat


def changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return in words what differs between two nested mappings of options."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [line for key in keys for line in changes(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix[:-1]}: {old!r} then, {new!r} now"]


def _assemble(kind: type[C], flat: Mapping[str, Any]) -> C:
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for item in fields(kind):  # type: ignore[arg-type]
        hint = hints[item.name]
        if is_dataclass(hint):
            prefix = f"{item.name}."
            inner = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
            values[item.name] = _assemble(hint, inner)  # type: ignore[arg-type]
        elif item.name in flat:
            values[item.name] = flat[item.name]
    return kind(**values)


def _coerce(value: Any, hint: Any, name: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{name}: {value!r} is no choice.{near(str(value), map(str, args))}")
        return value
    if origin in (Union, UnionType):
        if value is None:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), name)
    if origin is tuple:
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            items = [items]
        return tuple(_coerce(item, args[0], name) for item in items if item != "")
    return _scalar(value, hint, name)


def _scalar(value: Any, hint: Any, name: str) -> Any:
    if hint is bool:
        spelled = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        value = spelled.get(value.lower(), value) if isinstance(value, str) else value
        fits = isinstance(value, bool)
    else:
        fits = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        try:
            exact = hint is not int or float(value) == int(float(value))
            value, fits = hint(float(value) if hint is int else value), fits and exact
        except (TypeError, ValueError, OverflowError):
            fits = False
    if not fits:
        raise ConfigError(f"{name}: {value!r} is not of type {hint.__name__}.")
    return value


__all__ = [
    "KINDS",
    "AdapterConfig",
    "BudgetConfig",
    "BypassConfig",
    "Kind",
    "LoraConfig",
    "Precision",
    "RouterConfig",
    "build",
    "changes",
    "checked",
    "leaves",
    "option",
    "part",
    "read_yaml",
    "require",
    "to_dict",
]
