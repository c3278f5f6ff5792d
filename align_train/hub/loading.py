"""Hugging Face folders and repositories of ALIGN models, ready for training."""

from pathlib import Path
from typing import Any

from transformers import AlignConfig, AlignModel
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from align_train.hub.preprocessing import check_vocabulary, pixel_scale, sides
from align_train.hub.pretrained import kind_of, whole_model
from align_train.models import Align, restore_align
from align_train.models.restoring import restoring_settings
from align_train.records import Preprocessing

RESTORE = "align_train.models.restore_align"  # the _target_ of nodes


def load_hf(folder_or_repo: str | Path) -> Align:
    """An exported folder, or a hub id such as kakaobrain/align-base, as a repaired model.

    Only safetensors are read, so that loading never runs code from the file.

    Raises:
        ValueError: the folder holds another architecture or vocabulary, or its weights are not complete, or its images
            are scaled otherwise than ALIGN's.
        OSError: there is no such folder, nor such a repository within reach.
    """
    model = restore_align(**_settings(folder_or_repo))
    model.load_state_dict(whole_model(AlignModel, folder_or_repo).state_dict())
    return model


def align_node(folder_or_repo: str | Path) -> dict[str, Any]:
    """The model node of a recipe that starts from what `load_hf` loads; plain values, errors as there.

    What is built from it has fresh weights; those of the folder, and of every checkpoint of the run, fit.
    """
    return {"_target_": RESTORE, **_settings(folder_or_repo)}


def _settings(folder_or_repo: str | Path) -> dict[str, Any]:
    kind_of(folder_or_repo, ["align"])
    config = AlignConfig.from_pretrained(folder_or_repo)
    start = config.temperature_init_value
    bounds = min(0.01, start), max(10.0, start)
    return restoring_settings(config, _preprocessing(folder_or_repo, config), bounds)


def _preprocessing(folder_or_repo: str | Path, config: AlignConfig) -> Preprocessing:
    images = EfficientNetImageProcessorPil.from_pretrained(folder_or_repo)
    tokens = check_vocabulary(folder_or_repo, config.text_config.vocab_size)
    factor, shift = pixel_scale(images)
    if (factor - 1).abs().max() > 1e-3 or shift.abs().max() > 1e-3:
        raise ValueError(
            f"the image processor of {folder_or_repo} does not scale pixels to x / 127.5 - 1, as training does for "
            "ALIGN: set rescale_factor 0.00784313725490196, rescale_offset true, do_normalize false and include_top "
            "false in preprocessor_config.json if the model was trained so"
        )
    resize, crop = sides(images, folder_or_repo)
    return Preprocessing(resize, crop, antialias=True, max_tokens=tokens)
