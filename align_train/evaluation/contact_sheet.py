"""A picture that shows what a model finds: a caption a row, its best images beside it."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

from PIL import Image, ImageDraw

from align_train.corpus.images import Unusable, decode
from align_train.data.inspection.sample_sheet import caption_font, wrapped
from align_train.data.storage.shards import PairFiles, Shard, all_places
from align_train.evaluation.retrieval import Embeddings
from align_train.files import atomic_write

TILE, GAP, TEXT_WIDTH = 112, 12, 300
RIGHT, WRONG, INK, PAPER = (34, 139, 84), (214, 214, 214), (30, 30, 30), (255, 255, 255)


def contact_sheet(embeddings: Embeddings, shards: Sequence[Shard], path: Path, queries: int = 6, best: int = 5) -> Path:
    """Draw `queries` captions, evenly spread over the pairs, and the `best` images of each; the right one is framed.

    The rows are picked by position alone, not by how well they went.
    """
    pairs = len(embeddings.keys)
    queries, best = min(queries, pairs), min(best, pairs)
    rows = [(2 * line + 1) * pairs // (2 * queries) for line in range(queries)]
    ranked = [(embeddings.image @ embeddings.text[row]).topk(best).indices.tolist() for row in rows]
    drawn = {embeddings.keys[number] for number in {*rows, *chain(*ranked)}}
    content = {key: (image, caption) for key, image, caption in _pairs(shards, drawn)}
    sheet = Image.new("RGB", (TEXT_WIDTH + best * (TILE + GAP) + GAP, len(rows) * (TILE + GAP) + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), caption_font(15)
    for line, (row, order) in enumerate(zip(rows, ranked, strict=True)):
        top = GAP + line * (TILE + GAP)
        caption = content[embeddings.keys[row]][1]
        text = "\n".join(wrapped(caption, font, TEXT_WIDTH - 2 * GAP, lines=5))
        draw.multiline_text((GAP, top + 4), text, INK, font, spacing=4)
        for place, found in enumerate(order):
            left = TEXT_WIDTH + place * (TILE + GAP)
            tile = decode(content[embeddings.keys[found]][0])
            tile.thumbnail((TILE - 8, TILE - 8))
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            frame = (left, top, left + TILE - 1, top + TILE - 1)
            draw.rectangle(frame, outline=RIGHT if found == row else WRONG, width=4 if found == row else 1)
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")
    return path


def _pairs(shards: Sequence[Shard], keys: set[str]) -> Iterator[tuple[str, bytes, str]]:
    """Key, image and caption of the wanted pairs."""
    files = PairFiles(shards)
    for place in all_places(shards):
        if place.key in keys:
            with suppress(Unusable):  # of two pairs with one key
                yield place.key, *files.read(place)
