"""What the processor is good at decides the dtype that nobody asked for."""

import pytest

from layerroute import machine


@pytest.mark.parametrize(
    ("flags", "device", "dtype"),
    [
        (("avx2", "avx512f", "avx512_bf16"), "cpu", "bfloat16"),
        (("asimd", "bf16"), "cpu", "bfloat16"),
        (("avx2", "fma"), "cpu", "float32"),
        ((), "cpu", "float32"),
    ],
)
def test_bfloat16_is_chosen_where_it_is_quick(monkeypatch, flags, device, dtype):
    monkeypatch.setattr(machine, "_flags", lambda: flags)
    assert machine.dtype_for(device) == dtype
