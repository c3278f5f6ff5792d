"""With what a score is measured: software, device, and the model's own preprocessing."""

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from align_train.distributed import world_size
from align_train.evaluation.encoder import Encoder

PACKAGES = (
    "align-train",
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "webdataset",
    "pillow",
    "opencv-python-headless",
)


def software() -> dict[str, str]:
    """Versions by name, Python's first."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def device_name(device: torch.device) -> str:
    """What the device calls itself: `NVIDIA H100 80GB HBM3`, `AMD EPYC 9575F 64-Core Processor, 8 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def measured_with(encoder: Encoder) -> dict[str, Any]:
    """Of an exam that this encoder takes, for its entry in result.json; plain values."""
    return {
        "preprocessing": encoder.inputs.facts(),
        "precision": encoder.encoding.precision,
        "device": device_name(encoder.device),
        "ranks": world_size(),
        "software": software(),
    }
