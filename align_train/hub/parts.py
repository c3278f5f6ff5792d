"""An ALIGN model of two towers that were trained apart: EfficientNet for images, BERT for texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AlignConfig,
    AlignTextConfig,
    AlignVisionConfig,
    BertConfig,
    BertModel,
    EfficientNetConfig,
    EfficientNetModel,
    PreTrainedConfig,
)
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from align_train.hub.loading import RESTORE
from align_train.hub.preprocessing import check_vocabulary, pixel_scale, sides
from align_train.hub.pretrained import kind_of, part_of_model
from align_train.models import Align, restore_align
from align_train.models.align import vision_width
from align_train.models.restoring import config_fields, restoring_settings
from align_train.records import Preprocessing

START = 0.07  # of the temperature: CLIP's (arXiv 2103.00020, section 2.5), as in our model align_sample
BOUNDS = (0.01, 10.0)
TOP = "encoder.top_"  # EfficientNet's last convolution and batch norm, before its classes: AlignModel has none
# Keras's EfficientNet, from which transformers' weights come, takes (x / 255 - mean) / std with ImageNet's
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parts_node(image: str | Path, text: str | Path, temperature: float = START) -> dict[str, Any]:
    """The model node of a recipe that starts from `load_parts`; plain values, errors as there."""
    return {"_target_": RESTORE, **_settings(image, text, temperature)}


def load_parts(
    image: str | Path, text: str | Path, temperature: float = START
) -> tuple[Align, dict[str, Any], list[str]]:
    """A repaired model with the towers of an EfficientNet and a BERT, folders or hub ids, with any heads or none.

    The text projection is fresh, from torch's generator, and so is the temperature. The scale of the EfficientNet's
    inputs goes into its stem, since ALIGN's are x / 127.5 - 1.

    Args:
        image: such as google/efficientnet-b7. EfficientNet's top convolution is left out, as in AlignModel.
        text: such as google-bert/bert-base-uncased; the vocabulary must be that one's.
        temperature: where the divisor of the logits starts.

    Returns:
        The model; its node, as of `parts_node`; lines that say what was taken, left out and made anew.

    Raises:
        ValueError: a folder holds another architecture or vocabulary, or not all weights of its tower; images are no
            squares; the text tower takes fewer than 64 tokens.
        OSError: there is no such folder, nor such a repository within reach.
    """
    settings = _settings(image, text, temperature)
    pictures, lacking, heads = part_of_model(EfficientNetModel, image, may_lack=(TOP,))
    words, fresh, other_heads = part_of_model(BertModel, text, may_lack=("pooler.",))
    model = restore_align(**settings)
    weights, text_weights = pictures.state_dict(), words.state_dict()
    taken = {name: value for name, value in weights.items() if not name.startswith(TOP)}
    model.vision_model.load_state_dict(taken)
    model.text_model.load_state_dict(text_weights)
    processor = _processor(image)
    factor, shift = _scale(processor)
    fold_scale(model, factor, shift)
    left = sorted(weights.keys() - taken.keys() - set(lacking)) + heads
    told = [
        f"image tower: {len(taken)} tensors of {image}, EfficientNet; {_left_out(left)}",
        f"text tower: {len(text_weights) - len(fresh)} tensors of {text}, BERT; {_left_out(other_heads)}",
        _told_of_fresh(model, bool(fresh)),
        _told_of_sizes(processor, model.preprocessing),
        _told_of_scale(processor, factor, shift, model.preprocessing.crop),
    ]
    return model, {"_target_": RESTORE, **settings}, told


@torch.no_grad()
def fold_scale(model: Align, factor: Tensor, shift: Tensor) -> None:
    """Let an image tower that was trained on factor * x + shift take x: (3,) each, one value a channel.

    The factor goes into the first convolution, what the shift adds to its outputs into the batch norm's mean. Exact for
    images of an odd size, which the first convolution does not pad (it pads one row and column, for stride 2). At even
    sizes that row and column were 0 to the tower and are `shift` now: a grey border of one pixel instead of a border of
    the mean colour, which moved features of an untrained B0 less than noise of one grey level in 255 did.
    """
    stem = model.vision_model.embeddings
    weight = stem.convolution.weight
    added = (weight.double() * shift.double().view(1, -1, 1, 1)).sum((1, 2, 3))
    stem.batchnorm.running_mean.sub_(added)
    weight.mul_(factor.view(1, -1, 1, 1))


def _settings(image: str | Path, text: str | Path, temperature: float) -> dict[str, Any]:
    kind_of(image, ["efficientnet"], "image tower")
    kind_of(text, ["bert"], "text tower")
    vision, words = EfficientNetConfig.from_pretrained(image), BertConfig.from_pretrained(text)
    _check_sizes(vision, image, words, text)
    tokens = check_vocabulary(text, words.vocab_size)
    resize, crop = _sides(_processor(image), vision, image)
    config = AlignConfig(
        text_config=_shared(words, AlignTextConfig),
        vision_config={**_shared(vision, AlignVisionConfig), "pooling_type": "mean"},
        projection_dim=vision_width(vision.width_coefficient, vision.depth_divisor),
        temperature_init_value=temperature,
    )
    return restoring_settings(config, Preprocessing(resize, crop, antialias=True, max_tokens=tokens), BOUNDS)


def _shared(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> dict[str, Any]:
    names = config_fields(kind) - config_fields(PreTrainedConfig)
    return {name: getattr(config, name) for name in sorted(names)}


def _check_sizes(vision: EfficientNetConfig, image: str | Path, words: BertConfig, text: str | Path) -> None:
    if vision.num_channels != 3 or vision.out_channels[-1] != 320:
        raise ValueError(
            f"{image} is no EfficientNet of the paper: num_channels must be 3 and the last of out_channels 320, not "
            f"{vision.num_channels} and {vision.out_channels[-1]}"
        )
    if words.max_position_embeddings < 64:
        raise ValueError(
            f"the text tower of {text} takes {words.max_position_embeddings} tokens (max_position_embeddings), but "
            "transformers' AlignProcessor pads to 64: choose a BERT of at least 64"
        )
    if words.is_decoder:
        raise ValueError(f"{text} is a decoder (is_decoder), which does not see a text's end from its start")


def _processor(image: str | Path) -> EfficientNetImageProcessorPil | None:
    try:
        return EfficientNetImageProcessorPil.from_pretrained(image)
    except OSError:  # a folder with weights alone, which is told
        return None


def _sides(
    processor: EfficientNetImageProcessorPil | None, config: EfficientNetConfig, image: str | Path
) -> tuple[int, int]:
    if processor is not None:
        return sides(processor, image)
    size = config.image_size
    both = set(size) if isinstance(size, Sequence) else {size}
    if len(both) != 1:
        raise ValueError(f"image_size of {image} is {size}, but images are squares in training: set it to one number")
    side = int(both.pop())
    return side, side


def _scale(processor: EfficientNetImageProcessorPil | None) -> tuple[Tensor, Tensor]:
    if processor is not None:
        return pixel_scale(processor)
    mean, std = torch.tensor(IMAGENET_MEAN).double(), torch.tensor(IMAGENET_STD).double()
    return 0.5 / std, (0.5 - mean) / std


def _left_out(names: Sequence[str]) -> str:
    kinds = sorted({".".join(name.split(".")[:-1][:2]) for name in names})
    return f"left out: {len(names)} ({', '.join(kinds)})" if names else "nothing left out"


def _told_of_fresh(model: Align, pooler: bool) -> str:
    layer = model.text_projection
    told = f"fresh: text_projection ({layer.in_features} to {layer.out_features}), temperature "
    told += f"{model.config.temperature_init_value:g}"
    return told + (", and the text tower's pooler, which ALIGN does not use" if pooler else "")


def _told_of_sizes(processor: EfficientNetImageProcessorPil | None, inputs: Preprocessing) -> str:
    source = "image_size, as it has no image processor" if processor is None else "its image processor"
    told = f"images: resized to {inputs.resize}, cropped to {inputs.crop} ({source})"
    if processor is not None and processor.resample != Image.Resampling.BILINEAR:
        own = Image.Resampling(processor.resample).name.lower()
        told += f", with a bilinear filter where the processor has {own}"
    return told


def _told_of_scale(processor: EfficientNetImageProcessorPil | None, factor: Tensor, shift: Tensor, crop: int) -> str:
    if torch.allclose(factor, torch.ones_like(factor)) and torch.allclose(shift, torch.zeros_like(shift), atol=1e-6):
        return "pixels: x / 127.5 - 1, as the image tower was trained"
    source = "taken for ImageNet's mean and deviation" if processor is None else "from its image processor"
    times, plus = (", ".join(f"{value:.3g}" for value in values.tolist()) for values in (factor, shift))
    exact = "exact" if crop % 2 else f"exact but for one row and column of zeros that images of {crop} are padded with"
    return (
        f"pixels: x / 127.5 - 1; that the image tower was trained on ({times}) times that, plus ({plus}), {source}, is "
        f"now in its first layer: {exact}"
    )
