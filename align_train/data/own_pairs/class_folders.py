"""One folder of images a class, and the sentences that name the classes."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import PictureFile
from align_train.data.own_pairs.rows import Row
from align_train.data.own_pairs.walking import contents

PLACEHOLDER = "{}"
# The plain one, and the seven of 80 that OpenAI's search for CLIP's best few found on ImageNet
# (github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb).
TEMPLATES = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
PROMPTS = "With recipe=class_prompts the exam on them is of classes, since images of a class share their captions"


def open_class_folders(path: str, templates: Sequence[str] = TEMPLATES) -> OpenedPairs:
    """Each image below a folder of PATH, with all templates about the class that the folder is called.

    Raises:
        ValueError: there is no image in a folder.
        OSError: the folder cannot be read.
    """
    found = contents(path)
    keys = [key for key in found.images if os.sep in key]
    if not keys:
        raise ValueError(f"{path} has no folder with images in it: give the folder that holds one for each class")
    classes = sorted({key.split(os.sep, 1)[0] for key in keys})
    empty = sorted(set(found.folders) - set(classes))
    told = [
        f"{path}: {len(keys):,} images of {len(classes):,} classes, {shortened(classes)}; captions are "
        f'{len(templates)} templates, such as "{about(named_class(classes[0]), templates)[0]}". Change with '
        f"pairs.templates=FILE.json. {PROMPTS}"
    ]
    told += [f"{path}: folders without images, which are no classes: {shortened(empty)}"] if empty else []
    told += replace(found, others=[key for key in found.images if os.sep not in key] + found.others).told(path)

    def rows() -> Iterator[Row]:
        for key in keys:
            name, where = key.split(os.sep, 1)[0], Path(path) / key
            yield Row(str(where), PictureFile(where), about(named_class(name), templates), name)

    return OpenedPairs(told, rows, total=len(keys))


def about(name: str, templates: Sequence[str]) -> tuple[str, ...]:
    """The templates filled with a name."""
    return tuple(template.replace(PLACEHOLDER, name) for template in templates)


def named_class(folder: str) -> str:
    """What a class is called by the name of its folder."""
    return folder.replace("_", " ")


def read_templates(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Templates from a list, or from a JSON file with a list or an object {"templates": list}; none for None.

    Raises:
        ValueError: it is no such file or list, or a template has not exactly one `{}`.
    """
    if given is None:
        return ()
    listed: object = given
    if isinstance(given, str):
        try:
            listed = json.loads(Path(given).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"pairs.templates is {given!r}, which is no file: name a JSON file, or give a list"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{given} is not JSON that can be read: {error}") from error
        listed = listed.get("templates") if isinstance(listed, dict) else listed
    texts = list(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'pairs.templates ({given}) is no list of texts: write ["a photo of a {PLACEHOLDER}.", ...]')
    if wrong := [text for text in texts if text.count(PLACEHOLDER) != 1]:
        raise ValueError(f"pairs.templates: {wrong[0]!r} has not exactly one placeholder {PLACEHOLDER} for the class")
    return tuple(texts)


def shortened(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
