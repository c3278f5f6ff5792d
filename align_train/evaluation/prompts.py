"""What the classes of a zero-shot exam are called, and in which sentences.

Shipped in prompt_files/, each with its source, commit and what it was compared with:

clip_templates.json: the 80 templates of CLIP's ImageNet scores, which open_clip and CLIP_benchmark use as well.
imagenet_classes.json: OpenAI's names of ImageNet's 1000 classes, as in the notebook of the CLIP repository since 2021.
    Two of its names stand twice: "missile" (657 and 744) and "sunglasses" (836 and 837). Later lists that call 744
    "projectile" are not this one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_train.data.testsets.sets import digest

PLACEHOLDER = "{}"
TEMPLATES = ("clip_80", "plain", "name")
CLASSES = ("imagenet", "imagenet_by_index")

_FILES = Path(__file__).parent / "prompt_files"
_SHORT = {"plain": ("a photo of a {}.",), "name": ("{}",)}


@dataclass(frozen=True)
class Prompts:
    """T sentences about each class of a set; `load_prompts` reads and checks them.

    Attributes:
        templates: T sentences, each with one `{}` for the name.
        names: by class as the set has it (folder, WordNet id), or in the order of the set's classes; None calls a
            class as the set does, with spaces for `_` and `-`.
        whole: each of `names` must be of a class of the set. False for a published list, of which ImageNet-A and other
            sets have a part.
        origin: of the names, for messages.
    """

    templates: tuple[str, ...]
    names: Mapping[str, str] | tuple[str, ...] | None = None
    whole: bool = True
    origin: str = "classes"

    def for_classes(self, classes: Sequence[str]) -> list[list[str]]:
        """C x T texts; ValueError as `names_of`. Classes of one name get equal texts: see `shared_names`."""
        names = self.names_of(classes)
        return [[template.replace(PLACEHOLDER, name) for template in self.templates] for name in names]

    def names_of(self, classes: Sequence[str]) -> list[str]:
        """The C names.

        Raises:
            ValueError: classes have no name, names have no class, or a list of names is of another length.
        """
        if self.names is None:
            return [name.replace("_", " ").replace("-", " ") for name in classes]
        if isinstance(self.names, tuple):
            if len(self.names) != len(classes):
                raise ValueError(
                    f"{self.origin} lists {len(self.names)} names, but the set has {len(classes)} classes: give one "
                    "name a class in the set's order, or an object {class: name}"
                )
            return list(self.names)
        if missing := [name for name in classes if name not in self.names]:
            raise ValueError(
                f"{self.origin} has no name for {len(missing)} of {len(classes)} classes: {_few(missing)}. Its "
                f"{len(self.names)} names are of {_few(list(self.names))}: name classes as the set does"
            )
        known = set(classes)
        if self.whole and (unknown := [name for name in self.names if name not in known]):
            raise ValueError(
                f"{self.origin} names {len(unknown)} classes that the set does not have: {_few(unknown)}. It has "
                f"{len(classes)}, {_few(classes)}: remove the names, or look whether the set is all there"
            )
        return [self.names[name] for name in classes]

    def shared_names(self, classes: Sequence[str]) -> dict[str, list[str]]:
        """Classes by the name that two or more of them bear; no model can tell these apart.

        No error, since ImageNet has two such pairs: an exam says so beside its score.
        """
        bearers: dict[str, list[str]] = {}
        for source, name in zip(classes, self.names_of(classes), strict=True):
            bearers.setdefault(name, []).append(source)
        return {name: sources for name, sources in bearers.items() if len(sources) > 1}

    @property
    def templates_sha256(self) -> str:
        """Of the templates in their order."""
        return digest(self.templates)

    def names_sha256(self, classes: Sequence[str]) -> str:
        """Of the names that these classes get, in their order, whatever form they were given in."""
        return digest(self.names_of(classes))


def load_prompts(templates: str | Path = "clip_80", classes: str | Path | None = None) -> Prompts:
    """Prompts from shipped sets or JSON files.

    Args:
        templates: `clip_80`, `plain` ("a photo of a {}."), `name` ("{}"), or a file: a list of texts, or an object
            {"source": ..., "templates": list}.
        classes: `imagenet` (by WordNet id), `imagenet_by_index` (in the order of class index, for sets whose classes
            are numbers or words), or a file: a list of names in the order of the set's classes, an object {class:
            name}, or, for a published list that may hold more than the set, an object {"source": ..., "names": either}.
            None takes the set's own names.

    Raises:
        ValueError: there is no such set or file, it is no such JSON, it is empty, or a template has not one `{}`.
    """
    found = _SHORT.get(str(templates)) or _templates(_file(templates, "templates", TEMPLATES))
    if classes is None:
        return Prompts(found)
    path = _file(classes, "classes", CLASSES)
    names, whole = _names(path)
    if str(classes) == "imagenet_by_index" and isinstance(names, dict):
        names = tuple(names.values())
    return Prompts(found, names, whole, str(classes))


def _file(source: str | Path, setting: str, shipped: Sequence[str]) -> Path:
    if str(source) in shipped:
        return _FILES / ("clip_templates.json" if setting == "templates" else "imagenet_classes.json")
    if not Path(source).is_file():
        raise ValueError(f"{setting} is {str(source)!r}, which is no file: name a JSON file, or {', '.join(shipped)}")
    return Path(source)


def _templates(path: Path) -> tuple[str, ...]:
    document = _read(path)
    listed = document.get("templates") if isinstance(document, dict) else document
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise ValueError(f'{path} is no list of texts: write ["a photo of a {PLACEHOLDER}.", ...]')
    if not listed:
        raise ValueError(f'{path} has no template: write at least ["{PLACEHOLDER}"]')
    if wrong := [text for text in listed if text.count(PLACEHOLDER) != 1]:
        raise ValueError(
            f"{len(wrong)} of {len(listed)} templates in {path} have not exactly one placeholder {PLACEHOLDER}: "
            f"{_few(wrong)}"
        )
    return tuple(listed)


def _names(path: Path) -> tuple[dict[str, str] | tuple[str, ...], bool]:
    """The names of a file, and whether all must be of the set."""
    document = _read(path)
    published = isinstance(document, dict) and isinstance(document.get("names"), dict | list)
    listed = document["names"] if published else document
    if not isinstance(listed, dict | list):
        raise ValueError(f"{path} is neither a list of names nor an object {{class: name}}")
    if not listed:
        raise ValueError(f"{path} names no class")
    rows = list(listed.items()) if isinstance(listed, dict) else list(enumerate(listed))
    if wrong := [str(key) for key, name in rows if not isinstance(name, str) or not name.strip()]:
        raise ValueError(f"{len(wrong)} of {len(listed)} classes in {path} are named by no text: {_few(wrong)}")
    return (listed if isinstance(listed, dict) else tuple(listed)), not published


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {_few(sorted({key for key in keys if keys.count(key) > 1}))} more than once")
    return found


def _few(words: Sequence[str]) -> str:
    """The first three, quoted."""
    return ", ".join(map(repr, words[:3])) + (", ..." if len(words) > 3 else "")
