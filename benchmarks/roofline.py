"""What the CUDA kernels could reach on devices we do not have, from arithmetic, bytes and the compiler's report.

Nothing here was measured on a GPU. ``kernels/gpu_check.sh`` measures, where there is one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from meliad_edge.errors import UsageError

DEPTH, PROTOTYPES = 432, 640
PATCHES = (256, 1024, 4096)
FRAMES = ((720, 1280), (1080, 1920))
SOURCES = {
    "patch_entropy": Path(__file__).resolve().parents[1] / "kernels" / "cuda" / "patch_entropy.cu",
    "preprocess": Path(__file__).resolve().parents[1] / "kernels" / "cuda" / "preprocess.cu",
}
# Tiles of the first kernel: kCells by bytes of an element, and kPrototypes, in patch_entropy.cu. Each class has no more
# tiles than kSplits, so each tile is a block of its own, and reads the embeddings again.
_TILE_CELLS = {4: 32, 2: 64}
_TILES = PROTOTYPES // 64
_REGISTERS_PER_MULTIPROCESSOR = 65536


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks of a device, from its vendor's data sheet.

    Attributes:
        name: As sold.
        architecture: Of the compiler.
        bytes_per_s: Of its memory.
        single_flops: FP32 operations per second, a fused multiply-add counting as two.
        half_flops: FP16 operations per second on tensor cores, dense.
        multiprocessors: Their number.
    """

    name: str
    architecture: str
    bytes_per_s: float
    single_flops: float
    half_flops: float
    multiprocessors: int


