"""Which format a path is in, by its ending and by what lies there."""

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

from align_train.data.own_pairs.saved_datasets import SAVED, VALIDATION
from align_train.data.own_pairs.tables import METADATA
from align_train.data.own_pairs.walking import Contents, contents
from align_train.data.testsets.table_files import KINDS

FORMATS = {
    "table": f"a {', '.join(KINDS)} with columns of images and captions",
    "imagefolder": f"a folder with {', '.join(METADATA)} (Hugging Face)",
    "text_files": "a folder of images, each with a .txt of its name",
    "class_folders": "a folder with a folder of images for each class",
    "dataset": "a folder of save_to_disk, or a Hugging Face hub id such as nlphuji/flickr30k",
    "karpathy": "a .json of Karpathy's splits",
    "tar_shards": "tars, a folder of them, a glob or a brace range",
}
SPLIT_FOLDERS = ("imagefolder", "text_files", "class_folders")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[\w-]+(\.[\w-]+)*")


def guess_format(path: str) -> tuple[str, str]:
    """The format, and why.

    Raises:
        ValueError: nothing fits; with what was looked for.
        OSError: a folder cannot be read.
    """
    if path.endswith(".tar"):
        return "tar_shards", "it ends with .tar"
    if Path(path).is_dir():
        return _of_folder(path)
    suffix = Path(path).suffix
    if Path(path).is_file() or glob.glob(path) or "/" not in path or suffix in (*KINDS, ".json"):
        if suffix in KINDS:
            return "table", f"it ends with {suffix}"
        if suffix == ".json":
            return "karpathy", "it ends with .json"
        there = Path(path).exists() or glob.glob(path)
        problem = f"ends with {suffix or 'nothing known'}" if there else "is neither a file nor a folder"
        raise ValueError(f"{path} {problem}: {_choice()}")
    if _HUB_ID.fullmatch(path):
        return "dataset", f"there is no such folder in {Path.cwd()}, so it may be an id on the Hugging Face hub"
    raise ValueError(f"{path} is neither a file nor a folder: {_choice()}")


class SplitFolders(NamedTuple):
    """The folder to train on, the one to validate on, if there is one, and what else lies beside them."""

    train: str
    validation: str | None
    others: list[str]


def split_folders(path: str) -> SplitFolders | None:
    """PATH/train, and PATH/validation, val, valid or dev; None where these do not stand for splits.

    A class may be called train; so they do where no folder but `test` lies beside them, and no metadata file.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(path) as entries:
        each = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    folders = {name for name, folder in each.items() if folder}
    if "train" not in folders or folders - {"train", "test", *VALIDATION} or not each.keys().isdisjoint(METADATA):
        return None
    held_out = next((name for name in VALIDATION if name in folders), None)
    others = sorted(each.keys() - {"train", held_out})
    return SplitFolders(os.path.join(path, "train"), held_out and os.path.join(path, held_out), others)


def _of_folder(path: str) -> tuple[str, str]:
    with os.scandir(path) as entries:
        names = {entry.name for entry in entries}
    if saved := names.intersection(SAVED):
        return "dataset", f"it has {min(saved)}, as save_to_disk writes"
    if any(name.endswith(".tar") for name in names):
        return "tar_shards", "there are tars in it"
    splits = split_folders(path)
    found = contents(splits.train if splits else path)
    if described := [name for name in found.others if Path(name).name in METADATA]:
        return "imagefolder", f"it has {described[0]}"
    return _by_images(path, found)


def _by_images(path: str, found: Contents) -> tuple[str, str]:
    stems = {str(Path(name).with_suffix("")) for name in found.images}
    texts = [name for name in found.others if name.endswith(".txt") and str(Path(name).with_suffix("")) in stems]
    if texts:
        return "text_files", f"images have a .txt beside them, such as {texts[0]}"
    if 2 * sum(os.sep in name for name in found.images) > len(found.images):
        return "class_folders", "images lie in its folders, without texts"
    if not found.images and any(name.endswith(".parquet") for name in found.others):
        return "dataset", "it has parquet files, as repositories of the Hugging Face hub"
    raise ValueError(
        f"{path} has {len(found.images):,} images and {len(found.others):,} other files, but no format fits: "
        f"looked for {', '.join(SAVED)}, *.tar, {', '.join(METADATA)}, a .txt of an image's name, images in folders of "
        f"classes, and parquet files; {_choice()}"
    )


def _choice() -> str:
    each = "; ".join(f"{name}, {what}" for name, what in FORMATS.items())
    return f"correct pairs.path, or set pairs.format to one of: {each}"
