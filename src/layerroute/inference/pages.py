"""Memory for matrices in huge pages: streaming them meets fewer page faults of the processor's address cache."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from layerroute.inference.quantised import Matrix, Quantised

PIECE, LINE = 64 * 2**20, 64


class Pages:
    """Hands out room in large mappings, one matrix after the other, as decoding reads them."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)

    def place(self, matrix: Matrix) -> Matrix:
        """Return a copy of `matrix` in huge pages; `matrix` itself where the system or the device has none."""
        if matrix.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
            return matrix
        if isinstance(matrix, Quantised):
            return Quantised(matrix.bits, matrix.shape, self._copy(matrix.codes), self._copy(matrix.scales))
        return self._copy(matrix)

    def _copy(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        if size > len(self._piece):
            # Shared mappings, the default, have huge pages only where the system was told so.
            mapping = mmap.mmap(-1, max(PIECE, size + LINE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self._piece = torch.frombuffer(mapping, dtype=torch.uint8)
        room, self._piece = self._piece[:size], self._piece[-(-size // LINE) * LINE :]
        placed = room.view(tensor.dtype).view(tensor.shape)
        return placed.copy_(tensor)
