"""Images, each with a text file of the same name beside it."""

from collections.abc import Iterator
from pathlib import Path

from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import PictureFile
from align_train.data.own_pairs.rows import Row
from align_train.data.own_pairs.walking import contents


def open_text_files(path: str) -> OpenedPairs:
    """All images below a folder; `cat.txt` beside `cat.jpg` has its captions, one a line.

    Images without a text are rows without captions, and texts without an image are rows without a picture, so that the
    check tells of them. Images of one stem share the text.

    Raises:
        OSError: the folder cannot be read; a text file, when the rows are read.
        ValueError: no image has a text; when the rows are read, a text is not UTF-8.
    """
    found = contents(path)
    texts = {_stem(name): Path(path) / name for name in found.others if name.endswith(".txt")}
    pictured = {_stem(name) for name in found.images}
    if not pictured & texts.keys():
        raise ValueError(
            f"{path} has no image with a .txt of the same name beside it: write one for each, or set pairs.format"
        )
    alone = [file for stem, file in texts.items() if stem not in pictured]
    told = [f"{path}: {len(found.images):,} images, {len(texts):,} .txt, a caption in each line"]
    told += found.told(path, frozenset(name for name in found.others if name.endswith(".txt")))

    def rows() -> Iterator[Row]:
        for name in found.images:
            file, text = Path(path) / name, texts.get(_stem(name))
            yield Row(str(file), PictureFile(file), lines_of(text.read_bytes(), str(text)) if text else ())
        for file in alone:
            yield Row(str(file), None, lines_of(file.read_bytes(), str(file)))

    return OpenedPairs(told, rows, total=len(found.images) + len(alone))


def lines_of(content: bytes, where: str) -> tuple[str, ...]:
    """The lines of a text that say something; ValueError where it is not UTF-8."""
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}): write it again in UTF-8") from error
    return tuple(line.removesuffix("\r") for line in lines if line.strip())


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))
