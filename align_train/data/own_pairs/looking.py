"""Rows whose pictures threads read and decode ahead."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO

from PIL import ExifTags, Image

from align_train.corpus.captions import clean_caption
from align_train.corpus.images import Unusable, decode, jpeg_pixels
from align_train.corpus.sample_corpus import unit_hash
from align_train.corpus.shards import image_format
from align_train.data.crew import Crew
from align_train.data.inspection.pairs import stored_size
from align_train.data.own_pairs.rows import Picture, Row

AHEAD = 8  # rows that wait for each thread
EXIF = (b"Exif\0", b"eXIf", b"EXIF")  # the mark of it in JPEG, PNG and WebP


@dataclass(frozen=True, slots=True)
class Looked:
    """A picture that can be used: its file, upright, the hashes of the file that came, and width and height in pixels.

    `turned` says that EXIF had it turned, and that it was written anew for that.
    """

    content: bytes
    digest: bytes
    share: float
    width: int
    height: int
    turned: bool = False


def looked_at(
    rows: Iterable[Row], threads: int, clean: bool, resize: int
) -> Iterator[tuple[Row, list[str], "Future[Looked]"]]:
    """The rows in their order, with the captions that can be used and their picture, or Unusable with the reason.

    Neighbours of one picture, as in tables with a row for each caption, read it once.

    Args:
        rows: read as threads need them.
        threads: that read and decode.
        clean: the captions, as `clean_caption`.
        resize: pixels a side that training resizes to.
    """
    crew, waiting = Crew(threads), deque[tuple[Row, list[str], Future[Looked]]]()
    try:
        for row in rows:
            captions = _captions(row, clean)
            before = waiting[-1] if waiting else None
            if captions and before and before[1] and row.picture is not None and row.picture == before[0].picture:
                future = before[2]
            else:
                future = crew.submit(_look, row, captions, resize)
            waiting.append((row, captions, future))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        crew.dismiss()


def _captions(row: Row, clean: bool) -> list[str]:
    """Those that say something, each on one line."""
    found = (clean_caption(text) if clean else " ".join(encodable(text).splitlines()).strip() for text in row.captions)
    return [caption for caption in found if caption]


def encodable(text: str) -> str:
    """The text without what UTF-8 cannot say: halves of surrogates, from JSON and from names of files."""
    return text.encode("utf-8", "replace").decode()


def _look(row: Row, captions: Sequence[str], resize: int) -> Looked:
    """The picture of a row, decoded as training does; Unusable with the reason."""
    if row.problem is not None:
        raise row.problem
    if row.picture is None:
        raise Unusable("no_picture", "no image is named")
    name = row.picture.name or "image"
    if not row.captions:
        raise Unusable("no_caption", name)
    if not captions:
        raise Unusable("empty_caption", name)
    content = _content(row.picture, name)
    if not content:
        raise Unusable("empty_image", f"{name} has no bytes")
    if image_format(content) is None:
        remedy = ": convert it to JPEG" if content[4:8] == b"ftyp" or b"<svg" in content[:1000] else ""
        raise Unusable("not_an_image", f"{name} starts with {content[:16]!r}{remedy}")  # HEIC and AVIF have ftyp
    if jpeg_pixels(content, (resize, resize)) is None:
        _refuse_numbers(content, name)
        decode(content, name)
    upright = _upright(content, name)
    return Looked(upright, sha256(content).digest(), unit_hash(content), *stored_size(upright), upright is not content)


def _refuse_numbers(content: bytes, name: str) -> None:
    """Unusable for pixels of 32 bits, of which nobody says where black and white are."""
    with suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(BytesIO(content)) as file:
        if file.mode in ("F", "I"):
            raise Unusable("pixels_of_32_bits", f"{name}: write it with 8 bits a colour")


def _upright(content: bytes, name: str) -> bytes:
    """The file as it is, or written anew where its EXIF says that it lies on its side: readers of shards do not look.

    Whoever uses the exported model through transformers' pipelines sees it upright too.
    """
    if image_format(content) == "tiff" or not any(mark in content for mark in EXIF):
        return content
    with suppress(OSError, ValueError, SyntaxError), Image.open(BytesIO(content)) as file:
        if file.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
            written = BytesIO()
            decode(content, name, upright=True).save(written, "JPEG", quality=95)
            return written.getvalue()
    return content


def _content(picture: Picture, name: str) -> bytes:
    try:
        return picture.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        path = error.filename and str(error.filename)
        raise Unusable("missing", name if path in (None, name) else f"{name}, looked for at {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = getattr(error, "strerror", None) or str(error)
        raise Unusable("unreadable", why if name in why else f"{name} ({why})") from error
