"""Which format a path is in, by its ending and by what lies there."""

import glob
import json
import os
import re
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from align_train.data.own_pairs.columns import SAMPLE
from align_train.data.own_pairs.pictures import names_picture
from align_train.data.own_pairs.saved_datasets import SAVED, VALIDATION
from align_train.data.own_pairs.tables import METADATA, TABLES
from align_train.data.own_pairs.walking import Contents, contents, ending, is_hidden, stem
from align_train.data.testsets.table_files import kind, rows

FORMATS = {
    "table": f"a {', '.join(TABLES)} with columns of images and captions",
    "imagefolder": f"a folder with {', '.join(METADATA)} (Hugging Face)",
    "text_files": "a folder of images, each with a .txt of its name",
    "class_folders": "a folder with a folder of images for each class",
    "dataset": "a folder of save_to_disk, or a Hugging Face hub id such as nlphuji/flickr30k",
    "karpathy": "a .json of Karpathy's splits",
    "tar_shards": "tars, a folder of them, a glob or a brace range",
}
SPLIT_FOLDERS = ("imagefolder", "text_files", "class_folders", "table", "tar_shards")
_FILES = (*TABLES, ".json", ".tar", ".zip", ".gz", ".xlsx", ".xls", ".pdf")  # an id on the hub does not end so
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
    suffix = Path(path).suffix.lower()
    there = Path(path).is_file() or bool(glob.glob(path))
    if suffix in TABLES:
        return "table", f"it ends with {suffix}"
    if suffix == ".json":
        return "karpathy", "it ends with .json"
    if there:
        raise ValueError(f"{path} ends with {suffix or 'nothing known'}: {_choice()}")
    if _HUB_ID.fullmatch(path) and suffix not in _FILES and not Path(path).parent.exists():
        return "dataset", f"there is no such folder in {Path.cwd()}, so it may be an id on the Hugging Face hub"
    raise ValueError(f"{path} is neither a file nor a folder{_alike(path)}: {_choice()}")


def _alike(path: str) -> str:
    """What lies there under a name that is nearly the same."""
    folder = Path(path).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = get_close_matches(Path(path).name, names, 1)
    return f", but {folder / near[0]} is there" if near else ""


class SplitFolders(NamedTuple):
    """The folder to train on, the one to validate on, if there is one, and what else lies beside them."""

    train: str
    validation: str | None
    others: list[str]


def split_folders(path: str) -> SplitFolders | None:
    """PATH/train, and PATH/validation, val, valid or dev; None where these do not stand for splits.

    A class may be called train; so they do where no folder but `test` lies beside them, and no metadata file. Names
    are read in any case.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(path) as entries:
        each = {entry.name: entry.is_dir() for entry in entries if not is_hidden(entry.name)}
    folders = {name.lower(): name for name, folder in each.items() if folder}
    if (
        "train" not in folders
        or folders.keys() - {"train", "test", *VALIDATION}
        or not each.keys().isdisjoint(METADATA)
    ):
        return None
    train = folders["train"]
    held_out = next((folders[name] for name in VALIDATION if name in folders), None)
    others = sorted(each.keys() - {train, held_out})
    return SplitFolders(os.path.join(path, train), held_out and os.path.join(path, held_out), others)


def table_beside_images(path: str) -> tuple[str, str]:
    """The one table of a folder, and the folder that its paths of images start from.

    Raises:
        ValueError: there is not exactly one table, or images lie in several folders.
        OSError: the folder cannot be read.
    """
    if found := _table(path, contents(path)):
        return found
    raise ValueError(
        f"{path} has not one table beside one folder of images: set pairs.path to the table, and pairs.images to the "
        "folder that its paths start from"
    )


def _table(path: str, found: Contents) -> tuple[str, str] | None:
    """As `table_beside_images`; None where there is no such table."""
    tops = {name.split(os.sep, 1)[0] if os.sep in name else "" for name in found.images}
    tables = [Path(path) / name for name in found.others if os.sep not in name and Path(name).suffix.lower() in TABLES]
    tables = [file for file in tables if kind(file) != ".txt"] or [file for file in tables if _lists_images(file)]
    if len(tables) != 1 or len(tops) == 0 or len(tops - {""}) > 1:
        return None
    top, table = "" if "" in tops else min(tops), tables[0]
    named = top and any(f"{top}{slash}" in _beginning(table) for slash in "/\\")
    return str(table), path if named or not top else os.path.join(path, top)


def _lists_images(file: Path) -> bool:
    """Whether the first or second line has a cell that names an image."""
    lines = _beginning(file).splitlines()[:2]
    return any(names_picture(cell) for line in lines for cell in re.split(r"[,;\t|]", line))


def _beginning(file: Path) -> str:
    """Some of a table's text."""
    if kind(file) == ".parquet":
        return json.dumps(list(islice(rows(file), SAMPLE)), default=lambda cell: "")
    with file.open("rb") as opened:
        return opened.read(2**16).decode("utf-8", "replace").replace("\0", "")


def _of_folder(path: str) -> tuple[str, str]:
    with os.scandir(path) as entries:
        names = {entry.name for entry in entries}
    if saved := names.intersection(SAVED):
        return "dataset", f"it has {min(saved)}, as save_to_disk writes"
    if any(name.endswith(".tar") for name in names):
        return "tar_shards", "there are tars in it"
    splits = split_folders(path)
    found = contents(splits.train if splits else path)
    if splits and any(name.endswith(".tar") for name in found.others):
        return "tar_shards", f"there are tars in {splits.train}"
    if described := [name for name in found.others if Path(name).name in METADATA]:
        return "imagefolder", f"it has {described[0]}"
    return _by_images(path, splits.train if splits else path, found)


def _by_images(path: str, place: str, found: Contents) -> tuple[str, str]:
    stems = {stem(name) for name in found.images}
    texts = [name for name in found.others if ending(name) == "txt" and stem(name) in stems]
    if texts:
        return "text_files", f"images have a .txt beside them, such as {texts[0]}"
    if table := _table(place, found):
        return "table", f"{Path(table[0]).name} lies beside the images"
    tops = {name.split(os.sep, 1)[0] for name in found.images if os.sep in name}
    if len(tops) > 1 and 2 * sum(os.sep in name for name in found.images) > len(found.images):
        return "class_folders", "images lie in its folders, without texts"
    if not found.images and any(ending(name) == "parquet" for name in found.others):
        return "dataset", "it has parquet files, as repositories of the Hugging Face hub"
    if tar := next((name for name in found.others if ending(name) == "tar"), None):
        raise ValueError(
            f"tars lie in folders of {path}, such as {tar}: set pairs.path to one of these folders, and "
            "pairs.validation to another"
        )
    raise ValueError(
        f"{path} has {len(found.images):,} images and {len(found.others):,} other files, but no format fits: "
        f"looked for {', '.join(SAVED)}, *.tar, {', '.join(METADATA)}, a .txt of an image's name, one table beside the "
        f"images, images in several folders of classes, and parquet files; {_choice()}"
    )


def _choice() -> str:
    each = "; ".join(f"{name}, {what}" for name, what in FORMATS.items())
    return f"correct pairs.path, or set pairs.format to one of: {each}"
