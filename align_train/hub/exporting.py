"""A trained model as a Hugging Face folder, proved equal after a plain reload."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AlignConfig, AlignModel, AlignProcessor
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from align_train.corpus.sample_corpus import read_sample
from align_train.data.images import centre_crop, decode, resize
from align_train.data.tokens import load_tokenizer
from align_train.models import Align
from align_train.records import Preprocessing

ONNX_FOLDER = "onnx"  # in an exported folder, where `export_onnx` writes these
ONNX_FILES = {f"{tower}.onnx{ending}" for tower in ("image", "text") for ending in ("", ".data")}
TOLERANCE = 1e-5  # largest difference of any embedding value after a reload; float32 rounding is some 3e-7


def export_hf(model: Align, folder: str | Path, card: str = "") -> float:
    """Write config, safetensors, processor, tokenizer and model card, and prove the folder by reloading it.

    The folder appears under its name only when it is whole and proved; one that was there before is replaced.

    Args:
        model: any device, any mode; not changed.
        folder: where to.
        card: text of README.md, the model card.

    Returns:
        The largest difference between embeddings of the model and of the reloaded folder.

    Raises:
        ValueError: they differ by more than 1e-5, a weight is not finite, or the folder is a file or holds something
            else.
    """
    folder = Path(folder)
    _check_replaceable(folder)
    _check_finite(model)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain_model(model).save_pretrained(temporary)
    build_processor(model.preprocessing).save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    difference = largest_difference(model, temporary)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the export differs from the model by {difference:.1e} after a reload, more than {TOLERANCE}: it stays in "
            f"{temporary} for a look"
        )
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)
    return difference


def plain_model(model: Align) -> AlignModel:
    """transformers' own AlignModel with the weights of `model`, on the CPU in float32, in evaluation mode."""
    plain = AlignModel(AlignConfig.from_dict(model.config.to_dict()))
    plain.load_state_dict({name: value.float().cpu() for name, value in model.state_dict().items()})
    return plain.eval()


def build_processor(preprocessing: Preprocessing) -> AlignProcessor:
    """transformers' processor for the model's inputs: resize, centre crop, x / 127.5 - 1, WordPiece.

    It resizes with Pillow's antialiasing, whatever `preprocessing.antialias` says: transformers has no other.
    """
    image = EfficientNetImageProcessorPil(
        do_resize=True,
        size={"height": preprocessing.resize, "width": preprocessing.resize},
        resample=Image.Resampling.BILINEAR,
        do_center_crop=preprocessing.crop < preprocessing.resize,
        crop_size={"height": preprocessing.crop, "width": preprocessing.crop},
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    )
    return AlignProcessor(image, load_tokenizer(preprocessing.max_tokens))


@torch.inference_mode()
def largest_difference(model: Align, folder: Path, pairs: int = 8) -> float:
    """Reload `folder` with transformers alone and compare embeddings and inputs of sample pairs with `model`'s."""
    reloaded, processor = AlignModel.from_pretrained(folder).eval(), AlignProcessor.from_pretrained(folder)
    samples = [pair for pair, _ in zip(read_sample(), range(pairs), strict=False)]
    images = [decode(pair.image) for pair in samples]
    inputs = processor(
        text=[pair.caption for pair in samples],
        images=images,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=model.preprocessing.max_tokens,
    )
    outputs = reloaded(**inputs)
    size, crop = model.preprocessing.resize, model.preprocessing.crop
    ours = torch.stack(
        [_scaled(centre_crop(resize(np.asarray(image), size, antialias=True), crop)) for image in images]
    )
    # On the CPU in float32, as the reloaded one: a GPU's TF32 alone would differ by 1e-3.
    model = copy.deepcopy(model).float().cpu().eval()
    image, text = model.encode_image(ours), model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    differences = torch.cat([outputs.image_embeds - image, outputs.text_embeds - text])
    return differences.abs().max().item()  # nan, should there be one


def _scaled(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1


def _check_replaceable(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_export(folder)):
        raise ValueError(f"{folder} is there and is no exported model: choose another folder with folder=...")


def is_export(folder: Path) -> bool:
    """Files alone, but for ours in onnx/, with the config of an ALIGN model: nothing that an export may not replace."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    is_align = isinstance(config, dict) and config.get("model_type") == "align"
    return is_align and all(entry.is_file() or _is_of_onnx(entry) for entry in folder.iterdir())


def _is_of_onnx(folder: Path) -> bool:
    return folder.name == ONNX_FOLDER and {entry.name for entry in folder.iterdir()} <= ONNX_FILES


def _check_finite(model: Align) -> None:
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{len(bad)} tensors of the model are not finite, the first is {bad[0]}: the run diverged, export an "
            "earlier checkpoint"
        )
