"""What the benchmarks of a training step share: a batch like COYO's, models of presets, and memory."""

import json
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from align_train.models import Align, build_align
from align_train.shipped import config_folder

GROUP, PIXELS, LONGEST, SHORTEST = 16, 289, 64, 3
MEAN, SPREAD = 16.0, 0.5  # as in text.py


def batch_of(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (size, 3, 289, 289) uint8 in NHWC memory as a decoder leaves them, ids and mask (size, 64)."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size, PIXELS, PIXELS, 3), dtype=torch.uint8, generator=random).permute(0, 3, 1, 2)
    drawn = torch.empty(size).log_normal_(math.log(MEAN) - SPREAD**2 / 2, SPREAD, generator=random)
    mask = (torch.arange(LONGEST) < drawn.round().clamp(SHORTEST, LONGEST)[:, None]).long()
    return pixels, torch.randint(1, 30522, mask.shape, generator=random) * mask, mask


def model_of(preset: str, **changes: Any) -> Align:
    """A shipped preset's model with fresh weights."""
    torch.manual_seed(0)
    recipe = yaml.safe_load((config_folder() / "model" / f"{preset}.yaml").read_text())
    del recipe["_target_"]
    return build_align(**{**recipe, **changes})


def resident(name: str) -> int:
    """Bytes now (VmRSS) or at most (VmHWM); unlike ru_maxrss, the latter knows nothing of the process that forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def peak(device: str) -> int:
    """Bytes at most, of the process or of what the GPU's allocator gave out."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def apart(module: str, task: str, *given: Any) -> dict:
    """A task of a module in this folder in a fresh process, whose allocator nobody has touched."""
    code = f"import json, {module}; print(json.dumps({module}.{task}(*{given!r})))"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
