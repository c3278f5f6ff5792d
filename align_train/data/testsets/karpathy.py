"""Karpathy's splits of COCO, Flickr30k and Flickr8k: the tests that retrieval is compared on."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from align_train.data.testsets.checks import captioned, check_there, refuse
from align_train.data.testsets.files import image_files
from align_train.data.testsets.sets import CaptionedImages
from align_train.records import Tally


@dataclass(frozen=True)
class Karpathy:
    """dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json, and its images.

    The file is Andrej Karpathy's (Deep Visual-Semantic Alignments, CVPR 2015): `images`, each with `filename`, `split`,
    `sentences` of which `raw` is the caption, and for COCO `filepath`, which is train2014 or val2014.

    COCO's test has 5,000 images and 25,010 captions: ten are beyond an image's fifth. The first five, 25,000, are what
    VSE++ and PCME test on (the latter's coco_test_ids.npy has 25,000 entries); the readers of BLIP and CLIP_benchmark
    take all that their files hold. The images of Flickr30k and Flickr8k have five each.

    Attributes:
        annotations: the JSON file.
        images: folder of `filepath`/`filename`, or of all files without folders.
        split: test, val, train, or COCO's restval.
        captions_per_image: how many of the first are taken; None takes all. More captions make it easier for an image
            to find one of its own, and harder for each caption that now has more rivals.
        name: of the set; by default the file's own and the split, as `coco test`.
    """

    annotations: str
    images: str
    split: str = "test"
    captions_per_image: int | None = 5
    name: str | None = None

    def __post_init__(self) -> None:
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ValueError(f"captions_per_image is {self.captions_per_image}: give 1 or more, or null for all")

    def open(self) -> CaptionedImages:
        """The images of the split and their captions.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such JSON, the split is empty, image files or captions are missing, or names come
                twice.
        """
        document = self._document()
        chosen = self._of_split(document["images"])
        keys = [_key(entry) for entry in chosen]
        captions = [[sentence["raw"] for sentence in entry["sentences"]] for entry in chosen]
        taken = [texts[: self.captions_per_image] for texts in captions]
        left = sum(map(len, captions)) - sum(map(len, taken))
        places = [(key, (key, entry["filename"])) for key, entry in zip(keys, chosen, strict=True)]
        files = image_files(self.annotations, self.images, places)
        name = self.name or f"{document.get('dataset', 'karpathy')} {self.split}"
        further = Tally({"further_caption": left} if left else {})
        return captioned(self.annotations, name, files, taken, left_out=further)

    def _document(self) -> dict[str, Any]:
        check_there(self.annotations, False, _REMEDY)
        with open(self.annotations, "rb") as file:
            try:
                document = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.annotations} is no JSON ({error}): {_REMEDY}") from error
        entries = document.get("images") if isinstance(document, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "split" in entry for entry in entries):
            found = f"an object of {', '.join(document)}" if isinstance(document, dict) else type(document).__name__
            raise ValueError(f"{self.annotations} is {found}, without images that have a split: {_REMEDY}")
        return document

    def _of_split(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chosen = [entry for entry in entries if entry["split"] == self.split]
        if not chosen:
            counts = Counter(str(entry["split"]) for entry in entries).most_common()
            there = ", ".join(f"{split} ({count:,})" for split, count in counts) or "none at all"
            raise ValueError(f"{self.annotations} has no image in the split {self.split}: its splits are {there}")
        lost = [f"image {number} of the split" for number, entry in enumerate(chosen) if not entry.get("filename")]
        refuse(self.annotations, lost, len(chosen), "images have captions and no filename", "Name the files")
        broken = [_key(entry) for entry in chosen if not _has_sentences(entry)]
        refuse(self.annotations, broken, len(chosen), "images have no sentences with a raw text", _REMEDY)
        return chosen


_REMEDY = "it has to be dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json of Karpathy's splits"


def _key(entry: dict[str, Any]) -> str:
    return "/".join(part for part in (entry.get("filepath"), entry["filename"]) if part)


def _has_sentences(entry: dict[str, Any]) -> bool:
    sentences = entry.get("sentences")
    return isinstance(sentences, list) and all(
        isinstance(sentence, dict) and isinstance(sentence.get("raw"), str) for sentence in sentences
    )
