"""Pictures of pairs: what the model sees, its caption below; and how captions are drawn."""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from align_train.files import atomic_write

COLUMNS, ROWS = 8, 5
SIDE, GAP, LINES, LINE = 192, 12, 4, 16  # of an image, between images, of a caption, of one line: pixels
HEIGHT = SIDE + (LINES + 1) * LINE + GAP  # of an image with what stands below it
INK, GREY, PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)


class Tile(NamedTuple):
    """One pair: uint8 pixels (H, W, 3), its caption, and where it is from, in one line."""

    pixels: np.ndarray
    caption: str
    origin: str


def sample_sheet(tiles: Sequence[Tile], path: Path) -> Path:
    """Draw the first COLUMNS x ROWS pairs, one after another in rows."""
    tiles = tiles[: COLUMNS * ROWS]
    rows = max(1, -(-len(tiles) // COLUMNS))
    sheet = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), GAP + rows * (HEIGHT + GAP)), PAPER)
    draw, font, small = ImageDraw.Draw(sheet), caption_font(13), caption_font(10)
    for number, tile in enumerate(tiles):
        left, top = corner(number)
        way = Image.Resampling.NEAREST if len(tile.pixels) < SIDE else Image.Resampling.BILINEAR
        sheet.paste(Image.fromarray(tile.pixels).resize((SIDE, SIDE), way), (left, top))
        below = top + SIDE + 4
        for line, text in enumerate(wrapped(tile.caption, font, SIDE, LINES)):
            draw.text((left, below + line * LINE), text, INK, font)
        for text in wrapped(tile.origin, small, SIDE, 1):
            draw.text((left, below + LINES * LINE), text, GREY, small)
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")
    return path


def corner(number: int) -> tuple[int, int]:
    """Left and top of an image on the sheet."""
    row, column = divmod(number, COLUMNS)
    return GAP + column * (SIDE + GAP), GAP + row * (HEIGHT + GAP)


@lru_cache
def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic and more; Pillow's has ASCII."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in lines of at most `width` pixels; what goes beyond `lines` is cut with an ellipsis.

    Letters that the font lacks, such as Chinese ones, are counted instead: `[5 CJK]`.
    """
    found = [""]
    for word in _pieces(_drawable(text, font), font, width):
        longer = f"{found[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            found[-1] = longer
        else:
            found.append(word)
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*found[: lines - 1], last.rstrip() + "…"]


def _pieces(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """The words; those that are wider than a line, such as addresses, in parts."""
    for word in text.split():
        rest = word
        while font.getlength(rest) > width:
            end = next(end for end in range(len(rest) - 1, 0, -1) if end == 1 or font.getlength(rest[:end]) <= width)
            yield rest[:end]
            rest = rest[end:]
        yield rest


def _drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, with runs of letters that the font lacks named by their script and number."""
    parts = []
    for script, run in groupby(text[:2000], lambda letter: _missing(letter, font)):
        letters = "".join(run)
        parts.append(f"[{len(letters)} {script}]" if script else letters)
    return "".join(parts)


@lru_cache(10_000)
def _missing(letter: str, font: ImageFont.FreeTypeFont) -> str:
    """Script of a letter that the font lacks, by its Unicode name; empty for one that it has, or that is not seen."""
    if letter.isspace() or unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f":
        return ""
    glyph, none = _glyph(letter, str(font.path)), _glyph("\U0010ffff", str(font.path))
    return unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0] if glyph == none else ""


def _glyph(letter: str, path: str) -> tuple[tuple[int, int], bytes]:
    """How a letter is drawn where it stands alone, without what shaping adds, such as a circle below an accent."""
    mask = ImageFont.truetype(path, 20, layout_engine=ImageFont.Layout.BASIC).getmask(letter)
    return mask.size, bytes(mask)
