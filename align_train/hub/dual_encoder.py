"""Any dual encoder of transformers for exams: its plain model, its own processor, embeddings of length 1."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AlignModel,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipModel,
    VisionTextDualEncoderModel,
)

from align_train.corpus.images import decode
from align_train.data.inputs import Inputs
from align_train.hub.pretrained import kind_of, whole_model
from align_train.models.align import normalised

KINDS: dict[str, type[PreTrainedModel]] = {
    "align": AlignModel,
    "clip": CLIPModel,
    "siglip": SiglipModel,  # SigLIP 2 of fixed resolution too; its NaFlex models are of type siglip2
    "vision-text-dual-encoder": VisionTextDualEncoderModel,
}


@dataclass(frozen=True)
class ProcessorInputs:
    """Inputs as a model's own processor makes them.

    Attributes:
        processor: transformers' image processor, of those that work with Pillow.
        tokenizer: the model's.
        max_tokens: longest text, special tokens included; longer ones are cut.
        pad_to_max: pad every text to `max_tokens`, as SigLIP was trained, whose text tower sees the padding; otherwise
            to the longest of the texts.
        lower_case: lower-case texts first.
    """

    processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    pad_to_max: bool = False
    lower_case: bool = False

    def image(self, content: bytes, where: str = "image") -> np.ndarray:
        """float32 (3, H, W), the processor's; Unusable as `decode`. Several threads may call it."""
        pixels = self.processor(images=decode(content, where), return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels, np.float32)

    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 (B, L). One thread at a time: padding is a state of the tokenizer."""
        encoded = self.tokenizer(
            [caption.lower() for caption in captions] if self.lower_case else list(captions),
            padding="max_length" if self.pad_to_max else "longest",
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def facts(self) -> dict[str, Any]:
        """Of the processor's settings; None for a step that it leaves out."""
        settings = self.processor.to_dict()

        def used(step: str, name: str) -> Any:
            return settings.get(name) if settings.get(step) else None

        filter_number = used("do_resize", "resample")
        mean, std = used("do_normalize", "image_mean"), used("do_normalize", "image_std")
        return {
            "processor": type(self.processor).__name__,
            "size": used("do_resize", "size"),
            "crop": used("do_center_crop", "crop_size"),
            "interpolation": None if filter_number is None else Image.Resampling(filter_number).name.lower(),
            "antialias": True,  # Pillow always does
            "mean": None if mean is None else list(mean),
            "std": None if std is None else list(std),
            "max_tokens": self.max_tokens,
            "padding": "max_length" if self.pad_to_max else "longest",
            "lower_case": self.lower_case,
        }


class DualEncoder(nn.Module):
    """A plain model of transformers with `encode_image` and `encode_text`. `load_dual_encoder` makes one.

    Attributes:
        model: transformers' own, one of KINDS.
        inputs: what makes its inputs.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images: (B, 3, H, W) as `inputs` gives them to (B, D), float32 rows of length 1."""
        return normalised(self.model.get_image_features(pixels).pooler_output)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts: ids and mask (B, L) to (B, D), float32 rows of length 1.

        SigLIP gets no mask: it was trained without one, on texts of equal length, and pools at the last token, which
        is padding (transformers' documentation of SigLIP).
        """
        mask = None if self.model.config.model_type == "siglip" else attention_mask
        return normalised(self.model.get_text_features(input_ids, attention_mask=mask).pooler_output)


def load_dual_encoder(folder_or_repo: str | Path) -> DualEncoder:
    """A folder or a hub id such as openai/clip-vit-base-patch32, in float32 and evaluation mode, on the CPU.

    Only safetensors are read, and no code of the repository is run.

    Raises:
        ValueError: it holds another kind of model; weights, tokenizer or image processor are not there, not whole, or
            do not fit the model.
        OSError: there is no such folder, nor such a repository within reach; or it has no safetensors.
    """
    model = whole_model(KINDS[kind_of(folder_or_repo, KINDS)], folder_or_repo)
    inputs = ProcessorInputs(_image_processor(folder_or_repo), *_text_settings(folder_or_repo, model.config))
    _check_shape(inputs, folder_or_repo)
    _check_pooling(inputs, model.config.text_config, folder_or_repo)
    return DualEncoder(model, inputs).eval()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict, in the order of names, in hexadecimal.

    Equal for `Align`, its export and a `DualEncoder` of that, as long as the weights are bit by bit the same.
    """
    total = hashlib.sha256()
    for name, value in sorted((model.model if isinstance(model, DualEncoder) else model).state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _image_processor(folder_or_repo: str | Path) -> BaseImageProcessor:
    try:
        return AutoImageProcessor.from_pretrained(folder_or_repo, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"the image processor of {folder_or_repo} cannot be loaded: {str(error).strip()}") from error


def _text_settings(folder_or_repo: str | Path, config: PreTrainedConfig) -> tuple[Any, int, bool, bool]:
    """Tokenizer, longest text, whether to pad to it, whether to lower-case; checked against the text tower."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_repo, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:  # SigLIP's own needs sentencepiece and protobuf
        raise ValueError(f"the tokenizer of {folder_or_repo} cannot be loaded: {str(error).strip()}") from error
    known, rows = len(tokenizer), config.text_config.vocab_size
    if not rows / 2 < known <= rows:  # where files are missing, transformers makes up a vocabulary of 5
        raise ValueError(
            f"the tokenizer of {folder_or_repo} has {known} tokens, but the model was trained with {rows}: it is "
            "another's, or its files are not all there"
        )
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {folder_or_repo} has no pad_token: set it in tokenizer_config.json")
    # a tokenizer without a limit says 10^30; AlignProcessor pads to 64
    positions = min(config.text_config.max_position_embeddings, 64 if config.model_type == "align" else 10**9)
    siglip = config.model_type == "siglip"
    # SigLIP 2's tokenizer is Gemma's, which would keep the capitals that it was trained without
    lower_case = siglip and tokenizer.init_kwargs.get("do_lower_case", True)
    return tokenizer, min(tokenizer.model_max_length, positions), siglip, lower_case


def _check_shape(inputs: ProcessorInputs, folder_or_repo: str | Path) -> None:
    wide, high = (Image.new("RGB", size) for size in ((80, 40), (40, 80)))
    shapes = {np.shape(inputs.processor(images=image, return_tensors="np")["pixel_values"]) for image in (wide, high)}
    if len(shapes) > 1 or len(next(iter(shapes))) != 4:
        raise ValueError(
            f"the image processor of {folder_or_repo} makes inputs of shapes {sorted(shapes)}: images of one size are "
            "needed, so set size to a height and width, or do_center_crop, in preprocessor_config.json"
        )


def _check_pooling(inputs: ProcessorInputs, text: PreTrainedConfig, folder_or_repo: str | Path) -> None:
    """CLIP's text embedding is of one token's place: of the first `eos_token_id`, or of the highest id if that is 2.

    Without that id in the text it would be the first token's; with a padding token above it, the padding's.
    """
    if text.model_type != "clip_text_model":
        return
    ids, mask = inputs.text(["a", "a cat"])
    pooled = ids.argmax(1) if text.eos_token_id == 2 else (ids == text.eos_token_id).int().argmax(1)
    if not torch.equal(pooled, mask.sum(1) - 1):
        raise ValueError(
            f"the text tower of {folder_or_repo} would not pool at the end of texts: eos_token_id of its text_config "
            f"is {text.eos_token_id}, but the tokenizer ends texts with {inputs.tokenizer.eos_token_id} and pads with "
            f"{inputs.tokenizer.pad_token_id}; correct config.json or the tokenizer"
        )
