"""Images that have not been read yet: files, links, bytes, and parts of tars."""

import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align_train.corpus.fetch.client import Client, Limits, Permissions
from align_train.corpus.images import Unusable
from align_train.data.own_pairs.cells import described, is_empty
from align_train.data.own_pairs.rows import Picture
from align_train.data.own_pairs.walking import ending
from align_train.data.storage.shards import OpenFiles, Shard
from align_train.data.storage.tars import IMAGE_EXTENSIONS, Span

# One file at a time, larger and slower than a crawl would take: people know their own links.
LIMITS = Limits(total_seconds=20.0, max_bytes=50_000_000, connections=1, per_host=1, window=1)
_LINK = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
_FROM_HUB = re.compile(r"(\w+://.*::)?hf://")  # as streams of `datasets` name files of a repository, or of its zips


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A file on disk; its name is the path."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def read(self) -> bytes:
        """The file, see `located`; OSError as `open`, also where no file can be called so."""
        try:
            return _content(self.path)
        except FileNotFoundError:
            found = located(self.path)
            if found == self.path:
                raise
            return _content(found)
        except ValueError as error:  # a null character, or half of a surrogate pair
            raise OSError(f"no file can be called {self.name!r}: {error}") from error


def _content(path: Path) -> bytes:
    if stat.S_ISFIFO(path.stat().st_mode):
        raise OSError(f"{path} is a pipe, and no file")
    return path.read_bytes()


def located(path: Path) -> Path:
    """The path if a file is there, else the first of its other spellings where one is; else the path as it is."""
    try:
        return next((Path(text) for text in _spellings(str(path)) if Path(text).is_file()), path)
    except (OSError, ValueError):  # a name that no file can have
        return path


def _spellings(path: str) -> Iterator[str]:
    r"""As it is; without spaces around names, with / for \, without the #0 of Flickr8k's captions; with the ending in
    other cases; and with accents as one letter (NFC) or two (NFD, as macOS writes them)."""
    yield path
    tidy = re.sub(r"#\d+$", "", re.sub(r"\s*[\\/]\s*", "/", path).strip())
    stem, ending = os.path.splitext(tidy)
    for text in (tidy, stem + ending.lower(), stem + ending.upper()):
        folder, name = os.path.split(text)
        yield text
        for form in _FORMS:
            yield os.path.join(folder, unicodedata.normalize(form, name))
            yield unicodedata.normalize(form, text)


@dataclass(frozen=True, slots=True)
class PictureLink:
    """A file behind http or https, at a public address unless `permissions` say more; nothing else is opened."""

    name: str
    permissions: Permissions

    def read(self) -> bytes:
        """The file, after up to two retries; OSError with the reason as `Download` names it."""
        with closing(Client(LIMITS, self.permissions).downloads([(0, self.name)])) as downloads:
            (_, download), *_ = downloads
        if download.reason:
            remedy = ": allow it with pairs.networks=[NETWORK]" if download.reason == "refused_address" else ""
            raise OSError(f"{self.name} was not fetched: {download.reason} ({download.detail}){remedy}")
        return download.content


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository on the Hugging Face hub, at an address that `datasets` gave."""

    name: str

    def read(self) -> bytes:
        """The file; OSError where the hub does not give it."""
        import fsspec  # type: ignore[import-untyped]  # it has no types

        with fsspec.open(self.name, "rb") as file:
            return bytes(file.read())


@dataclass(frozen=True, slots=True)
class PictureBytes:
    """A file that the data itself holds; it has no name."""

    content: bytes = field(repr=False)
    name: str = ""

    def read(self) -> bytes:
        """The file."""
        return self.content


@dataclass(frozen=True, slots=True)
class PictureInShard:
    """A member of a tar; it has no name."""

    shard: Shard
    span: Span
    name: str = ""

    def read(self) -> bytes:
        """The member; OSError where the tar is gone or has become shorter."""
        try:
            return self.shard.opened(lambda path: OpenFiles(1).read(path, self.span, str(self.shard)))
        except Unusable as error:
            raise OSError(str(error)) from error


@dataclass(frozen=True)
class Links:
    """Whether links may be followed.

    Attributes:
        allowed: http and https links to public addresses.
        networks: private networks where links may lead as well, such as `10.0.0.0/8`.
    """

    allowed: bool = False
    networks: tuple[str, ...] = ()

    def picture(self, url: str) -> PictureLink:
        """The picture behind a link; ValueError where links are not allowed."""
        if not self.allowed:
            raise ValueError(f"{url} is a link: {ALLOW}")
        return PictureLink(url, Permissions(networks=self.networks))


ALLOW = "allow them with pairs.allow_links=true, or fetch them first with `align-train prepare source=coyo`"


def is_link(cell: object) -> bool:
    """Whether a cell is a link, be it followed or not."""
    address = _address(cell)
    return isinstance(address, str) and bool(_LINK.match(address)) and not _FROM_HUB.match(address)


def picture_of(cell: Any, folder: Path, links: Links) -> Picture | None:
    """What a cell says is its image.

    Args:
        cell: encoded bytes, a path, a link, or the struct {bytes, path} of `datasets`; None or empty for no image.
        folder: that paths are relative to.
        links: whether links may be followed.

    Raises:
        Unusable: `no_image`, for a cell of something else.
        ValueError: it is a link, and these are not allowed.
    """
    if not holds_picture(cell):
        raise Unusable("no_image", f"the cell of the image holds {described(cell)}")
    address = _address(cell)
    if is_empty(address) or address == b"":
        return None
    if isinstance(address, bytes):
        return PictureBytes(address)
    address = str(address)
    if _FROM_HUB.match(address):
        return HubFile(address)
    return links.picture(address) if is_link(address) else PictureFile(folder / address)


def holds_picture(cell: object) -> bool:
    """Whether a cell is of a kind that may hold an image, or empty: no list, no array, no struct of other things."""
    if isinstance(cell, Mapping):
        return "bytes" in cell or "path" in cell
    return cell is None or isinstance(cell, str | bytes | int | float)


def names_picture(cell: str) -> bool:
    """Whether a text is a link, or has an image's ending."""
    return is_link(cell) or ending(re.sub(r"#\d+$", "", cell.strip())) in IMAGE_EXTENSIONS


def looks_like_picture(cell: object, folder: Path) -> bool:
    """Whether a cell holds an image, is a link, or names a file that is there or has an image's ending."""
    address = _address(cell)
    if not isinstance(address, str) or len(address) > 4096 or "\n" in address or "\0" in address:
        return isinstance(address, bytes)
    if names_picture(address) or _FROM_HUB.match(address):
        return True
    try:
        return (folder / address).is_file()
    except OSError:  # a text too long for a name
        return False


def _address(cell: object) -> object:
    """The struct of `datasets` as its bytes, or else its path."""
    return (cell.get("bytes") or cell.get("path")) if isinstance(cell, Mapping) else cell
