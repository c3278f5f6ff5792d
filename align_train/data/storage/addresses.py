"""Where shards lie: names, globs, folders and brace ranges, on this machine or behind fsspec, to one address each."""

import glob
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path
from stat import S_ISDIR
from typing import TypeVar
from urllib.parse import urlsplit

from braceexpand import braceexpand

from align_train.data.crew import Crew

T = TypeVar("T")
MOST_NAMES = 10_000_000  # that one pattern may stand for
_LOCAL = ("file://", "local://")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(?<=://)([^\s?'\"]*)[?#][^\s'\"]*")
_PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}


def expand(patterns: str | Sequence[str], stall_seconds: float = 120.0) -> list[str]:
    """Addresses of shards: paths for local ones, and as they were given for remote ones.

    A pattern is a file, a folder (for its *.tar), a glob, a brace range as `{00000..00099}` or `{a,b}`, or any of
    these behind a protocol that fsspec knows. The order is that of the patterns, of the braces within one, and of the
    names within a glob. A shard that is named twice comes twice. Only globs ask a remote store; remote names are
    taken as they are.

    Args:
        patterns: one or several.
        stall_seconds: after which a store that should list files counts as stalled.

    Raises:
        TimeoutError: a store did not list its files in time.
        FileNotFoundError: a pattern matches nothing, or some of the local files that it names are missing.
        ValueError: the pattern runs a command, stands for too many names, is a glob of a web server, or needs a
            package that is not installed.
    """
    each = [patterns] if isinstance(patterns, str) else patterns
    return [found for pattern in each for found in _expanded(pattern, stall_seconds)]


def is_remote(address: str) -> bool:
    """Whether an address is another machine's, or fsspec's."""
    return "://" in address and not address.startswith(_LOCAL)


def local_path(address: str) -> str:
    """A local address without its protocol."""
    return next((address.removeprefix(start) for start in _LOCAL if address.startswith(start)), address)


def shown(text: str) -> str:
    """An address, or a message with addresses, as it may be printed: without user, password, query and fragment."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def check_protocol(address: str) -> None:
    """Refuse a remote address whose protocol is not known, or whose package is not installed, with a ValueError."""
    import fsspec  # type: ignore[import-untyped]

    protocol = address.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        package, extra = _PACKAGES.get(protocol, ("", ""))
        remedy = f"install {package}: pip install 'align-train[{extra}]'" if package else str(error)
        raise ValueError(f"{shown(address)}: addresses of {protocol}:// cannot be read here: {remedy}") from error


def _expanded(pattern: str, stall_seconds: float) -> list[str]:
    if pattern == "-" or pattern.startswith("pipe:"):
        raise ValueError(
            f"{pattern!r} is no shard: commands and standard input in place of names are not read, for they run code; "
            "give a path or an address, such as s3://bucket/shards/{00000..00099}.tar"
        )
    names = [pattern] if os.path.exists(pattern) else _without_braces(pattern)
    if is_remote(pattern):
        check_protocol(pattern)
        return [address for name in names for address in _remote(name, stall_seconds)]
    found = [_local(local_path(name)) for name in names]
    missing = [name for name, paths in zip(names, found, strict=True) if not paths]
    if missing:
        raise _nothing(pattern, missing, len(names))
    return [path for paths in found for path in paths]


def _without_braces(pattern: str) -> list[str]:
    if math.prod(map(_choices, _BRACES.findall(pattern))) > MOST_NAMES:
        raise ValueError(f"{shown(pattern)} stands for more than {MOST_NAMES:,} names: check the range in its braces")
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise ValueError(f"{shown(pattern)}: a brace has no partner; a range is written {{00000..00099}}") from error


def _choices(braces: str) -> int:
    """How many names a pair of braces stands for: a range, or a list with commas."""
    numbers = _RANGE.fullmatch(braces)
    if not numbers:
        return braces.count(",") + 1
    start, end, step = (int(number or 1) for number in numbers.groups())
    return abs(end - start) // max(step, 1) + 1


def _local(name: str) -> list[str]:
    """The files that a name, folder or glob stands for; none if there is none."""
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    return sorted(glob.glob(os.path.join(glob.escape(name), "*.tar"))) if S_ISDIR(mode) else [name]


def _nothing(pattern: str, missing: list[str], names: int) -> FileNotFoundError:
    first = Path(local_path(missing[0]))
    folder = first if first.is_dir() else first.parent
    some = f": {len(missing):,} of its {names:,} names have no file, the first is {missing[0]}" if names > 1 else ""
    return FileNotFoundError(
        f"no shard matches {pattern!r}{some}: write the shards first (`align-train prepare` writes the sample "
        f"corpus), or point data at yours; looked in {folder.absolute()}"
    )


def _remote(name: str, stall_seconds: float) -> list[str]:
    """A remote name as it is; a glob or a folder as its store lists it."""
    web = name.startswith(("http://", "https://"))
    wanted = name + "*.tar" if name.endswith("/") else name
    if not glob.has_magic(urlsplit(wanted).path if web else wanted):  # a web address may hold [::1] and ?
        return [name]
    if web:
        raise ValueError(
            f"{shown(name)}: a web server does not tell which files it has: name the shards with a brace range, such "
            "as {00000..00099}.tar"
        )
    import fsspec

    store, path = fsspec.core.url_to_fs(wanted)
    listing = Crew(1).submit(store.glob, path)
    if not wait([listing], timeout=stall_seconds).done:
        raise TimeoutError(
            f"{shown(name)}: the store did not list its files within {stall_seconds:g} s: check the network, raise "
            "data.reading.stall_seconds, or name the shards with a brace range, which needs no listing"
        )
    found = sorted(listing.result())
    if not found:
        raise FileNotFoundError(
            f"no shard matches {shown(name)}: check the name, and that the credentials in the environment may list it"
        )
    start = wanted.removesuffix(path)
    return [start + each for each in found] if start != wanted else [store.unstrip_protocol(each) for each in found]
