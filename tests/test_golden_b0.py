"""EfficientNet-B0 with Dense(640) against the reference implementation: evaluation, training, six optimizer steps."""

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from align_train.losses import contrastive_loss, row_losses
from align_train.models import Align, build_align
from align_train.models.align import normalised
from align_train.models.batch_norm import GhostBatchNorm2d
from align_train.optim import lamb, linear

BLOCKS = "1a 2a 2b 3a 3b 4a 4b 4c 5a 5b 5c 6a 6b 6c 6d 7a".split()
LAYERS = {
    "expand_conv": "expansion.expand_conv",
    "expand_bn": "expansion.expand_bn",
    "dwconv": "depthwise_conv.depthwise_conv",
    "bn": "depthwise_conv.depthwise_norm",
    "se_reduce": "squeeze_excite.reduce",
    "se_expand": "squeeze_excite.expand",
    "project_conv": "projection.project_conv",
    "project_bn": "projection.project_bn",
}
STEM = {"stem_conv": "embeddings.convolution", "stem_bn": "embeddings.batchnorm"}
VARIABLES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
Arrays = dict[str, np.ndarray]


class Tower(nn.Module):
    """The reference's image side and its temperature; ours has no dense layer, so the test brings it."""

    def __init__(self, weights: Arrays, start: str, channels_last: bool) -> None:
        super().__init__()
        self.align = build_align(
            vision={"width": 1.0, "depth": 1.0, "stochastic_depth": 0.0, "channels_last": channels_last},
            text={"layers": 1, "width": 32, "heads": 2, "positions": 64},
            batch_norm={"statistics": "virtual", "group_size": 16},
            temperature={},
            preprocessing={},
            projection_dim=320,
        )
        self.align.text_model.requires_grad_(False)
        self.align.text_projection.requires_grad_(False)
        self.dense = nn.Linear(320, 640)
        names = [str(name) for name in weights["names"]]
        own = {name: weights.get(f"{start}|{name}", weights[f"init|{name}"]) for name in names}
        state = {torch_name(name): as_torch(name, array) for name, array in own.items()}
        missing, unexpected = self.load_state_dict(state, strict=False)
        assert len(state) == 306
        assert not unexpected
        assert all(".text_" in name or name.endswith(("num_batches_tracked", ".temperature")) for name in missing)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, 640), not normalised."""
        return self.dense(self.align.get_image_features(pixels / 127.5 - 1).pooler_output)


def torch_name(name: str) -> str:
    """Where a Keras variable lies in the tower: block2a_expand_bn/gamma:0 to ...blocks.1.expansion.expand_bn.weight."""
    if name == "Variable:0":
        return "align.temperature"
    layer, variable = name.removesuffix(":0").split("/")
    if layer == "dense":
        return f"dense.{VARIABLES[variable]}"
    if layer in STEM:
        return f"align.vision_model.{STEM[layer]}.{VARIABLES[variable]}"
    block, part = re.fullmatch(r"block(..)_(.+)", layer).groups()
    return f"align.vision_model.encoder.blocks.{BLOCKS.index(block)}.{LAYERS[part]}.{VARIABLES[variable]}"


def as_torch(name: str, array: np.ndarray) -> Tensor:
    """Keras's layout to PyTorch's: HWIO to OIHW, depthwise (k, k, C, 1) to (C, 1, k, k), dense (in, out) to (out, in)."""
    order = range(array.ndim)[::-1]
    if array.ndim == 4:
        order = (2, 3, 0, 1) if "depthwise_kernel" in name else (3, 2, 0, 1)
    return torch.from_numpy(array.transpose(*order)).contiguous()


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def moving_distance(tower: Tower, reference: Arrays, prefix: str) -> float:
    """Largest difference of the 96 moving statistics: means in standard deviations, variances relative.

    A mean can be zero but for rounding: behind a convolution of normalised values without a bias.
    """
    names = [name for name in reference if name.startswith(prefix) and "/moving_" in name]
    assert len(names) == 96
    state, worst = tower.state_dict(), 0.0
    for name in names:
        variance = torch.from_numpy(reference[name.replace("moving_mean", "moving_variance")])
        scale = variance.sqrt() if "moving_mean" in name else variance
        difference = state[torch_name(name.removeprefix(prefix))] - torch.from_numpy(reference[name])
        worst = max(worst, (difference.abs() / scale).max().item())
    return worst


@pytest.fixture(scope="module")
def numbers(golden: Path) -> Arrays:
    with np.load(golden / "b0.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def trajectory(golden: Path) -> Arrays:
    with np.load(golden / "traj_b0.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def weights(large_golden: Path) -> Iterator[Arrays]:
    """The two sets of weights, and while they are in use: two threads, and freed memory kept.

    glibc gives large blocks back and fetches them anew, page by page: more than half the time of these tests.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(option, 2**31 - 1)
    with np.load(large_golden / "b0_weights.npz") as arrays:
        yield dict(arrays)
    for option in (-1, -3):
        mallopt(option, 128 * 1024)
    torch.set_num_threads(threads)


