"""Reading folders and repositories of transformers: safetensors alone, whole, and of the right kind."""

from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def kind_of(folder_or_repo: str | Path, kinds: Collection[str], part: str = "") -> str:
    """Its model_type, one of `kinds`; `part` says in the error what it was wanted for, as in "image tower".

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
        wanted = f"as {part} only those" if part else "only those"
        raise ValueError(f"{folder_or_repo} holds {found} model: {wanted} of type {', '.join(kinds)} can be loaded")
    return str(kind)


def whole_model(kind: type[Model], folder_or_repo: str | Path) -> Model:
    """The model in float32 on the CPU, all its weights from the folder's safetensors.

    Raises:
        ValueError: weights are missing, broken or of other shapes.
        OSError: there are no safetensors.
    """
    return part_of_model(kind, folder_or_repo)[0]


def part_of_model(
    kind: type[Model], folder_or_repo: str | Path, may_lack: tuple[str, ...] = ()
) -> tuple[Model, list[str], list[str]]:
    """As `whole_model`, of a folder that may hold more, such as heads, and less.

    Args:
        kind: of transformers.
        folder_or_repo: of the same architecture.
        may_lack: tensors whose names start with one of these may be missing; they stay random.

    Returns:
        The model, the names of missing tensors, and those of tensors that it has no place for.
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
    missing = sorted(report["missing_keys"])
    if vital := [name for name in missing if not name.startswith(may_lack)]:
        raise ValueError(
            f"the weights of {folder_or_repo} lack {len(vital)} tensors, the first is {vital[0]}: they would stay "
            "random; write or download the folder again"
        )
    return model, missing, sorted(report["unexpected_keys"])
