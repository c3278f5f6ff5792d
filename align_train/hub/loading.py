"""Hugging Face folders and repositories of ALIGN models, ready for training."""

from pathlib import Path

from transformers import AlignConfig, AlignModel, AutoTokenizer
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from align_train.data.tokens import load_tokenizer
from align_train.hub.pretrained import kind_of, whole_model
from align_train.models import Align
from align_train.models.building import BatchNorm, repair
from align_train.records import Preprocessing


def load_hf(folder_or_repo: str | Path) -> Align:
    """An exported folder, or a hub id such as kakaobrain/align-base, as a repaired model.

    Only safetensors are read, so that loading never runs code from the file.

    Raises:
        ValueError: the folder holds another architecture or vocabulary, or its weights are not complete.
        OSError: there is no such folder, nor such a repository within reach.
    """
    kind_of(folder_or_repo, ["align"])
    config = AlignConfig.from_pretrained(folder_or_repo)
    model = Align(config, _preprocessing(folder_or_repo), _bounds(config.temperature_init_value))
    plain = whole_model(AlignModel, folder_or_repo)
    repair(model, BatchNorm("virtual", group_size=16, momentum=0.01))  # as the reference trained
    model.load_state_dict(plain.state_dict())
    return model


def _preprocessing(folder_or_repo: str | Path) -> Preprocessing:
    images = EfficientNetImageProcessorPil.from_pretrained(folder_or_repo)
    tokenizer = AutoTokenizer.from_pretrained(folder_or_repo)
    if tokenizer.get_vocab() != load_tokenizer().get_vocab():
        raise ValueError(
            f"{folder_or_repo} has another vocabulary, of {len(tokenizer)} tokens, than bert-base-uncased, by which "
            "training reads captions: its text tower would take them for other words"
        )
    resize = images.size["height"]
    crop = images.crop_size["height"] if images.do_center_crop else resize
    # a tokenizer without a limit says 10^30; AlignProcessor pads to 64
    return Preprocessing(resize, crop, antialias=True, max_tokens=min(tokenizer.model_max_length, 64))


def _bounds(start: float) -> tuple[float, float]:
    return min(0.01, start), max(10.0, start)
