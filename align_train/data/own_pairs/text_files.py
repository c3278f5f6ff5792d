"""Images, each with a text file of the same name beside it."""

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path

from align_train.corpus.images import Unusable
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import PictureFile
from align_train.data.own_pairs.rows import Row
from align_train.data.own_pairs.walking import contents, ending, stem


def open_text_files(path: str) -> OpenedPairs:
    """All images below a folder; `cat.txt` beside `cat.jpg` has its captions, one a line.

    Images without a text are rows without captions, and texts without an image are rows without a picture, so that the
    check tells of them. Images of one stem share the text.

    Raises:
        OSError: the folder cannot be read.
        ValueError: no image has a text.
    """
    found = contents(path)
    named = frozenset(name for name in found.others if ending(name) == "txt")
    texts = {stem(name): Path(path) / name for name in named}
    pictured = {stem(name) for name in found.images}
    if not pictured & texts.keys():
        raise ValueError(
            f"{path} has no image with a .txt of the same name beside it: write one for each, or set pairs.format"
        )
    alone = sorted(file for key, file in texts.items() if key not in pictured)
    told = [f"{path}: {len(found.images):,} images, {len(texts):,} .txt, a caption in each line"]
    told += found.told(path, named)

    def rows() -> Iterator[Row]:
        for name in found.images:
            file = Path(path) / name
            yield _row(str(file), PictureFile(file), texts.get(stem(name)))
        for file in alone:
            yield _row(str(file), None, file)

    return OpenedPairs(told, rows, total=len(found.images) + len(alone))


def _row(where: str, picture: PictureFile | None, text: Path | None) -> Row:
    try:
        return Row(where, picture, lines_of(text.read_bytes(), str(text)) if text else ())
    except OSError as error:
        return Row(where, picture, (), problem=Unusable("unreadable_text", f"{text} ({error.strerror or error})"))
    except Unusable as problem:
        return Row(where, picture, (), problem=problem)


def lines_of(content: bytes, where: str) -> tuple[str, ...]:
    """The lines of a text that say something; Unusable where it is neither UTF-8 nor UTF-16 with its mark."""
    try:
        text = content.decode("utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("unreadable_text", f"{where} is not UTF-8 ({error}): write it again in UTF-8") from error
    return tuple(line.removesuffix("\r") for line in text.split("\n") if line.strip())
