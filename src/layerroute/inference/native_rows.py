"""What prefill does between two products, in one pass each: hands tensors to native_rows.h. Torch is the fallback."""

import torch
from torch import Tensor

from layerroute.inference.native_library import at_hand

WIDTH = 32  # widths are multiples of it
DTYPES = (torch.float32, torch.bfloat16)


def fits(x: Tensor) -> bool:
    """Return whether these functions take `x`: on a processor with the library at hand, of a dtype and width it has."""
    whole = x.shape[-1] % WIDTH == 0 and x.stride(-1) == 1
    return x.device.type == "cpu" and x.dtype in DTYPES and whole and at_hand() is not None


def normalise(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return `x` (tokens, width) divided by its root mean square, times `gain` (width,)."""
    x, gain = x.contiguous(), gain.to(x.dtype)
    out = torch.empty_like(x)
    _call("normalise", x, gain.data_ptr(), len(x), x.shape[1], eps, out.data_ptr())
    return out


def fits_heads(x: Tensor, cos: Tensor) -> bool:
    """Return whether `turn` takes `x` (tokens, heads, head_dim): whole heads are turned, each right behind the last."""
    width = x.shape[-1]
    return width == 2 * cos.shape[-1] and width % WIDTH == 0 and x.stride(1) == width and fits(x)


def turn(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Rotate `x` (tokens, heads, head_dim) in place, each head normalised before where there is a `gain` (head_dim,).

    Args:
        cos: (tokens, 1, head_dim / 2), as is `sin`.
    """
    tokens, heads, width = x.shape
    cos, sin = (table.to(x.dtype).contiguous() for table in (cos, sin))
    gain = None if gain is None else gain.to(x.dtype)
    tables = (None if table is None else table.data_ptr() for table in (gain, cos, sin))
    _call("turn", x, *tables, tokens, x.stride(0), heads, width, eps)
    return x


def gate(x: Tensor, gelu: bool) -> Tensor:
    """Return the activation (silu, or gelu by tanh) of the first half of `x` (tokens, 2 width) times the second."""
    x, width = x.contiguous(), x.shape[1] // 2
    out = x.new_empty(len(x), width)
    _call("gate", x, len(x), width, gelu, out.data_ptr())
    return out


def _call(name: str, x: Tensor, *arguments: int | float | None) -> None:
    library = at_hand()
    assert library is not None, "ask `fits` first"
    getattr(library, f"layerroute_{name}")(8 * x.itemsize, x.data_ptr(), *arguments, torch.get_num_threads())
