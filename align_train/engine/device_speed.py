"""How fast a device can be at best: what its maker says, or what a matrix product reaches."""

import re
import time
from dataclasses import dataclass

import torch

DTYPES = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}  # of Lightning's precisions; every other multiplies in float32

# Dense peaks in 1e12 FLOP/s: float16, bfloat16 (None: not in hardware), TF32, float32, and the data sheet. Where that
# has numbers "with sparsity" alone, half of them. 16-bit products are added up in float32.
_SHEETS: dict[str, tuple[float, float | None, float | None, float, str]] = {
    r"B200\b": (2250, 2250, 1100, 75, "NVIDIA HGX B200"),
    r"GH200\b": (989, 989, 494, 67, "NVIDIA GH200 Grace Hopper data sheet"),
    r"H200 NVL\b": (835, 835, 417, 60, "NVIDIA H200 data sheet, NVL"),
    r"H200\b": (989, 989, 494, 67, "NVIDIA H200 data sheet, SXM"),
    r"H100 PCIe\b": (756, 756, 378, 51, "NVIDIA H100 data sheet, PCIe"),
    r"H100 NVL\b": (835, 835, 417, 60, "NVIDIA H100 data sheet, NVL"),
    r"H100\b.*HBM3\b": (989, 989, 494, 67, "NVIDIA H100 data sheet, SXM"),
    r"A100\b": (312, 312, 156, 19.5, "NVIDIA A100 data sheet"),
    r"L40S\b": (362, 362, 183, 91.6, "NVIDIA L40S data sheet"),
    r"L4\b": (121, 121, 60, 30.3, "NVIDIA L4 data sheet"),
    r"V100-SXM2\b": (125, None, None, 15.7, "NVIDIA V100 data sheet, SXM2"),
    r"V100-PCIE\b": (112, None, None, 14, "NVIDIA V100 data sheet, PCIe"),
    r"T4\b": (65, None, None, 8.1, "NVIDIA T4 data sheet"),
    r"RTX 4090$": (165.2, 165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture, appendix A"),
    r"RTX 3090$": (71, 71, 35.6, 35.6, "NVIDIA Ampere GA102 GPU architecture, appendix A"),
}

SECONDS = 0.3  # for which a device that no sheet knows is measured


@dataclass(frozen=True)
class Peak:
    """The most floating-point operations a second that one device does, and where the number comes from."""

    flops: float
    source: str


def peak_of(device: torch.device, precision: str = "32-true") -> Peak:
    """The peak of a device in one of Lightning's precisions: published where it is known, else measured."""
    dtype = DTYPES.get(precision, torch.float32)
    if device.type == "cuda":
        # cuDNN multiplies float32 as TF32 unless told otherwise, and most of the work is convolutions
        known = published(torch.cuda.get_device_name(device), dtype, tf32=torch.backends.cudnn.allow_tf32)
        if known:
            return known
    return measured(device, dtype)


def published(name: str, dtype: torch.dtype, tf32: bool = False) -> Peak | None:
    """Of a GPU by the name that CUDA knows it by; None where no peak is known, as of a part of one (MIG)."""
    row = next((row for pattern, row in _SHEETS.items() if re.search(rf"(?<!\w){pattern}", name)), None)
    if row is None or "MIG" in name:
        return None
    half, brain, tensor, single, sheet = row
    single_peak, kind = (tensor, "TF32") if tf32 and tensor else (single, "float32")
    peaks = {torch.float16: (half, "float16"), torch.bfloat16: (brain, "bfloat16")}
    teraflops, kind = (single_peak, kind) if dtype == torch.float32 else peaks.get(dtype, (None, ""))
    return Peak(teraflops * 1e12, f"published for {kind}: {sheet}") if teraflops else None


def measured(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best that products of square matrices reach within about SECONDS, here and now."""
    side = 4096 if device.type == "cuda" else 1024
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    first = True
    while first or time.perf_counter() - start < SECONDS:
        begun = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, first = min(best, time.perf_counter() - begun), False
    kind = str(dtype).removeprefix("torch.")
    return Peak(2 * side**3 / best, f"measured with {kind} matrices of {side} x {side}")
