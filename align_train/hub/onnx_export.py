"""Both towers of an exported folder as ONNX files, checked with onnxruntime against the folder itself."""

import logging
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AlignModel, AlignProcessor

from align_train.corpus.sample_corpus import read_sample
from align_train.data.images import decode
from align_train.hub.exporting import ONNX_FOLDER
from align_train.models.align import normalised
from align_train.models.repairs import repair_pooling

TOWERS = ("image", "text")
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Largest difference of any embedding value; random weights of align_sample differ by 3e-7, of align_b3_mini by 6e-7.
TOLERANCE = 1e-5
LARGEST_FILE = 1_900_000_000  # bytes of weights that go into the .onnx file itself: protobuf ends at 2 GiB
PAIRS = 8
# The exporter tells of every node that it simplifies, and of each operator of torchvision, which we do not use.
QUIET = {
    "onnx_ir": logging.WARNING,
    "onnxscript": logging.WARNING,
    "torch.onnx._internal.exporter._registration": logging.ERROR,
}


def require_onnx() -> None:
    """Raise ValueError where the packages of the extra are missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"ONNX files need {', '.join(missing)}: install them with pip install 'align-train[onnx]', or leave "
            "onnx=true out"
        )


def export_onnx(folder: str | Path) -> float:
    """Add onnx/image.onnx and onnx/text.onnx to an exported Hugging Face folder, and prove them against it.

    image.onnx takes pixel_values, float32 (B, 3, H, W), and gives image_embeds (B, D); H and W are those of the
    folder's processor. text.onnx takes input_ids and attention_mask, int64 (B, L), and gives text_embeds (B, D). Rows
    have length 1, B and L are free. Weights lie in the file, or beside it in NAME.onnx.data where they are over 1.9 GB.

    The files appear under their names only when they are proved; those that were there before are replaced.

    Returns:
        The largest difference between embeddings by onnxruntime and by plain transformers, both on the CPU, of sample
        pairs in batches of several sizes, with and without padding.

    Raises:
        ValueError: they differ by more than 1e-5, or the packages of the extra [onnx] are missing.
        OSError: there is no such folder.
    """
    require_onnx()
    folder = Path(folder)
    batches = sample_batches(folder)
    temporary = folder.with_name(f".{folder.name}.onnx.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_towers(AlignModel.from_pretrained(folder), batches[0], temporary)
    difference = largest_difference(folder, temporary, batches)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the ONNX files differ from {folder} by {difference:.1e}, more than {TOLERANCE}: they stay in {temporary} "
            "for a look"
        )
    shutil.rmtree(folder / ONNX_FOLDER, ignore_errors=True)
    temporary.replace(folder / ONNX_FOLDER)
    return difference


def sample_batches(folder: Path) -> list[dict[str, Tensor]]:
    """Inputs of sample pairs by the folder's processor: eight with padding to the full length, three, and one alone."""
    processor = AlignProcessor.from_pretrained(folder)
    samples = [pair for pair, _ in zip(read_sample(), range(PAIRS), strict=False)]
    longest = min(processor.tokenizer.model_max_length, 64)  # a tokenizer without a limit says 10^30
    parts = [(samples, "max_length"), (samples[2:5], "longest"), (samples[-1:], "longest")]
    return [
        dict(
            processor(
                text=[pair.caption for pair in part],
                images=[decode(pair.image) for pair in part],
                padding=padding,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
        )
        for part, padding in parts
    ]


class _Image(nn.Module):
    def __init__(self, model: AlignModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return normalised(self.model.get_image_features(pixel_values).pooler_output)


class _Text(nn.Module):
    def __init__(self, model: AlignModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return normalised(self.model.get_text_features(input_ids, attention_mask).pooler_output)


def write_towers(model: AlignModel, batch: dict[str, Tensor], folder: Path) -> None:
    """Write image.onnx and text.onnx of a plain model, which is changed; `batch` shows the shapes of its inputs."""
    # As shipped it is a window of as many pixels as there are channels, larger than the image: right and as fast in
    # onnxruntime, but what another runtime makes of it is not ours to promise.
    repair_pooling(model)
    count, length = Dim("batch"), Dim("length")
    _write(_Image(model), model.vision_model, batch, {"pixel_values": {0: count}}, folder / "image.onnx")
    shapes = {"input_ids": {0: count, 1: length}, "attention_mask": {0: count, 1: length}}
    _write(_Text(model), model.text_model, batch, shapes, folder / "text.onnx")


def _write(
    tower: nn.Module, weights: nn.Module, batch: dict[str, Tensor], shapes: dict[str, dict[int, Dim]], path: Path
) -> None:
    size = sum(value.nbytes for value in weights.state_dict().values())
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    with warnings.catch_warnings():
        # torch 2.13: its own use of a name that it has deprecated, and two inputs with the same free axes
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
        torch.onnx.export(
            tower.eval(),
            tuple(batch[name] for name in shapes),
            path,
            input_names=list(shapes),
            output_names=[f"{path.stem}_embeds"],
            dynamo=True,
            dynamic_shapes=tuple(shapes.values()),
            external_data=size > LARGEST_FILE,
            verbose=False,
        )


@torch.inference_mode()
def largest_difference(folder: Path, files: Path, batches: list[dict[str, Tensor]]) -> float:
    """Between the embeddings of `batches` by the ONNX files in `files` and by the model in `folder`; nan if one is."""
    import onnxruntime  # type: ignore[import-untyped]  # it has no types

    plain = AlignModel.from_pretrained(folder).eval()
    differences = []
    for tower in TOWERS:
        session = onnxruntime.InferenceSession(files / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        for batch in batches:
            found = session.run([f"{tower}_embeds"], {name: batch[name].numpy() for name in names})[0]
            differences.append(np.abs(found - plain(**batch)[f"{tower}_embeds"].numpy()).max())
    return float(np.max(differences))
