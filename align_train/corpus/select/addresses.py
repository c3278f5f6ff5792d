"""Files behind addresses, as DuckDB reads them: through fsspec, without extensions that it would have to download."""

from datetime import UTC, datetime
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped]

from align_train.corpus.select.duckdb_engine import PROTOCOL


class Addresses(AbstractFileSystem):
    """Opens `fsspec://ADDRESS` for any address that fsspec opens. Globs are not expanded.

    DuckDB asks for the time of the last change, which HTTP and some stores do not tell
    (https://github.com/duckdb/duckdb-python/issues/584), and looks for globs in addresses, where `?` begins a query.
    """

    protocol = PROTOCOL
    cachable = False

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """Without read-ahead: DuckDB knows which bytes it needs, often few of a file's columns."""
        filesystem, inner = self._behind(path)
        return filesystem.open(inner, mode, cache_type="none")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Name and size."""
        filesystem, inner = self._behind(path)
        return {"name": path, "size": filesystem.info(inner)["size"], "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        """The address itself."""
        return [path]

    def modified(self, path: str) -> datetime:
        """Always the same: files are taken not to change while they are read."""
        return datetime(1970, 1, 1, tzinfo=UTC)

    def _behind(self, path: str) -> tuple[Any, str]:
        filesystem, inner = url_to_fs(path.removeprefix(f"{PROTOCOL}://"))
        return filesystem, inner
