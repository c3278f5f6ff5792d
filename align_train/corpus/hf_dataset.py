"""Any Hugging Face dataset of images and captions as pairs; image files stay encoded as they are.

`datasets` is imported late: it costs a second, and although importing it leaves torch alone, opening a stream makes
it import torch where that is installed (to share the epoch with torch's workers). Nothing here uses torch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_train.records import Pair

CAPTION_NAMES = ("caption", "captions", "text", "txt", "alt", "alt_text", "title", "description")


def dataset_pairs(
    path: str,
    split: str = "train",
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    data_dir: str | None = None,
    streaming: bool = True,
    key_column: str | None = None,
) -> Iterator[Pair]:
    """The pairs of one split; columns of plain values become metadata.

    Args:
        path: a hub id, a folder of images (with metadata.jsonl), a folder written by save_to_disk, a parquet file or
            glob, or the name of a builder such as `imagefolder`.
        split: name of the split; without streaming also a slice, `train[:1000]`.
        image_column: an Image feature, or encoded bytes; None to guess.
        caption_column: text, or a list of texts, each of which makes a pair `KEY-0`, `KEY-1` ...; None to guess.
        data_dir: folder of the data, for a builder or inside a hub repository.
        streaming: read while downloading instead of filling the cache first.
        key_column: unique names of the rows; None for the row number.
    """
    rows = _opened(path, split, data_dir, streaming)
    if rows.features is None:
        raise ValueError(f"{path} does not say which columns it has: set streaming=false")
    image_column = _chosen("image_column", image_column, rows.features, _image_candidates(rows.features))
    caption_column = _chosen("caption_column", caption_column, rows.features, _caption_candidates(rows.features))
    if key_column is not None:
        _chosen("key_column", key_column, rows.features, [])
    for number, row in enumerate(_encoded(rows, image_column, caption_column)):
        key = f"{number:08d}" if key_column is None else str(row[key_column])
        image, captions = _file_content(row.pop(image_column)), row.pop(caption_column)
        metadata = {name: _plain(value) for name, value in row.items() if value is not None}
        if isinstance(captions, list):
            for index, caption in enumerate(captions):
                yield Pair(f"{key}-{index}", image, caption or "", metadata)
        else:
            yield Pair(key, image, captions or "", metadata)


def _opened(path: str, split: str, data_dir: str | None, streaming: bool) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):  # by save_to_disk
        saved = load_from_disk(path)
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"{path} has no split {split}: set split to one of {', '.join(saved)}")
        return saved[split]
    if path.endswith(".parquet"):
        return load_dataset("parquet", data_files=path, split=split, streaming=streaming)
    return load_dataset(path, data_dir=data_dir, split=split, streaming=streaming)


def _image_candidates(features: Any) -> list[str]:
    from datasets import Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    return images or [name for name, feature in features.items() if _is_bytes(feature)]


def _caption_candidates(features: Any) -> list[str]:
    texts = {name.lower(): name for name, feature in features.items() if _is_text(feature)}
    known = [texts[name] for name in CAPTION_NAMES if name in texts]
    return known[:1] or list(texts.values())


def _chosen(key: str, wanted: str | None, features: Any, candidates: list[str]) -> str:
    """The column the user named, else the only candidate, else the candidate called image; or a ValueError."""
    listed = ", ".join(f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in features.items())
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"{key}={wanted} is not a column of the dataset; it has {listed}")
        return wanted
    if len(candidates) == 1:
        return candidates[0]
    if "image" in candidates:
        return "image"
    raise ValueError(f"set {key}: {len(candidates)} columns could be meant; the dataset has {listed}")


def _encoded(rows: Any, image_column: str, caption_column: str) -> Any:
    """The rows with the image as its file, without columns that JSON cannot hold, such as further images."""
    from datasets import Image

    kept = [name for name, feature in rows.features.items() if _is_plain(feature)]
    is_image = isinstance(rows.features[image_column], Image)
    rows = rows.select_columns(list(dict.fromkeys([image_column, caption_column, *kept])))
    return rows.cast_column(image_column, Image(decode=False)) if is_image else rows


def _file_content(image: Any) -> bytes:
    """Bytes of the encoded file; no bytes for a missing image, which the shard writer counts as dropped."""
    import fsspec  # type: ignore[import-untyped]

    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        with fsspec.open(image, "rb") as file:  # a local path, or an address inside a remote archive
            return bytes(file.read())
    return image or b""


def _is_bytes(feature: Any) -> bool:
    return "binary" in str(getattr(feature, "dtype", "")) or (isinstance(feature, dict) and "bytes" in feature)


def _is_text(feature: Any) -> bool:
    return "string" in str(getattr(getattr(feature, "feature", feature), "dtype", ""))


def _is_plain(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    if isinstance(feature, dict):
        return all(_is_plain(inner) for inner in feature.values())
    inner = getattr(feature, "feature", None)
    return _is_plain(inner) if inner is not None else isinstance(feature, Value | ClassLabel) and not _is_bytes(feature)


def _plain(value: Any) -> Any:
    """The value as JSON holds it; dates and decimals as text."""
    return value if isinstance(value, str | int | float) else json.loads(json.dumps(value, default=str))
