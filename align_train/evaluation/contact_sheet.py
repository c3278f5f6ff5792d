"""A picture that shows what a model finds: a caption a row, its best images beside it."""

from pathlib import Path

from PIL import Image, ImageDraw

from align_train.corpus.images import decode
from align_train.data.inspection.sample_sheet import caption_font, wrapped
from align_train.evaluation.matched import Matched
from align_train.files import atomic_write

TILE, GAP, TEXT_WIDTH = 112, 12, 300
RIGHT, WRONG, INK, PAPER = (34, 139, 84), (214, 214, 214), (30, 30, 30), (255, 255, 255)


def contact_sheet(matched: Matched, path: Path, queries: int = 6, best: int = 5) -> Path:
    """Draw `queries` captions, evenly spread over all, and the `best` images of each; the right one is framed.

    The rows are picked by position alone, not by how well they went.
    """
    captions, images = len(matched.captions), len(matched.images)
    queries, best = min(queries, captions), min(best, images)
    rows = [(2 * line + 1) * captions // (2 * queries) for line in range(queries)]
    sheet = Image.new("RGB", (TEXT_WIDTH + best * (TILE + GAP) + GAP, len(rows) * (TILE + GAP) + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), caption_font(15)
    for line, row in enumerate(rows):
        top, right = GAP + line * (TILE + GAP), int(matched.image_of_text[row])
        text = "\n".join(wrapped(matched.caption(row), font, TEXT_WIDTH - 2 * GAP, lines=5))
        draw.multiline_text((GAP, top + 4), text, INK, font, spacing=4)
        for place, found in enumerate((matched.image @ matched.text[row]).topk(best).indices.tolist()):
            left = TEXT_WIDTH + place * (TILE + GAP)
            tile = decode(matched.file(found))
            tile.thumbnail((TILE - 8, TILE - 8))
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            frame = (left, top, left + TILE - 1, top + TILE - 1)
            draw.rectangle(frame, outline=RIGHT if found == right else WRONG, width=4 if found == right else 1)
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")
    return path
