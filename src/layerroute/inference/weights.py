"""The tensors of a frozen causal LM, fused and flat, as the engine's own block program reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerroute.config import Precision, dtype_of
from layerroute.errors import ModelError, near
from layerroute.inference.quantised import Matrix, quantise
from layerroute.machine import multiplies_bfloat16
from layerroute.models.families import FIXED_ROPES, changing_rope

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
GEMMAS = ("gemma2", "gemma3_text")
BITS = {"int8": 8, "int4": 4}
PADDED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes and constants of a model. Sizes count elements; `scale` multiplies query-key products."""

    family: str
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int
    eps: float
    scale: float
    activation: Activation
    gain_in_float: bool = False
    attention_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float | None = None

    @property
    def query_size(self) -> int:
        """Width of the queries of one token."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys (or the values) of one token."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Bypass:
    """What stands in for a block that is skipped: `x + up @ down @ norm(x)`, norm being the block's first."""

    down: Tensor  # (rank, hidden), the rank padded with zeros to a multiple of PADDED
    up: Tensor  # (hidden, rank)

    @classmethod
    def of(cls, down: Tensor, up: Tensor, dtype: torch.dtype) -> "Bypass":
        """Pad the matrices, so that kernels find whole groups; zeros change nothing."""
        more = -len(down) % PADDED
        padded = F.pad(down.detach(), (0, 0, 0, more)), F.pad(up.detach(), (0, more))
        return cls(*(matrix.to(dtype).contiguous() for matrix in padded))

    @property
    def nbytes(self) -> int:
        """Bytes one token reads when it skips the block."""
        return self.down.nbytes + self.up.nbytes

    def numel(self) -> int:
        """Count the numbers of both matrices."""
        return self.down.numel() + self.up.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block's tensors. Matrices are (out, in); norms are the factors applied, Gemma's `1 + w` folded in."""

    norm_attention: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Matrix
    out_bias: Tensor | None
    norm_after_attention: Tensor | None
    norm_mlp: Tensor
    gate_up: Matrix
    gate_up_bias: Tensor | None
    down: Matrix
    down_bias: Tensor | None
    norm_after_mlp: Tensor | None
    window: int | None
    rope: int
    bypass: Bypass | None

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        """The four matrices, in the order a token meets them."""
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def nbytes(self) -> int:
        """Bytes one token reads when it runs the block."""
        return sum(matrix.nbytes for matrix in self.matrices)


class Rope:
    """Rotary tables of one frequency set, grown on demand. Half-width: (positions, rotary / 2)."""

    def __init__(self, inverse: Tensor, factor: float, dtype: torch.dtype) -> None:
        self._inverse, self._factor, self._dtype = inverse.float(), factor, dtype
        self.cos = self.sin = torch.empty(0, inverse.numel(), dtype=dtype, device=inverse.device)

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of at least `length` positions."""
        if self.cos.shape[0] < length:
            size = max(1024, 1 << (length - 1).bit_length())
            steps = torch.arange(size, dtype=torch.float32, device=self._inverse.device)
            angle = steps[:, None] * self._inverse
            self.cos = (angle.cos() * self._factor).to(self._dtype)
            self.sin = (angle.sin() * self._factor).to(self._dtype)
        return self.cos, self.sin


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All the engine needs of a model. Nothing refers to the model it came from except tied storage."""

    shape: Shape
    precision: Precision | None
    embedding: Matrix
    blocks: tuple[Block, ...]
    norm: Tensor
    head: Matrix
    head_bias: Tensor | None
    ropes: tuple[Rope, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.embedding.device

    @property
    def prefill_dtype(self) -> torch.dtype:
        """The dtype of the residual in prefill: float32 where the processor is slow at products of bfloat16."""
        slow = self.dtype == torch.bfloat16 and not multiplies_bfloat16(self.device.type)
        return torch.float32 if slow else self.dtype

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        precision: Precision | None = None,
        bypasses: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> "Weights":
        """Read the tensors of `model`, a plain Hugging Face causal LM with LoRA already merged.

        The model is not changed. Matrices of blocks are copies; the rest is shared where dtype and precision allow.

        Args:
            dtype: of residual and matrices; the model's own when None.
            precision: the same by its short name, or `int8` or `int4`: packed matrices, bfloat16 residual. int4 keeps
                embedding and head in 8 bits. Takes the place of `dtype`.
            bypasses: `down` (rank, hidden) and `up` (hidden, rank) of the blocks that have one, all of one rank. They
                are never packed.

        Raises:
            ModelError: a family the engine doesn't know, a wrapped or quantised model, a rotary embedding whose
                frequencies depend on the length, a width that can't be quantised, a head of other rows than the
                embedding, bypasses that don't fit, or no such precision.
        """
        if precision not in (None, *get_args(Precision)):
            raise ModelError(f"precision: {precision!r} is unknown.{near(str(precision), get_args(Precision))}")
        config = _supported(model)
        dtype = dtype or next(model.parameters()).dtype
        if precision is not None:
            dtype = getattr(torch, dtype_of(precision))
        with torch.no_grad():
            return _read(cls, model, config, dtype, precision, bypasses or {})


def _supported(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise ModelError(
            f"the engine has no block program for the family {family!r}; it has {', '.join(FAMILIES)}. "
            "Generate with transformers on the attached model instead, or add the family to inference/weights.py."
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError("this model attends in both directions; the engine generates with causal ones alone.")
    if rope := changing_rope(config):
        raise ModelError(
            f"rotary embedding {rope!r} changes with the length, which a cache of rotated keys can't follow; "
            f"the engine takes {', '.join(FIXED_ROPES)}. Generate with transformers instead."
        )
    return config


def _read(
    cls: type[Weights],
    model: Any,
    config: Any,
    dtype: torch.dtype,
    precision: Precision | None,
    bypasses: Mapping[int, tuple[Tensor, Tensor]],
) -> Weights:
    inner, family = model.model, config.model_type
    _check_bypasses(bypasses, len(inner.layers), config.hidden_size)
    cast: Callable[[Tensor], Tensor] = lambda tensor: tensor.detach().to(dtype).contiguous()  # noqa: E731
    shape = _shape(config, inner)
    gain = _gain(dtype, shape.gain_in_float)
    kinds = list(getattr(config, "layer_types", None) or [])
    rope_kinds = sorted(set(kinds)) if family == "gemma3_text" else [""]
    fuse = _fuser(cast, BITS.get(precision or ""))
    blocks = tuple(
        _block(
            layer,
            gain,
            fuse,
            _window(config, kinds, i),
            rope_kinds.index(kinds[i]) if len(rope_kinds) > 1 else 0,
            Bypass.of(*bypasses[i], dtype) if i in bypasses else None,
        )
        for i, layer in enumerate(inner.layers)
    )
    ends: Callable[[Tensor], Matrix] = (lambda t: quantise(t, 8)) if precision in BITS else cast
    embedding = ends(inner.embed_tokens.weight)
    head = model.lm_head.weight
    tied = head.data_ptr() == inner.embed_tokens.weight.data_ptr()
    bias = model.lm_head.bias
    if len(head) != shape.vocab:
        raise ModelError(
            f"a head of {len(head)} tokens and an embedding of {shape.vocab}; make both of one vocabulary."
        )
    return cls(
        shape=shape,
        precision=precision,
        embedding=embedding,
        blocks=blocks,
        norm=gain(inner.norm.weight),
        head=embedding if tied else ends(head),
        head_bias=None if bias is None else cast(bias),
        ropes=tuple(_rope(inner.rotary_emb, kind, dtype) for kind in rope_kinds),
    )


def _check_bypasses(bypasses: Mapping[int, tuple[Tensor, Tensor]], blocks: int, hidden: int) -> None:
    ranks = {len(down) for down, _ in bypasses.values()}
    for block, (down, up) in bypasses.items():
        fits = down.shape == (len(down), hidden) and up.shape == (hidden, len(down)) and len(down) <= hidden
        if block not in range(blocks) or not fits or len(ranks) > 1:
            raise ModelError(
                f"bypass of block {block}: down {tuple(down.shape)} and up {tuple(up.shape)}, ranks {sorted(ranks)}, "
                f"for {blocks} blocks of {hidden}; give down (rank, {hidden}), up ({hidden}, rank), one rank for all."
            )


def _shape(config: Any, inner: Any) -> Shape:
    gemma = config.model_type in GEMMAS
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    name = config.hidden_activation if gemma else config.hidden_act
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r} has no block program; known: {', '.join(ACTIVATIONS)}.")
    return Shape(
        family=config.model_type,
        blocks=len(inner.layers),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate=config.intermediate_size,
        vocab=inner.embed_tokens.weight.shape[0],
        positions=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        activation=ACTIVATIONS[name],
        gain_in_float=gemma,
        # Gemma 3 declares the option too, but its attention never applies it.
        attention_cap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
        logit_cap=getattr(config, "final_logit_softcapping", None),
        embed_scale=config.hidden_size**0.5 if gemma else None,
    )


def _gain(dtype: torch.dtype, in_float: bool) -> Callable[[Tensor], Tensor]:
    if not in_float:
        return lambda weight: weight.detach().to(dtype).clone()
    # Gemma multiplies by 1 + w before it rounds, so the factor keeps the precision of its sum.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return lambda weight: 1.0 + weight.detach().to(wide)


def _window(config: Any, kinds: list[str], index: int) -> int | None:
    """Return how far a block's attention sees, as transformers' forward pass has it, or None.

    Llama's has no windows, Mistral's and Phi-3's are in every block, the others' go by the kinds of blocks.
    """
    if config.model_type == "llama":
        return None
    if config.model_type not in ("mistral", "phi3") and kinds and kinds[index] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _rope(rotary: Any, kind: str, dtype: torch.dtype) -> Rope:
    prefix = f"{kind}_" if kind else ""
    inverse = getattr(rotary, f"{prefix}inv_freq")
    return Rope(inverse.detach(), float(getattr(rotary, f"{prefix}attention_scaling")), dtype)


def _linear(parent: nn.Module, *names: str) -> list[nn.Linear]:
    found = [getattr(parent, name) for name in names]
    for name, layer in zip(names, found, strict=True):
        if type(layer) is not nn.Linear:
            raise ModelError(
                f"{name} is a {type(layer).__name__}, not a plain Linear; merge the adapter (or load the model "
                "without quantisation) before handing it to the engine."
            )
    return found


Fuser = Callable[[list[nn.Linear]], tuple[Matrix, Tensor | None]]


def _fuser(cast: Callable[[Tensor], Tensor], bits: int | None) -> Fuser:
    def fuse(layers: list[nn.Linear]) -> tuple[Matrix, Tensor | None]:
        weights = [layer.weight.detach() for layer in layers]
        matrix: Matrix = (
            torch.cat([cast(weight) for weight in weights]) if bits is None else quantise(torch.cat(weights), bits)
        )
        biases = [cast(x.bias) if x.bias is not None else cast(x.weight).new_zeros(x.out_features) for x in layers]
        return matrix, None if all(x.bias is None for x in layers) else torch.cat(biases)

    return fuse


def _block(layer: Any, gain: Any, fuse: Fuser, window: int | None, rope: int, bypass: Bypass | None) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    fused = hasattr(attention, "qkv_proj")
    qkv = fuse(_linear(attention, *(["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"])))
    out = fuse(_linear(attention, "o_proj"))
    gate_up = fuse(_linear(mlp, *(["gate_up_proj"] if fused else ["gate_proj", "up_proj"])))
    down = fuse(_linear(mlp, "down_proj"))
    around = hasattr(layer, "pre_feedforward_layernorm")
    return Block(
        norm_attention=gain(layer.input_layernorm.weight),
        qkv=qkv[0],
        qkv_bias=qkv[1],
        query_norm=gain(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
        key_norm=gain(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
        out=out[0],
        out_bias=out[1],
        norm_after_attention=gain(layer.post_attention_layernorm.weight) if around else None,
        norm_mlp=gain((layer.pre_feedforward_layernorm if around else layer.post_attention_layernorm).weight),
        gate_up=gate_up[0],
        gate_up_bias=gate_up[1],
        down=down[0],
        down_bias=down[1],
        norm_after_mlp=gain(layer.post_feedforward_layernorm.weight) if around else None,
        window=window,
        rope=rope,
        bypass=bypass,
    )


__all__ = ["FAMILIES", "Block", "Bypass", "Rope", "Shape", "Weights"]
