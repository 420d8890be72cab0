"""Matrices in 8 or 4 bits: packed once at load, multiplied as they are by the kernel, widened where there is none.

int8 has one scale per row, int4 one scale and one least value per 32 numbers of a row. Rows are packed sixteen at a
time, as the kernel reads them (native_formats.h). The kernel rounds what a matrix multiplies to 8 bits, 32 numbers to a
scale; torch does not.
"""

import ctypes
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from layerroute.errors import ModelError
from layerroute.inference.native_library import at_hand

PANEL, GROUP = 16, 32
CHUNK = 4096


class CMatrix(ctypes.Structure):
    """A matrix as the kernel takes it; `scales` is null where nothing is packed."""

    _fields_ = (("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p))


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A packed matrix (out, in) that stands in for a bfloat16 one."""

    bits: int
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held, which are the bytes a product reads."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is widened to."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    def numel(self) -> int:
        """Count its numbers."""
        return self.shape[0] * self.shape[1]

    def pointers(self) -> CMatrix:
        """Return where the kernel finds it."""
        return CMatrix(self.codes.data_ptr(), self.scales.data_ptr())

    def below(self, first: int) -> "Quantised":
        """Return the rows from `first` on, a multiple of 16, without a copy."""
        assert first % PANEL == 0, "rows are packed sixteen at a time"
        panels = first // PANEL
        scales = self.scales[first:] if self.bits == 8 else self.scales[panels:]
        return Quantised(self.bits, (self.shape[0] - first, self.shape[1]), self.codes[panels:], scales)

    def take(self, ids: Tensor) -> Tensor:
        """Return rows `ids` widened (len(ids), in)."""
        assert self.bits == 8, "only int8 serves as an embedding"
        codes = self.codes[ids // PANEL, :, ids % PANEL].flatten(1)
        return ((codes.float() - 128.0) * self.scales[ids, None]).bfloat16()

    def dense(self) -> Tensor:
        """Return the matrix widened, in plain torch."""
        panels, width = self.codes.shape[0], self.shape[1]
        if self.bits == 8:
            codes = self.codes.permute(0, 2, 1, 3).reshape(panels * PANEL, width)
            wide = (codes.float() - 128.0) * self.scales[:, None]
        else:
            halves = torch.stack((self.codes & 15, self.codes >> 4), dim=2)  # (panels, in / 8, 2, 16, 4)
            codes = halves.permute(0, 3, 1, 2, 4).reshape(panels, PANEL, width // GROUP, GROUP)
            scale, least = self.scales.float().permute(2, 0, 3, 1).unsqueeze(-1)
            wide = (codes.float() * scale + least).reshape(panels * PANEL, width)
        return wide[: self.shape[0]].bfloat16()

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x` (tokens, in) times the matrix plus `bias`: (tokens, out)."""
        library = at_hand() if self.device.type == "cpu" else None
        if library is None:
            return linear(x, self.dense(), bias)
        (rows, width), matrix = self.shape, self.pointers()
        wide = x.float().contiguous()
        out = wide.new_empty(len(x), rows)
        library.layerroute_product(
            self.bits, ctypes.byref(matrix), rows, width, wide.data_ptr(), len(x), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return (out if bias is None else out + bias.float()).to(x.dtype)


Matrix = Tensor | Quantised


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """Return `x` (tokens, in) times `matrix` plus `bias`, in the dtype of `x`."""
    if isinstance(matrix, Tensor):
        return F.linear(x, matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return matrix.times(x, bias)


def quantise(matrix: Tensor, bits: int) -> Quantised:
    """Pack `matrix` (out, in) into 8 or 4 bits.

    Raises:
        ModelError: its width is not a multiple of 32, or it holds what is not finite, for which there is no code.
    """
    rows, width = matrix.shape
    if width % GROUP:
        raise ModelError(f"a matrix of width {width} can't be quantised: it must be a multiple of {GROUP}.")
    if not all(bool(piece.isfinite().all()) for piece in torch.split(matrix, CHUNK)):
        raise ModelError("a matrix of the model holds NaN or infinity; its files are damaged. Fetch it again.")
    library = at_hand() if matrix.device.type == "cpu" else None
    pack = partial(_pack, library, bits) if library else _int8 if bits == 8 else _int4
    # In pieces, so that a large vocabulary is never held in float32 as a whole.
    pieces = [pack(_padded(piece.detach().float())) for piece in torch.split(matrix, CHUNK)]
    codes, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Quantised(bits, (rows, width), codes, scales)


def _padded(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, 0, 0, -len(matrix) % PANEL))


def _pack(library: ctypes.CDLL, bits: int, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `_int8` and `_int4` do, some ten times faster."""
    (rows, width), matrix = matrix.shape, matrix.contiguous()
    panels, groups = rows // PANEL, width // GROUP
    codes = torch.empty(panels, width * bits // 32, PANEL, 4, dtype=torch.uint8)
    scales = torch.empty(rows, dtype=torch.float32)
    if bits == 4:
        scales = torch.empty(panels, groups, 2, PANEL, dtype=torch.float16)
    packed = CMatrix(codes.data_ptr(), scales.data_ptr())
    library.layerroute_pack(bits, matrix.data_ptr(), rows, width, ctypes.byref(packed), torch.get_num_threads())
    return codes, scales


def _int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (panels, in / 4, 16, 4) around 128 and scales (rows,) float32."""
    scales = matrix.abs().amax(1) / 127
    codes = (matrix / scales.clamp_min(1e-30)[:, None]).round() + 128
    packed = codes.to(torch.uint8).view(-1, PANEL, matrix.shape[1] // 4, 4).permute(0, 2, 1, 3)
    return packed.contiguous(), scales


def _int4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (panels, in / 8, 16, 4), two to a byte, and scales (panels, in / 32, 2, 16) float16."""
    rows, width = matrix.shape
    groups = matrix.view(rows, -1, GROUP)
    least, most = groups.amin(2), groups.amax(2)
    scale, least = ((most - least) / 15).half(), least.half()
    codes = ((groups - least.float()[..., None]) / scale.float().clamp_min(1e-30)[..., None]).round().clamp(0, 15)
    halves = codes.to(torch.uint8).view(-1, PANEL, width // 8, 2, 4)
    packed = (halves[..., 0, :] | halves[..., 1, :] << 4).permute(0, 2, 1, 3)
    scales = torch.stack((scale, least)).view(2, -1, PANEL, width // GROUP).permute(1, 3, 0, 2)
    return packed.contiguous(), scales.contiguous()
