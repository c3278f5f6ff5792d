"""How a folder's own processor makes inputs, for models that are trained on ours."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from align_train.data.tokens import load_tokenizer


def check_vocabulary(folder_or_repo: str | Path, rows: int) -> int:
    """Compare its tokenizer with ours; the longest text in tokens, at most the 64 to which AlignProcessor pads.

    Args:
        folder_or_repo: of transformers.
        rows: tokens that the text tower knows.

    Raises:
        ValueError: the vocabulary is another one, or larger than the text tower's.
    """
    ours = load_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_repo, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"the tokenizer of {folder_or_repo} cannot be loaded: {str(error).strip()}") from error
    if tokenizer.get_vocab() != ours.get_vocab():
        raise ValueError(
            f"{folder_or_repo} has another vocabulary, of {len(tokenizer)} tokens, than bert-base-uncased, by which "
            "training reads captions: its text tower would take them for other words (without the tokenizer's files, "
            "transformers makes one up of 5 tokens)"
        )
    if rows < len(ours):
        raise ValueError(
            f"the text tower of {folder_or_repo} knows {rows} tokens (vocab_size), but its tokenizer has {len(ours)}: "
            "they are not of one model"
        )
    return min(tokenizer.model_max_length, 64)  # a tokenizer without a limit says 10^30


def sides(processor: EfficientNetImageProcessorPil, folder_or_repo: str | Path) -> tuple[int, int]:
    """Pixels a side of the resized and of the cropped image.

    Raises:
        ValueError: they are no squares.
    """
    size = _side(processor.size, "size", folder_or_repo)
    return size, _side(processor.crop_size, "crop_size", folder_or_repo) if processor.do_center_crop else size


def pixel_scale(processor: EfficientNetImageProcessorPil) -> tuple[Tensor, Tensor]:
    """Factor and shift, float64 (3,) each: its input is factor * (x / 127.5 - 1) + shift of a pixel x.

    Read off what the processor makes of black and white, so whatever its settings mean.
    """
    black, white = (
        torch.as_tensor(processor(images=Image.new("RGB", (8, 8), colour), return_tensors="np")["pixel_values"][0])
        for colour in ("black", "white")
    )
    middle = black.shape[1] // 2
    low, high = black[:, middle, middle].double(), white[:, middle, middle].double()
    return (high - low) / 2, (high + low) / 2


def _side(size: object, name: str, folder_or_repo: str | Path) -> int:
    height, width = getattr(size, "height", None), getattr(size, "width", None)
    if not height or height != width:
        raise ValueError(
            f"{name} of the image processor of {folder_or_repo} is {size}, but images are squares in training: set "
            "the same height and width in preprocessor_config.json"
        )
    return int(height)
