"""Which architecture a GPU is of, told apart by vendor: AMD's gfx942 is no sm_94."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

# Kilobytes of shared memory that a block may have, "Technical Specifications per Compute Capability" of the CUDA C++
# Programming Guide; of local data share that a workgroup may have, AMD's ISA guides of CDNA3, CDNA4, RDNA3 and RDNA4.
_NVIDIA_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_AMD_KB = {0x950: 160}


class Architecture(NamedTuple):
    """A generation of a vendor's GPUs: sm_90 is ("nvidia", 90), gfx942 is ("amd", 0x942).

    AMD counts in hexadecimal digits: gfx90a comes before gfx942, and both before gfx1100.
    """

    vendor: str
    number: int

    def __str__(self) -> str:
        return f"sm_{self.number}" if self.vendor == "nvidia" else f"gfx{self.number:x}"

    @property
    def shared_memory(self) -> int:
        """Bytes of it (AMD: of LDS) that a block may have; the least of the vendor's where that is not known."""
        known, least = (_NVIDIA_KB, 99) if self.vendor == "nvidia" else (_AMD_KB, 64)
        return known.get(self.number, least) * 1024

    @property
    def family(self) -> str:
        """What was chosen for one suits newer ones of its family: nvidia or "nvidia, 99 KB", cdna or rdna.

        NVIDIA's with 99 KB of shared memory have neither the warp-group products of sm_90 nor the tensor memory of
        sm_100 either, whatever their number. AMD's two differ in the size of a wavefront and in matrix instructions.
        """
        if self.vendor == "amd":
            return "cdna" if self.number < 0x1000 else "rdna"
        return "nvidia, 99 KB" if self.shared_memory <= 99 * 1024 else "nvidia"

    @property
    def wavefront(self) -> int:
        """Threads of a warp."""
        return 64 if self.family == "cdna" else 32


SM80, SM90, SM100 = (Architecture("nvidia", number) for number in (80, 90, 100))
GFX942, GFX1100 = (Architecture("amd", number) for number in (0x942, 0x1100))


def oldest_served(arch: Architecture) -> Architecture:
    """The oldest of its vendor and kind for which the Triton kernels are compiled in the tests."""
    if arch.vendor == "nvidia":
        return SM80
    return GFX942 if arch.family == "cdna" else GFX1100


def parse(name: str) -> Architecture:
    """The architecture that is called so.

    Raises:
        ValueError: for what is no name of one.
    """
    if found := re.fullmatch(r"sm_(\d+)[af]?", name):
        return Architecture("nvidia", int(found[1]))
    if found := re.fullmatch(r"gfx([0-9a-f]{3,4})(:\S*)?", name):  # torch adds features: gfx942:sramecc+:xnack-
        return Architecture("amd", int(found[1], 16))
    raise ValueError(f"architecture: got {name!r}, expected a name such as sm_90 or gfx942")


def newest(among: Iterable[Architecture], arch: Architecture) -> Architecture:
    """Of those of arch's family the newest that is no newer than it; the first of all where its family has none."""
    among = list(among)
    own = [other for other in among if other.family == arch.family and other.number <= arch.number]
    return max(own, default=among[0])


@functools.cache
def architecture(index: int) -> Architecture:
    """Of a visible GPU."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:  # its major and minor are digits of gfxNNN
        return parse(properties.gcnArchName)
    return Architecture("nvidia", properties.major * 10 + properties.minor)
