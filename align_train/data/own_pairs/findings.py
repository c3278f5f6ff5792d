"""What a look at all of one's own pairs found, and the file that says a folder of them is whole."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align_train.data.inspection.pairs import CaptionFacts, Spread
from align_train.files import atomic_write

FINDINGS = "findings.json"
RARE = 5  # images that a class should have at least


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: why, where it is (`row 17 of birds.csv`), and what was met there."""

    reason: str
    where: str
    detail: str


@dataclass(frozen=True)
class Findings:
    """What the rows are like. An image is what has the same bytes, whatever its name, and in however many rows.

    Attributes:
        rows: that were looked at, of training and validation.
        images: usable ones.
        captions: of these images, each text once an image.
        validation_images: of `images`.
        validation_from: `given`, `cut` (by the hash of the images) or `none`.
        skipped: rows that cannot be used, by reason.
        problems: the first thousand rows of each reason.
        empty_captions: in rows that have others.
        repeated_captions: that came again with their image, and are left out.
        in_both: images of validation that were among those of training too, and are left out there.
        duplicate_images: images that lie there several times, under different names.
        duplicate_rows: rows whose image had come before under another name; rows of one name are its captions.
        duplicate_examples: two rows each, the first hundred.
        label_conflicts: images that came under two classes; the first is kept.
        text: lengths of captions; `frequent` are texts that several images have.
        shared_captions: texts that several images have.
        sharing: captions that are one of these texts.
        max_tokens: longest caption that training does not cut, in WordPiece tokens.
        too_long: captions that are longer.
        too_long_examples: row and number of tokens, the first hundred.
        width, height: of images in pixels.
        crop: pixels a side that the model sees.
        small: images with a side shorter than that.
        turned: images that lay on their side as their EXIF says, and were written anew, upright.
        classes: images by class, the largest first; empty where rows have no classes.
        shards: the tars that were written, with their sizes in bytes; none where the pairs were refused.
    """

    rows: int
    images: int
    captions: int
    validation_images: int
    validation_from: str
    skipped: Mapping[str, int]
    problems: tuple[Problem, ...]
    empty_captions: int
    repeated_captions: int
    in_both: int
    duplicate_images: int
    duplicate_rows: int
    duplicate_examples: tuple[str, ...]
    label_conflicts: int
    text: CaptionFacts
    shared_captions: int
    sharing: int
    max_tokens: int
    too_long: int
    too_long_examples: tuple[str, ...]
    width: Spread
    height: Spread
    crop: int
    small: int
    turned: int
    classes: Mapping[str, int]
    shards: Mapping[str, int] = field(default_factory=dict)

    @property
    def training_images(self) -> int:
        """The images that are not for validation."""
        return self.images - self.validation_images

    @property
    def rare_classes(self) -> list[str]:
        """Classes of fewer images than RARE, the largest first."""
        return [name for name, count in self.classes.items() if count < RARE]


def write_findings(findings: Findings, folder: Path) -> None:
    """FOLDER/findings.json."""
    with atomic_write(folder / FINDINGS) as file:
        file.write(json.dumps(asdict(findings), ensure_ascii=False, indent=1).encode())


def read_findings(folder: Path) -> Findings | None:
    """What was found when the pairs in the folder were checked; None where they are not there, or not whole."""
    try:
        findings = _findings(json.loads((folder / FINDINGS).read_bytes()))
        sizes = {name: (folder / name).stat().st_size for name in findings.shards}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not what this version writes
        return None
    return findings if sizes == findings.shards else None


def _findings(document: dict[str, Any]) -> Findings:
    text = document["text"]
    spreads = {name: Spread(**text[name]) for name in ("words", "tokens")}
    nested = {
        "text": CaptionFacts(**{**text, **spreads}),
        "width": Spread(**document["width"]),
        "height": Spread(**document["height"]),
        "problems": tuple(Problem(**problem) for problem in document["problems"]),
        "duplicate_examples": tuple(document["duplicate_examples"]),
        "too_long_examples": tuple(document["too_long_examples"]),
    }
    return Findings(**{**document, **nested})
