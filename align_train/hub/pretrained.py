"""Reading folders and repositories of transformers: safetensors alone, whole, and of the right kind."""

from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def kind_of(folder_or_repo: str | Path, kinds: Collection[str]) -> str:
    """Its model_type, one of `kinds`.

    Raises:
        ValueError: it holds another kind of model, or none.
        OSError: there is no such folder, nor such a repository within reach.
    """
    try:
        kind = PreTrainedConfig.get_config_dict(folder_or_repo)[0].get("model_type")
    except OSError as error:
        raise OSError(
            f"{folder_or_repo} is neither a folder with a model nor a repository within reach: name an exported "
            f"folder, or a hub id such as kakaobrain/align-base ({error})"
        ) from error
    if kind not in kinds:
        found = f"a {kind!r}" if kind else "no"
        raise ValueError(f"{folder_or_repo} holds {found} model: only those of type {', '.join(kinds)} can be loaded")
    return str(kind)


def whole_model(kind: type[Model], folder_or_repo: str | Path) -> Model:
    """The model in float32 on the CPU, all its weights from the folder's safetensors.

    Raises:
        ValueError: weights are missing, broken or of other shapes.
        OSError: there are no safetensors.
    """
    try:
        model, report = kind.from_pretrained(
            folder_or_repo, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {folder_or_repo} are broken or do not fit its config.json: write or download the folder "
            f"again ({str(error).strip()})"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the weights of {folder_or_repo} lack {len(missing)} tensors, the first is {missing[0]}: they would stay "
            "random; write or download the folder again"
        )
    return model
