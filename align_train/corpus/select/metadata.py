"""Where metadata lies: parquet files on this machine or behind any address that fsspec opens, found and checked."""

import glob
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class MetadataFile:
    """One parquet file.

    Attributes:
        path: local path, or address with its protocol.
        rows: number of rows.
        schema: names and types of its columns.
        digest: SHA-256 of its footer, which has the size and the extremes of every column chunk.
    """

    path: str
    rows: int
    schema: pa.Schema
    digest: str


def find_metadata(patterns: str | Sequence[str]) -> list[MetadataFile]:
    """The parquet files that paths, folders, globs or addresses name, in the order given, each once.

    Addresses are fsspec's: `https://host/file.parquet`, `hf://datasets/kakaobrain/coyo-700m/data/*.parquet`,
    `s3://bucket/*.parquet` (needs s3fs), `gs://bucket/*.parquet` (needs gcsfs).

    Raises:
        FileNotFoundError: a pattern matches nothing.
        OSError: a file cannot be read, or an address does not answer.
        ValueError: a file is no whole parquet file, or its protocol needs a package that is not installed.
    """
    paths = [path for pattern in ([patterns] if isinstance(patterns, str) else patterns) for path in _matches(pattern)]
    if not paths:
        raise FileNotFoundError("no metadata is named: give parquet files, folders of them, globs or addresses")
    once: dict[str, str] = {}
    for path in paths:
        once.setdefault(path if "://" in path else os.path.realpath(path), path)
    with ThreadPoolExecutor(16) as pool:  # servers take their time to answer
        return list(pool.map(open_metadata, once.values()))


def filesystem_of(path: str) -> Any:
    """fsspec's file system behind an address, or None for a local path."""
    if "://" not in path:
        return None
    import fsspec  # type: ignore[import-untyped]

    try:
        return fsspec.core.url_to_fs(path)[0]
    except ImportError as error:
        raise ValueError(f"{path} needs another package: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no address that can be read: {error}") from error


def _matches(pattern: str) -> list[str]:
    found = _remote_matches(pattern) if "://" in pattern else _local_matches(pattern)
    if not found:
        raise FileNotFoundError(
            f"no metadata file matches {pattern!r}: give parquet files, a folder of them, or a glob"
        )
    return found


def _local_matches(pattern: str) -> list[str]:
    if os.path.isfile(pattern):  # whatever letters its name has
        return [pattern]
    wanted = os.path.join(glob.escape(pattern), "*.parquet") if os.path.isdir(pattern) else pattern
    return sorted(glob.glob(wanted, recursive=True))


def _remote_matches(pattern: str) -> list[str]:
    filesystem = filesystem_of(pattern)
    try:
        if not pattern.startswith("http") and filesystem.isdir(pattern):  # HTTP has no folders
            pattern = f"{pattern.rstrip('/')}/*.parquet"
        if glob.has_magic(pattern):
            return sorted(filesystem.unstrip_protocol(path) for path in filesystem.glob(pattern))
    except Exception as error:
        raise OSError(f"{pattern} cannot be listed ({error}): check the address and the network") from error
    return [pattern]


def open_metadata(path: str) -> MetadataFile:
    """One file, by path or address; raises as `find_metadata`."""
    filesystem = filesystem_of(path)
    try:
        with open(path, "rb") if filesystem is None else filesystem.open(path) as file:
            parquet = pq.ParquetFile(file)
            file.seek(-8 - parquet.metadata.serialized_size, os.SEEK_END)  # thrift, its length, and PAR1
            digest = sha256(file.read()).hexdigest()
            return MetadataFile(path, parquet.metadata.num_rows, parquet.schema_arrow, digest)
    except FileNotFoundError as error:
        because = f" ({error.__cause__})" if error.__cause__ else ""  # what a server answered
        raise FileNotFoundError(f"there is no metadata file {path}{because}") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole parquet file ({error}): download it again, or leave it out") from error
    except Exception as error:  # every kind of store has its own
        raise OSError(f"{path} cannot be read: {error}") from error