# NVIDIA's data sheets: Jetson Orin Nano 8GB and AGX Orin 64GB (dense FP16 is a quarter of the sparse INT8 figure of
# the GPU), H100 SXM.
DEVICES = (
    Device("Orin Nano 8GB", "sm_87", 68e9, 1.28e12, 10e12, 8),
    Device("AGX Orin 64GB", "sm_87", 204.8e9, 5.3e12, 42.5e12, 16),
    Device("H100 SXM", "sm_90", 3.35e12, 67e12, 989e12, 132),
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What limits occupancy: warps and bytes of shared memory of a multiprocessor (CUDA C++ Programming Guide)."""

    warps: int
    shared_bytes: int


ARCHITECTURES = {
    "sm_87": Architecture(48, 164 << 10),
    "sm_89": Architecture(48, 100 << 10),
    "sm_90": Architecture(64, 228 << 10),
    "sm_110": Architecture(48, 228 << 10),
}
# Of the kernels, as launched.
_THREADS = {"summarise": 128, "finish": 1024, "preprocess_tile": 256}


@dataclass(frozen=True, slots=True)
class Usage:
    """What the compiler says of one kernel on one architecture."""

    kernel: str
    architecture: str
    threads: int
    registers: int
    shared_bytes: int
    spilled_bytes: int

    @property
    def blocks(self) -> int:
        """Blocks that fit on a multiprocessor at a time."""
        limits = ARCHITECTURES[self.architecture]
        warps = self.threads // 32
        # Registers are handed out to warps in units of 256; a block reserves 1 KiB of shared memory for itself.
        registers = -(-self.registers * 32 // 256) * 256 * warps
        shared = self.shared_bytes + 1024
        return min(limits.warps // warps, _REGISTERS_PER_MULTIPROCESSOR // registers, limits.shared_bytes // shared)

    @property
    def occupancy(self) -> float:
        """Share of the warps that a multiprocessor can hold."""
        return self.blocks * self.threads / 32 / ARCHITECTURES[self.architecture].warps


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one image.

    Attributes:
        flop: Operations of the matrix product, a multiply-add counting as two.
        other_flop: Everything else: norms, distances, exponentials, evidence.
        memory_bytes: Read or written at least once: embeddings, prototypes, outputs.
        cache_bytes: What the blocks read through the second-level cache, and the summaries between the kernels.
        blocks: Of the first kernel.
    """

    flop: float
    other_flop: float
    memory_bytes: float
    cache_bytes: float
    blocks: int


def cost(patches: int, element_bytes: int) -> Cost:
    """Work of scoring one image with the default shape.

    Args:
        patches: Cells of its grid.
        element_bytes: 4 for FP32, 2 for FP16.
    """
    outputs = patches * (4 + 2 * 8) + 4
    cell_tiles = -(-patches // _TILE_CELLS[element_bytes])
    summaries = patches * _TILES * 12
    return Cost(
        flop=2.0 * patches * PROTOTYPES * DEPTH,
        other_flop=patches * 12.0 * PROTOTYPES + 2.0 * DEPTH * (_TILES * patches + cell_tiles * PROTOTYPES),
        memory_bytes=element_bytes * DEPTH * (patches + PROTOTYPES) + 4 * DEPTH + outputs,
        cache_bytes=element_bytes * DEPTH * (cell_tiles * PROTOTYPES + _TILES * patches) + 2 * summaries,
        blocks=cell_tiles * _TILES,
    )


def compiler_version() -> str:
    """Of nvcc, as ``13.0``.

    Raises:
        UsageError: There is no nvcc.
    """
    text = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return text.partition("release ")[2].partition(",")[0]


def _nvcc() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        msg = "nvcc is not found; install the CUDA toolkit, the compiler's report is part of the roofline"
        raise UsageError(msg)
    return nvcc


def compiler_report() -> list[Usage]:
    """Registers, shared memory and spills of every kernel on every architecture, from ``nvcc -Xptxas=-v``.

    Raises:
        UsageError: There is no nvcc.
    """
    nvcc = _nvcc()
    usages = []
    with tempfile.TemporaryDirectory(prefix="meliad-roofline-") as folder:
        for architecture in ARCHITECTURES:
            command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas=-v"]
            for source in SOURCES.values():
                done = subprocess.run(
                    [*command, str(source), "-o", f"{folder}/kernel.cubin"], capture_output=True, text=True, check=True
                )
                usages += _parse(done.stderr, architecture)
    return usages


def _parse(report: str, architecture: str) -> list[Usage]:
    pattern = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) "
        r"registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    usages: dict[str, Usage] = {}
    for match in pattern.finditer(report):
        kernel = _readable(match["symbol"])
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        usage = Usage(
            kernel,
            architecture,
            threads=_THREADS[kernel.partition("<")[0]],
            registers=int(match["registers"]),
            shared_bytes=int(shared[1]) if shared else 0,
            spilled_bytes=int(match["spilled"]),
        )
        # Of variants that differ in the width of their loads alone, the one with the most registers stands for all.
        if kernel not in usages or usage.registers > usages[kernel].registers:
            usages[kernel] = usage
    return list(usages.values())


def _readable(symbol: str) -> str:
    """A mangled name as ``kernel<type>``, without namespaces and without the width of loads."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = name.replace("meliad::cuda::", "").replace("(anonymous namespace)::", "").replace("void ", "")
    name = re.sub(r"<unsigned \w+, ", "<", name.partition("(")[0].strip())
    return name.replace("__half", "half").replace(" >", ">")


def to_markdown(usages: list[Usage]) -> str:
    """The page that lies beside the kernels."""
    lines = [
        "# What the CUDA kernels could reach",
        "",
        "Computed: from arithmetic, from bytes, and from the compiler's report. `kernels/gpu_check.sh` "
        "measures, on any machine with a GPU, and prints its figures beside the same limits. Made by "
        "`python -m meliad_edge.benchmarks roofline --markdown kernels/ROOFLINE.md`; a test compiles the kernels and "
        "compares.",
        "",
        f"## Scoring one image, {PROTOTYPES} prototypes of depth {DEPTH}",
        "",
        "Memory: what must be read or written once. Cache: what the blocks read through the second-level cache, and "
        "the summaries between the kernels. Limit: the longer of memory and the matrix product at the device's peaks. "
        "FP16 counts on tensor cores, FP32 on the ordinary ones, because tensor cores would round its operands. "
        "Everything else is a tenth of the operations or less; in FP16 the squared norms are on tensor cores, too.",
        "",
        "| patches | precision | product, MFLOP | other, MFLOP | memory, kB | cache, MB | blocks | "
        + " | ".join(f"limit on {device.name}, µs" for device in DEVICES)
        + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(DEVICES),
    ]
    for patches in PATCHES:
        for precision, element_bytes in (("FP32", 4), ("FP16", 2)):
            work = cost(patches, element_bytes)
            limits = " | ".join(_limit(work, device, element_bytes) for device in DEVICES)
            lines.append(
                f"| {patches:,} | {precision} | {work.flop / 1e6:,.0f} | {work.other_flop / 1e6:,.1f} | "
                f"{work.memory_bytes / 1e3:,.0f} | {work.cache_bytes / 1e6:,.1f} | {work.blocks:,} | {limits} |"
            )
    peaks = "; ".join(
        f"{device.name} {device.bytes_per_s / 1e9:,.0f} GB/s, {device.single_flops / 1e12:g} TFLOP/s in FP32, "
        f"{device.half_flops / 1e12:g} in dense FP16, {device.multiprocessors} multiprocessors"
        for device in DEVICES
    )
    lines += [
        "",
        f"Peaks, from NVIDIA's data sheets: {peaks}.",
        "",
        "What to expect: on an Orin the first kernel is bound by arithmetic in FP32 and by issuing instructions in "
        "FP16. On an H100 one image does not fill the device, and what is left is the time of one block, step by step. "
        "Measured there, beside these limits: [gpu_check_h100.md](../benchmarks/results/gpu_check_h100.md).",
        "",
        "## Resizing one frame to 256 x 256",
        "",
        "Every pixel of the frame is read once from memory and nothing is written but the result; the limit is that of "
        "memory. By an estimate made by hand from its machine code, the kernel takes about 75 million instructions for "
        "1280 x 720 and 68 million for 1920 x 1080, which AGX Orin issues in 28 and 26 µs at best: the smaller frame "
        "is bound by them.",
        "",
        "| frame | output | read, kB | written, kB | " + " | ".join(f"limit on {d.name}, µs" for d in DEVICES) + " |",
        "|---|---|---|---|" + "---|" * len(DEVICES),
    ]
    for height, width in FRAMES:
        for output, element_bytes in (("uint8", 1), ("FP16", 2), ("FP32", 4)):
            read, written = 3 * height * width, 3 * 256 * 256 * element_bytes
            limits = " | ".join(f"{1e6 * (read + written) / device.bytes_per_s:.1f}" for device in DEVICES)
            lines.append(f"| {width} x {height} | {output} | {read / 1e3:,.0f} | {written / 1e3:,.0f} | {limits} |")
    architectures = list(ARCHITECTURES)
    lines += [
        "",
        "## Registers, shared memory, occupancy",
        "",
        "Registers of a thread, shared memory of a block, and the share of a multiprocessor's warps that can be "
        f"resident, as nvcc {compiler_version()} compiles each kernel; none spills registers into memory.",
        "",
        "| kernel | threads | " + " | ".join(architectures) + " |",
        "|---|---|" + "---|" * len(architectures),
    ]
    by_kernel: dict[str, dict[str, Usage]] = {}
    for usage in usages:
        by_kernel.setdefault(usage.kernel, {})[usage.architecture] = usage
    for kernel, of in by_kernel.items():
        cells = " | ".join(
            f"{of[name].registers}, {of[name].shared_bytes:,} B, {of[name].occupancy:.0%}" for name in architectures
        )
        lines.append(f"| `{kernel}` | {of[architectures[0]].threads} | {cells} |")
    return "\n".join(lines) + "\n"


def _limit(work: Cost, device: Device, element_bytes: int) -> str:
    peak = device.half_flops if element_bytes == 2 else device.single_flops
    arithmetic_us, memory_us = 1e6 * work.flop / peak, 1e6 * work.memory_bytes / device.bytes_per_s
    return f"{max(arithmetic_us, memory_us):.1f} ({'arithmetic' if arithmetic_us > memory_us else 'memory'})"