def pixels(numbers: Arrays, name: str, channels_last: bool) -> Tensor:
    """(B, 289, 289, 3) uint8 as (B, 3, 289, 289), in the memory format that is asked for."""
    images = torch.from_numpy(numbers[name]).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def watch_blocks(model: Align, seen: dict[str, Tensor]) -> None:
    """Have every block's output written into `seen`, under Keras's name."""
    vision = model.vision_model
    for name, part in zip(["stem", *(f"block{b}" for b in BLOCKS)], [vision.embeddings, *vision.encoder.blocks]):
        part.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))


@FORMATS
@pytest.mark.parametrize("start", ["init", "pert"])
def test_evaluation(numbers, weights, start, channels_last):
    tower, seen = Tower(weights, start, channels_last).eval(), {}
    watch_blocks(tower.align, seen)
    images = pixels(numbers, "x2", channels_last)
    with torch.no_grad():
        emb = tower(images)
        unit = tower.align.encode_image(images)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert len(seen) == 17
    w=0
    for name, output in seen.items():
        batch, height, width, channels = numbers[f"{start}_eval|block_shape|{name}"].tolist()
        assert output.shape == (batch, channels, height, width)
        assert output.is_contiguous(memory_format=layout)
        means = torch.from_numpy(numbers[f"{start}_eval|block_mean|{name}"])
        w=max(w,distance(output.mean((2, 3)), means))
        assert distance(output.mean((2, 3)), means) < 1e-4, name
    pooled = torch.from_numpy(numbers[f"{start}_eval|pooled"])
    print("EVAL", w, distance(emb, torch.from_numpy(numbers[f"{start}_eval|emb"])), distance(unit, normalised(pooled)))
    assert distance(emb, torch.from_numpy(numbers[f"{start}_eval|emb"])) < 2.5e-5
    assert distance(unit, normalised(pooled)) < 2.5e-5


@FORMATS
def test_training_forward_from_keras_start(numbers, weights, channels_last):
    tower = Tower(weights, "init", channels_last).train()
    with torch.no_grad():
        emb = tower(pixels(numbers, "x32", channels_last))
    print("INIT", distance(emb, torch.from_numpy(numbers["init_train|emb"])), moving_distance(tower, numbers, "init_train|after|"))


@FORMATS
def test_training_forward_and_backward(numbers, weights, channels_last):
    tower = Tower(weights, "pert", channels_last).train()
    emb = tower(pixels(numbers, "x32", channels_last))
    loss = (emb * torch.from_numpy(numbers["pert_train|upstream"])).sum() / 32
    loss.backward()
    print("PERT", distance(emb.detach(), torch.from_numpy(numbers["pert_train|emb"])), moving_distance(tower, numbers, "pert_train|after|"))
    print(loss.item() / numbers["pert_train|loss"]-1)
    with torch.no_grad():
        unit = tower.eval()(pixels(numbers, "x2", channels_last))
    print("MOVED", distance(unit, torch.from_numpy(numbers["pert_eval|emb"])))
    gradients = {name: p.grad for name, p in tower.named_parameters()}
    names = [str(n) for n in numbers["trainable_names"]]
    w=[]; z=[]
    for name, norm in zip(names, numbers["pert_train|grad_norms"], strict=True):
        own = gradients[torch_name(name)]
        if norm < 1e-3: z.append(own.norm().item()); assert name.endswith("project_bn/beta:0")
        else: w.append(abs(own.norm().item()/norm-1))
    print("NORMS", max(w), max(z), len(z))
    w=[]
    for name in names:
        if f"pert_train|grad|{name}" in numbers:
            e = as_torch(name, numbers[f"pert_train|grad|{name}"])
            if e.norm()>1e-3: w.append(distance(gradients[torch_name(name)], e))
    print("GRADS", max(w), len(w))


@pytest.mark.parametrize(("channels_last", "steps"), [(False, 6), (True, 3)])
def test_trajectory(numbers, weights, trajectory, channels_last, steps):
    tower = Tower(weights, "pert", channels_last).train()
    optimizer = lamb(tower, lr=0.005)
    schedule = LambdaLR(optimizer, linear(2, 10))
    text = normalised(torch.from_numpy(trajectory["txt"]))
    temperature, parameters = tower.align.temperature, dict(tower.named_parameters())
    images, names = pixels(numbers, "x32", channels_last), [str(name) for name in trajectory["names"]]
    quiet = np.array([not n.endswith("project_bn/beta:0") for n in names])
    for step in range(steps):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(trajectory["lr"][step], rel=1e-6)
        image = normalised(tower(images))
        loss = contrastive_loss(image, text, temperature)
        one_way = row_losses(image.detach(), text, temperature.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        norms = np.array([parameters[torch_name(name)].norm().item() for name in names])
        off = np.abs(norms / trajectory["norms"][step].clip(1e-9) - 1)
        print("TRAJ", channels_last, step, loss.item() - trajectory["loss"][step], one_way.item() - trajectory["loss_i2t"][step], temperature.item() - trajectory["temperature"][step], np.median(off), off[quiet].max(), off[~quiet].max())
    if steps == 6:
        for n in trajectory:
            if n.startswith("after6|") and "moving" not in n: print(n, distance(parameters[torch_name(n[7:])], as_torch(n, trajectory[n])))
        print(moving_distance(tower, trajectory, "after6|"))
