"""One's own pairs, in whatever form they lie there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from align_train.data.own_pairs.class_folders import TEMPLATES, open_class_folders, read_templates
from align_train.data.own_pairs.columns import Wanted
from align_train.data.own_pairs.formats import FORMATS, SPLIT_FOLDERS, guess_format, split_folders, table_beside_images
from align_train.data.own_pairs.karpathy_json import open_karpathy
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.pictures import Links
from align_train.data.own_pairs.saved_datasets import open_dataset
from align_train.data.own_pairs.tables import open_image_folder, open_table
from align_train.data.own_pairs.tar_shards import open_tar_shards
from align_train.data.own_pairs.text_files import open_text_files

__all__ = ["OpenedPairs", "OwnPairs"]
_COLUMNS = ("image_column", "caption_columns", "label_column", "templates")
_USED = {
    "table": ("images", "delimiter", *_COLUMNS),
    "imagefolder": ("delimiter", *_COLUMNS),
    "text_files": (),
    "class_folders": ("templates",),
    "dataset": ("split", *_COLUMNS),
    "karpathy": ("images", "split"),
    "tar_shards": ("caption_columns", "label_column"),
}


@dataclass(frozen=True)
class OwnPairs:
    """Where one's own images and captions are, and how to read them; what is None is guessed, and told.

    Attributes:
        path: a file, a folder, a glob, or an id on the Hugging Face hub; `formats.FORMATS` says which.
        format: one of the names of `formats.FORMATS`.
        images: of tables and Karpathy's JSON, the folder that image paths are relative to; None for the file's own.
        image_column: of paths, links, bytes, or the structs of `datasets`.
        caption_columns: one name or several; cells that are lists hold several captions. Of tars, fields of key.json.
        label_column: names of classes.
        split: of datasets and Karpathy's JSON; None for train.
        validation: a second path of the same kind; of datasets and Karpathy's JSON a split. None takes a split or a
            folder beside train that is called validation, val, valid or dev, if there is one.
        templates: sentences with `{}` for the class, as a JSON file or a list: for class folders, and to
            make captions of the classes of tables and datasets. None: `class_folders.TEMPLATES` for class folders.
        allow_links: download images whose column holds http or https links to public addresses.
        networks: private networks where links may lead as well, such as `10.0.0.0/8`.
        delimiter: of csv, tsv and txt, one character or `tab`; None takes what divides the first line.
    """

    path: str
    format: str | None = None
    images: str | None = None
    image_column: str | None = None
    caption_columns: str | Sequence[str] | None = None
    label_column: str | None = None
    split: str | None = None
    validation: str | None = None
    templates: str | Sequence[str] | None = None
    allow_links: bool = False
    networks: Sequence[str] = ()
    delimiter: str | None = None

    def open(self) -> OpenedPairs:
        """The rows of training and, where there are some, of validation; images are not read yet.

        Raises:
            OSError: a file cannot be read.
            ValueError: no format fits; settings are of no use for the format; or the data is not what the format says.
        """
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"pairs.format is {self.format}: give one of {', '.join(FORMATS)}")
        format, why = (self.format, "pairs.format says so") if self.format else guess_format(self.path)
        if idle := [
            name for names in _USED.values() for name in names if name not in _USED[format] and self._has(name)
        ]:
            raise ValueError(f"{self.path} is read as {format}, which has no use for pairs.{idle[0]}: leave it out")
        others = ", ".join(name for name in FORMATS if name != format)
        told = [f"{self.path} is read as {format}, since {why}. Change with pairs.format={others.replace(', ', '|')}"]
        path, validation = self.path, self.validation
        if format in SPLIT_FOLDERS and Path(path).is_dir() and (parts := split_folders(path)):
            path, validation = parts.train, validation or parts.validation
            used = f"trains on {path}, validates on {validation or 'none of them'}"
            told.append(f"{self.path} has folders of splits: {used}; not used: {', '.join(parts.others) or 'none'}")
        opened = self._opened(format, path)
        told += opened.told
        if format in ("dataset", "karpathy") or validation is None:
            return replace(opened, told=told)
        try:
            second = self._opened(format, validation)
        except (OSError, ValueError) as error:
            raise ValueError(f"pairs.validation={validation}: {error}") from error
        return OpenedPairs(
            [*told, *(f"validation: {line}" for line in second.told)], opened.train, second.train, opened.total
        )

    def _has(self, setting: str) -> bool:
        return getattr(self, setting) is not None

    def _opened(self, format: str, path: str) -> OpenedPairs:
        links, captions = Links(self.allow_links, tuple(self.networks)), self._captions
        templates = read_templates(self.templates)
        wanted = Wanted(self.image_column, captions, self.label_column, templates)
        readers: dict[str, Callable[[], OpenedPairs]] = {
            "table": lambda: self._table(path, wanted, links),
            "imagefolder": lambda: open_image_folder(path, self.delimiter, wanted, links),
            "text_files": lambda: open_text_files(path),
            "class_folders": lambda: open_class_folders(path, templates or TEMPLATES),
            "dataset": lambda: open_dataset(path, self.split, self.validation, wanted, links),
            "karpathy": lambda: open_karpathy(path, self.images, self.split, self.validation),
            "tar_shards": lambda: open_tar_shards(path, captions, self.label_column),
        }
        return readers[format]()

    def _table(self, path: str, wanted: Wanted, links: Links) -> OpenedPairs:
        if not Path(path).is_dir():
            return open_table(path, self.images, self.delimiter, wanted, links)
        table, folder = table_beside_images(path)
        opened = open_table(table, self.images or folder, self.delimiter, wanted, links)
        line = f"{path}: the table is {table}, and paths of images start from {self.images or folder}. Change with "
        return replace(opened, told=[f"{line}pairs.path=TABLE, pairs.images=FOLDER", *opened.told])

    @property
    def _captions(self) -> tuple[str, ...] | None:
        given = self.caption_columns
        return (given,) if isinstance(given, str) else tuple(given) if given else None
