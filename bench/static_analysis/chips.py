"""Data-sheet figures of one chip for each target, for modelled times and occupancy. Nothing here was measured.

Tensor figures are dense (no sparsity) with float32 sums. The sheets themselves could not be fetched; the figures were
compared in November 2026 with pages that quote them:

- A100, H100: glennklockwood.com/garden/processors (all rates, processors, bandwidths; H100's tensor figures are at
  1.83 GHz, not at the clock below), hmc-tech.com (A100's clock).
- A10: not compared.
- B200: the same two sites (2.25 PFLOP/s, 75 TFLOP/s, 148 processors, 1.98 GHz). They give TF32 as 1.10 and 1.13
  PFLOP/s, and the bandwidth as 8 and 7.7 TB/s.
- RTX 5090: 170 processors, 2.407 GHz, 1.792 TB/s and 838 TFLOP/s for sparse products with float16 sums (Linux Format,
  May 2025; float32, printed as 104 to 105 TFLOP/s, is processors · 128 FMA · clock). A quarter of 838, with dense
  products and float32 sums, and TF32 at the rate of float32 follow the ratios of earlier GeForce cards (hmc-tech.com);
  no page was found that prints them.
- MI300X: 304 processors, 5.3 TB/s and 164.6 TFLOP/s in float32 (gpu.blog; ours, 163.4, is processors · 256 · clock);
  2,615 TFLOP/s in 16 bits (codesota.com, which calls them dense) are twice the figure below. TF32 was not found.
- Limits of a processor: registers and 228 KiB of a B200 (mortalapps.com), threads of sm_120 (docs.rs/oxicuda-launch).
  The other limits are unchecked.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU: units, rates, and the limits of one streaming multiprocessor (compute unit)."""

    name: str
    target: str
    source: str
    processors: int
    clock: float
    """Boost clock, Hz."""
    tensor_flops: float
    """16-bit products with float32 sums, FLOP/s."""
    tf32_flops: float
    fp32_flops: float
    bandwidth: float
    """DRAM, bytes/s."""
    registers: int
    """32-bit registers per processor."""
    shared: int
    """Bytes of shared memory (LDS) per processor."""
    shared_block: int
    """Most bytes of shared memory one program may take."""
    shared_reserved: int
    """Bytes of each program's shared memory that the driver takes."""
    threads: int
    """Most threads per processor."""
    lanes: int
    """Threads of a warp (wavefront)."""

    def flops_of(self, kind: str) -> float:
        """FLOP/s of matrix products of ``kind``: "16-bit", "tf32" or "fp32"."""
        return {"16-bit": self.tensor_flops, "tf32": self.tf32_flops, "fp32": self.fp32_flops}[kind]

    def programs_resident(self, registers: int, shared: int, num_warps: int) -> int:
        """Programs that one processor holds at a time, limited by registers, shared memory and threads."""
        slots = self.threads // (num_warps * self.lanes)
        partition = self.registers // 4
        warps = 4 * (partition // (max(8, math.ceil(registers / 8) * 8) * self.lanes))
        slots = min(slots, warps // num_warps)
        taken = shared + self.shared_reserved
        return min(slots, self.shared // taken) if taken else slots

    def occupancy(self, registers: int, shared: int, num_warps: int) -> float:
        """Resident warps over the most that a processor can hold."""
        resident = self.programs_resident(registers, shared, num_warps)
        return resident * num_warps * self.lanes / self.threads


CHIPS = (
    Chip(
        name="A100 SXM 80GB",
        target="sm_80",
        source="NVIDIA A100 80GB data sheet (2021); NVIDIA A100 Tensor Core GPU Architecture, tables 4 and 5",
        processors=108,
        clock=1.41e9,
        tensor_flops=312e12,
        tf32_flops=156e12,
        fp32_flops=19.5e12,
        bandwidth=2.039e12,
        registers=65536,
        shared=164 * 1024,
        shared_block=163 * 1024,
        shared_reserved=1024,
        threads=2048,
        lanes=32,
    ),
    Chip(
        name="A10",
        target="sm_86",
        source="NVIDIA A10 data sheet (2021); CUDA C++ Programming Guide, compute capability 8.6",
        processors=72,
        clock=1.695e9,
        tensor_flops=125e12,
        tf32_flops=62.5e12,
        fp32_flops=31.2e12,
        bandwidth=600e9,
        registers=65536,
        shared=100 * 1024,
        shared_block=99 * 1024,
        shared_reserved=1024,
        threads=1536,
        lanes=32,
    ),
    Chip(
        name="H100 SXM",
        target="sm_90",
        source="NVIDIA H100 Tensor Core GPU data sheet; CUDA C++ Programming Guide, compute capability 9.0; clock "
        "from 66.9 fp32 TFLOP/s over 132 · 128 FMA",
        processors=132,
        clock=1.98e9,
        tensor_flops=989.4e12,
        tf32_flops=494.7e12,
        fp32_flops=66.9e12,
        bandwidth=3.35e12,
        registers=65536,
        shared=228 * 1024,
        shared_block=227 * 1024,
        shared_reserved=1024,
        threads=2048,
        lanes=32,
    ),
    Chip(
        name="B200",
        target="sm_100",
        source="NVIDIA HGX B200 data sheet, an eighth of the board; CUDA C++ Programming Guide, compute capability "
        "10.0; clock from 75 fp32 TFLOP/s over 148 · 128 FMA",
        processors=148,
        clock=1.98e9,
        tensor_flops=2.25e15,
        tf32_flops=1.125e15,
        fp32_flops=75e12,
        bandwidth=8e12,
        registers=65536,
        shared=228 * 1024,
        shared_block=227 * 1024,
        shared_reserved=1024,
        threads=2048,
        lanes=32,
    ),
    Chip(
        name="RTX 5090",
        target="sm_120",
        source="NVIDIA RTX Blackwell GPU Architecture, appendix A; CUDA C++ Programming Guide, compute capability 12.0",
        processors=170,
        clock=2.407e9,
        tensor_flops=209.5e12,
        tf32_flops=104.8e12,
        fp32_flops=104.8e12,
        bandwidth=1.792e12,
        registers=65536,
        shared=100 * 1024,
        shared_block=99 * 1024,
        shared_reserved=1024,
        threads=1536,
        lanes=32,
    ),
    Chip(
        name="MI300X",
        target="gfx942",
        source="AMD Instinct MI300X data sheet; AMD CDNA 3 Architecture white paper",
        processors=304,
        clock=2.1e9,
        tensor_flops=1307.4e12,
        tf32_flops=653.7e12,
        fp32_flops=163.4e12,
        bandwidth=5.3e12,
        registers=131072,
        shared=64 * 1024,
        shared_block=64 * 1024,
        shared_reserved=0,
        threads=2048,
        lanes=64,
    ),
)
CHIP_OF = {chip.target: chip for chip in CHIPS}
