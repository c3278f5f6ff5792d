"""Perceptual hashes (pHash) of a folder of images, so that near-duplicates of evaluation sets can leave the training.

The hash is `imagehash.phash` with hash_size 8: the image in grey levels, resized to 32 x 32, its discrete cosine
transform, and for each of the 8 x 8 lowest frequencies, row by row, one bit: is it above the median of the 64? Written
as 16 hexadecimal digits. Images that look alike differ in few of the 64 bits, unrelated ones in about 32. Images of
one colour say nothing: all of them have the same hash, or nearly.

How it relates to COYO's column `image_phash`. Kakao Brain says that the column holds "the 64-bit standard pHash" in
hexadecimal (https://github.com/kakaobrain/coyo-dataset/issues/14) and links http://www.phash.org. Length and family are
therefore ours; which program, version, decoder and resize filter made it is not published. All eleven hashes that are
printed in COYO's README, in its dataset card and in Hugging Face's blog on ALIGN have exactly 32 bits set and begin
with a bit that is set. That is what `imagehash` gives, whose first bit is the mean brightness; the library of phash.org
left the first row and column out until 2026, and its first bit would be set in half of the images only
(https://github.com/aetilius/pHash/pull/52). This speaks for `imagehash` and proves nothing: distances between COYO's
hashes and ours are not verified, and even one library differs by a few bits from another decoder. Before you rely on
it, fetch a few hundred images of COYO and look at `agreement`: mostly 0 to 6 bits if the two are the same, about 32 if
they are not.
"""

import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from align_train.corpus.images import Unusable, decode
from align_train.corpus.shards import image_format
from align_train.files import atomic_write
from align_train.records import Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhashReport:
    """What was written: the list, the number of images in it, and the files that have no pHash, by reason."""

    path: Path
    images: int
    unreadable: Tally

    def described(self) -> str:
        """One line for a log."""
        return f"pHash of {self.images:,} images in {self.path}; unreadable: {self.unreadable.described()}"


def phash(content: bytes, where: str = "image") -> str:
    """The pHash of an encoded image as 16 hexadecimal digits; see the head of this file.

    Pixels are those that training sees: EXIF rotation is ignored, transparency lies on white.

    Raises:
        ValueError: the library imagehash is not installed.
        Unusable: as `decode`.
    """
    return str(_imagehash().phash(decode(content, where), hash_size=8))


def phash_list(images: str | Path, output: str | Path) -> PhashReport:
    """Writes a line `pHash<TAB>path below the folder` for each image in and below a folder, in the order of paths.

    Content decides what is an image. Every other file is logged by name and counted: not_an_image, empty_image,
    corrupt_image, too_many_pixels or not_readable.

    Args:
        images: the folder.
        output: the list; it gets its name when it is complete.

    Raises:
        ValueError: no such folder, no image in it, or the library imagehash is not installed.
    """
    folder, output = Path(images), Path(output)
    version = _imagehash().__version__
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.absolute() != output.absolute())
    lines, unreadable = [], Tally()
    for path in tqdm(files, desc="phash", unit="image", delay=3):
        try:
            lines.append(f"{phash(_content(path), str(path))}\t{_on_one_line(path.relative_to(folder))}\n")
        except Unusable as problem:
            log.warning("no pHash of %s", problem)
            unreadable[problem.reason] += 1
    if not lines:
        raise ValueError(
            f"{folder} holds no image (unreadable: {unreadable.described()}): name a folder of JPEG, PNG, WebP, GIF, "
            "BMP or TIFF files"
        )
    report = PhashReport(output, len(lines), unreadable)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        head = f"# imagehash {version}, phash, hash_size 8; unreadable: {unreadable.described()}\n"
        file.write("".join([head, *lines]).encode("utf-8", "backslashreplace"))
    log.info("%s", report.described())
    return report


def read_phash_list(path: str | Path) -> list[str]:
    """The hashes of a list, in lower case: of `phash_list`, or bare ones, one a line; `#` begins a comment line.

    Raises:
        ValueError: a line without a hash, named with the file and its number; or no hash at all.
    """
    hashes = []
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            found = line.split("\t")[0].strip()
            if not found or found.startswith("#"):
                continue
            if not re.fullmatch("[0-9a-fA-F]{16}", found):
                raise ValueError(f"{path}, line {number}: {found[:40]!r} is no pHash of 16 hexadecimal digits")
            hashes.append(found.lower())
    if not hashes:
        raise ValueError(f"{path} holds no pHash: expected a line with 16 hexadecimal digits for each image")
    return hashes


def agreement(shards: Iterable[str | Path]) -> Counter[int]:
    """How far COYO's hashes are from ours: the number of pairs at each distance, in bits from 0 to 64.

    Args:
        shards: tars with `image_phash` in the JSON of their pairs. Their images may be resized.

    Raises:
        ValueError: no pair has both a hash and an image that can be read.
    """
    distances: Counter[int] = Counter()
    for path in map(Path, shards):
        recorded: dict[str, str | None] = {}
        ours: dict[str, str] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                content = b"" if file is None else file.read()
                key, _, extension = member.name.partition(".")
                if extension == "json":
                    recorded[key] = json.loads(content).get("image_phash")
                elif image_format(content):
                    ours[key] = phash(content, f"{member.name} in {path}")
        both = [(known, ours[key]) for key, known in recorded.items() if known and key in ours]
        distances.update((int(known, 16) ^ int(found, 16)).bit_count() for known, found in both)
    if not distances:
        raise ValueError("no pair of these shards has an image and an image_phash: fetch rows of COYO first")
    return distances


def _content(path: Path) -> bytes:
    """The bytes of an image; of anything else, which may be large, only the first few are read."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
            if not start:
                raise Unusable("empty_image", str(path))
            if image_format(start) is None:
                raise Unusable("not_an_image", f"{path} starts with {start!r}")
            return start + file.read()
    except OSError as error:
        raise Unusable("not_readable", f"{path} ({error})") from error


def _on_one_line(path: Path) -> str:
    return path.as_posix().translate({ord("\n"): "\\n", ord("\r"): "\\r"})


def _imagehash() -> ModuleType:
    try:
        import imagehash  # late: with scipy it takes half a second
    except ImportError as error:
        raise ValueError(f"pHash needs the library imagehash ({error}): pip install 'align-train[phash]'") from error
    return imagehash
