"""One's own pairs looked at, row by row, before anything is trained on them; what can be used becomes shards."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from align_train import signals
from align_train.corpus.images import Unusable
from align_train.data.inspection.pairs import Spread, facts_of_counted, token_counts
from align_train.data.own_pairs import report
from align_train.data.own_pairs.findings import Findings, Problem, write_findings
from align_train.data.own_pairs.looking import Looked, encodable, looked_at
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.rows import Row
from align_train.data.own_pairs.writing import Image, Spool, appearing, write_parts
from align_train.records import Preprocessing, Tally

KEPT = 1000  # rows of each reason that are named
EXAMPLES = 100  # of what is no problem
TOLD = 10  # rows that an error names
LEAST_IMAGES, LEAST_HELD_OUT = 4, 2  # so many images are enough to hold out two


@dataclass(frozen=True)
class CheckSettings:
    """How one's own pairs are checked.

    Attributes:
        strict: refuse, once all rows were looked at, if some cannot be used; else these are left out and counted.
        validation_share: of the images, in [0, 1), for validation; used where the data has no validation of its own.
            The hash of the file decides, so an image stays on its side however rows are ordered. At least two images
            are held out of four or more.
        pairs_per_shard: images in a shard, at most.
        clean_captions: decode HTML entities, remove tags and invisible characters.
        threads: that read and decode images.

    Raises:
        ValueError: a value out of range.
    """

    strict: bool = False
    validation_share: float = 0.1
    pairs_per_shard: int = 1000
    clean_captions: bool = True
    threads: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"check.validation_share is {self.validation_share}: choose at least 0 and less than 1")
        for name in ("pairs_per_shard", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"check.{name} is {getattr(self, name)}: choose at least 1")


def check_pairs(opened: OpenedPairs, folder: Path, settings: CheckSettings, preprocessing: Preprocessing) -> Findings:
    """Looks at every row once, and writes what can be used as FOLDER/train/NNNNN.tar and FOLDER/validation/NNNNN.tar.

    A record of a shard is an image: its file as it is, KEY.txt with a caption a line, KEY.json with its class and row.
    FOLDER/report.md says what was found, and so does FOLDER/findings.json. The folder appears when all is written, but
    for the report, which is there also where the pairs are refused. While it works, the images are on the disk twice.

    Args:
        opened: the rows.
        folder: where the shards go; not there yet, or empty.
        settings: how to check them.
        preprocessing: as the model has it.

    Raises:
        ValueError: there is nothing to train on, or rows cannot be used and `strict` is set.
        FileExistsError: the folder holds something.
    """
    with appearing(folder) as work:
        with Spool(work / "spool") as spool:
            seen = _seen(opened, spool, settings, preprocessing)
            images = list(seen.images.values())
            if opened.validation is None:
                _hold_out(images, settings.validation_share)
            findings = _findings(seen, images, opened.validation is not None, preprocessing)
            if why := _refusal(findings, settings):
                path = report.write(findings, opened.told, (), folder)
                raise ValueError(f"{why}\nThe report is {path}")
            findings = replace(findings, shards=write_parts(images, spool, work, settings.pairs_per_shard))
        report.write(findings, opened.told, (), work)
        write_findings(findings, work)
    return findings


@dataclass
class _Seen:
    """What the rows so far came to: images by digest, and what was met on the way."""

    spool: Spool
    images: dict[bytes, Image] = field(default_factory=dict)
    rows: int = 0
    skipped: Tally = field(default_factory=Tally)
    problems: list[Problem] = field(default_factory=list)
    empty_captions: int = 0
    in_both: int = 0
    duplicates: list[str] = field(default_factory=list)
    conflicts: int = 0
    turned: int = 0
    repeated: int = 0

    def add(self, row: Row, captions: Sequence[str], looked: Looked, held_out: bool) -> None:
        """A row that can be used."""
        self.empty_captions += len(row.captions) - len(captions)
        where, label = encodable(row.where), None if row.label is None else encodable(row.label)
        name = row.picture.name if row.picture and row.picture.name else row.where
        image = self.images.get(looked.digest)
        if image is None:
            number, start, size = len(self.images), self.spool.add(looked.content), len(looked.content)
            image = Image(number, start, size, looked.share, looked.width, looked.height, where, label, {}, name)
            image.held_out = held_out
            self.images[looked.digest] = image
            self.turned += looked.turned
        else:
            self.conflicts += None not in (label, image.label) and label != image.label
            image.label = image.label or label
            image.copies += name != image.name
            if name != image.name and len(self.duplicates) < EXAMPLES:
                self.duplicates.append(f"{where} has the image of {image.where}")
        if held_out and not image.held_out:  # validation is what was given for it, and training does not see it
            self.in_both += 1
            image.held_out, image.where, image.label, image.captions = True, where, label, {}
        for caption in captions:
            self.repeated += caption in image.captions
            image.captions.setdefault(caption, where)

    def skip(self, row: Row, problem: Unusable) -> None:
        """A row that cannot be used."""
        self.skipped[problem.reason] += 1
        if self.skipped[problem.reason] <= KEPT:
            detail = str(problem).removeprefix(f"{problem.reason}: ")
            self.problems.append(Problem(problem.reason, encodable(row.where), encodable(detail)))


def _seen(opened: OpenedPairs, spool: Spool, settings: CheckSettings, preprocessing: Preprocessing) -> _Seen:
    seen = _Seen(spool)
    parts = [("pairs", False, opened.train, opened.total)]
    if opened.validation is not None:
        parts.append(("validation", True, opened.validation, None))
    for name, held_out, rows, total in parts:
        bar = tqdm(rows(), desc=f"check {name}", unit="row", total=total, delay=3)
        for row, captions, future in looked_at(bar, settings.threads, settings.clean_captions, preprocessing.resize):
            signals.check()
            seen.rows += 1
            named = replace(row, where=f"{row.where} (validation)") if held_out else row
            try:
                seen.add(named, captions, future.result(), held_out)
            except Unusable as problem:
                seen.skip(named, problem)
    return seen


def _hold_out(images: Sequence[Image], share: float) -> None:
    """The images whose hash is below the share go to validation: two at the least, where there are four or more."""
    held_out = [image for image in images if image.share < share]
    if share and len(held_out) < LEAST_HELD_OUT:  # one alone would always be found
        least = LEAST_HELD_OUT if len(images) >= LEAST_IMAGES else 0
        held_out = sorted(images, key=lambda image: image.share)[:least]
    for image in held_out:
        image.held_out = True


def _findings(seen: _Seen, images: Sequence[Image], given: bool, preprocessing: Preprocessing) -> Findings:
    captions = [(caption, where) for image in images for caption, where in image.captions.items()]
    texts = [caption for caption, _ in captions]
    tokens, unknown = token_counts(texts)
    most = preprocessing.max_tokens
    too_long = ((where, length) for (_, where), length in zip(captions, tokens, strict=True) if length > most)
    shared = [count for count in Counter(texts).values() if count > 1]
    held_out = sum(image.held_out for image in images)
    return Findings(
        rows=seen.rows,
        images=len(images),
        captions=len(captions),
        validation_images=held_out,
        validation_from="given" if given else "cut" if held_out else "none",
        skipped=dict(seen.skipped.most_common()),
        problems=tuple(seen.problems),
        empty_captions=seen.empty_captions,
        repeated_captions=seen.repeated,
        in_both=seen.in_both,
        duplicate_images=sum(image.copies > 0 for image in images),
        duplicate_rows=sum(image.copies for image in images),
        duplicate_examples=tuple(seen.duplicates),
        label_conflicts=seen.conflicts,
        text=facts_of_counted(texts, tokens, unknown, most),
        shared_captions=len(shared),
        sharing=sum(shared),
        max_tokens=most,
        too_long=sum(length > most for length in tokens),
        too_long_examples=tuple(f"{where}: {length} tokens" for where, length in islice(too_long, EXAMPLES)),
        width=Spread.of([image.width for image in images]),
        height=Spread.of([image.height for image in images]),
        crop=preprocessing.crop,
        turned=seen.turned,
        small=sum(min(image.width, image.height) < preprocessing.crop for image in images),
        classes=dict(Counter(image.label for image in images if image.label is not None).most_common()),
    )


def _refusal(findings: Findings, settings: CheckSettings) -> str:
    """Why there will be no training; empty where there will."""
    counts = Tally(findings.skipped).described()
    first = "\n".join(f"  {report.plain(f'{p.where}: {p.reason}: {p.detail}')}" for p in findings.problems[:TOLD])
    if not findings.rows:
        return "the data has no row: check pairs.path and pairs.split"
    if not findings.images:
        return (
            f"none of the {findings.rows:,} rows can be used ({counts}): check pairs.images, the folder that names of "
            f"images start from, pairs.image_column and pairs.caption_columns. The first:\n{first}"
        )
    if settings.strict and findings.skipped:
        return (
            f"{sum(findings.skipped.values()):,} of {findings.rows:,} rows cannot be used ({counts}): correct them, or "
            f"leave them out with check.strict=false. The first:\n{first}"
        )
    if findings.images == 1:
        return (
            f"of {findings.rows:,} rows there is one image only (rows that cannot be used: {counts}), and contrastive "
            "training needs at least two, each a negative of the other: add pairs"
        )
    return _one_sided(findings, counts)


def _one_sided(findings: Findings, counts: str) -> str:
    """Why one of the two parts is too small; empty where it is not."""
    if findings.validation_from == "given" and findings.validation_images < LEAST_HELD_OUT:
        return (
            f"of what was given for validation, {findings.validation_images} images can be used, and a choice needs at "
            f"least {LEAST_HELD_OUT} (rows that cannot be used: {counts}): correct what pairs.validation, or the split "
            "of that name, holds"
        )
    if findings.training_images < 2:
        return (
            f"{findings.validation_images} of {findings.images} images are for validation, and contrastive training "
            f"needs at least two of the others: {_REMEDIES[findings.validation_from]}"
        )
    return ""


_REMEDIES = {
    "cut": "make check.validation_share smaller, or add pairs",
    "given": "add pairs to train on, or take other images for validation",
}
