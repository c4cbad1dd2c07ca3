"""How many blocks of a kernel a GPU has at once, on the page docs/design/gpu_kernels.md."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import aot
import gpu_kernels


def _line(arch, registers, warps=4, shared=0):
    return {"arch": arch, "REG": registers, "warps": warps, "SHARED": 0, "dynamic": shared}


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "blocks"),
    [
        ("sm_80", 64, 4, 0, 8),  # 65536 registers, 8192 a block
        ("sm_80", 168, 4, 0, 3),
        ("sm_80", 32, 4, 40 * 1024, 4),  # 164 KB, 41 a block
        ("sm_86", 32, 4, 0, 12),  # 48 warps
        ("sm_90", 255, 8, 96 * 1024, 1),
        ("sm_120", 32, 1, 0, 24),
        ("gfx942", 512, 4, 64 * 1024, 1),
        ("gfx942", 128, 4, 16 * 1024, 4),
        ("gfx1100", 96, 4, 64 * 1024, 2),  # 128 KB of two compute units
    ],
)
def test_occupancy(arch, registers, warps, shared, blocks):
    """By hand, from the vendors' tables."""
    line = _line(arch, registers, warps, shared)
    assert gpu_kernels.occupancy(line) == blocks * warps / gpu_kernels.MULTIPROCESSORS[arch].warps


def test_every_architecture_has_its_limits():
    assert set(gpu_kernels.MULTIPROCESSORS) == set(map(str, aot.EVERY + aot.LARGEST))
