"""Selection on a Spark cluster: the same rules keep the same rows, with the same counts, as with DuckDB."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa
from pyarrow import types

from align_train.corpus.select.duckdb_engine import DuckDB, Resources, check_ids
from align_train.corpus.select.metadata import MetadataFile
from align_train.corpus.select.plan import Plan
from align_train.corpus.select.spark_sql import Kind, letters, translated, unproven
from align_train.corpus.spark import reason, spark_errors, spark_session

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

log = logging.getLogger(__name__)
T = TypeVar("T")

SETTINGS = {
    "spark.sql.ansi.enabled": "true",  # a number that overflows is an error, as it is to DuckDB
    "spark.sql.caseSensitive": "false",
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    # The most frequent words may be too many for a heap; above this number they are sorted with the help of disks.
    "spark.sql.execution.topKSortFallbackThreshold": "1000000",
}

# By this, backslashes would not be what sqlglot writes. Spark warns of setting it to false.
LEGACY = "spark.sql.parser.escapedStringLiterals"

# Parquet's unsigned integers as Spark reads them.
UNSIGNED = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
}


class Spark:
    """Carries out a plan on the cluster that Spark's own settings name; see `align_train.corpus.spark`.

    Executors read the metadata through Hadoop's file systems (a folder that all of them see, s3a://, gs://, hdfs://),
    this process reads it too. The verdicts on one file at a time come here, nine bytes a row; then DuckDB copies the
    rows that are kept, so that both engines write the same file.

    Args:
        plan: the rules.
        resources: memory, threads and spill folder of DuckDB while it copies.
    """

    name = "spark"

    def __init__(self, plan: Plan, resources: Resources) -> None:
        self.plan, self.resources = plan, resources

    @contextmanager
    def opened(self, files: Sequence[MetadataFile]) -> Iterator["Spark"]:
        """Take or start a session, and make the tables that the rules need from all files together."""
        self._session = spark_session().newSession()  # the same cluster; settings and tables are ours
        self._cached: list[DataFrame] = []
        self._judged = self._session.range(0)
        try:
            self._prepare(files)
            yield self
        finally:
            for frame in (*self._cached, self._judged):
                frame.unpersist()

    def counts(self, file: MetadataFile) -> list[int]:
        """Judge the rows of a file; returns the row of `Plan.counts`."""
        self._judged.unpersist()
        self._view("file_rows", self._rows_of([file]).selectExpr("*", "_metadata.row_index AS _row"))
        says = f"Spark fails on {file.path}, which all its executors must see"
        self._judged = self._query(self.plan.judged("file_rows", "_row"), says).persist()
        self._view("judged", self._judged)
        counts = self._run(self._query(self.plan.counts("judged"), says).collect, says)[0]
        if counts[0] != file.rows:
            raise ValueError(
                f"Spark finds {counts[0]} rows in {file.path}, which has {file.rows}; it leaves out files whose names "
                "begin with _ or a dot: rename the file"
            )
        return [int(count) for count in counts]

    def write(self, file: MetadataFile, output: Path) -> None:
        """Write the rows of the file last judged that all rules keep, in their order, with all their columns."""
        verdicts = self._judged.selectExpr("_row", f"{self.plan.kept} AS k0")
        taken = self._run(verdicts.toArrow, f"Spark fails on {file.path}")
        with DuckDB(Plan.of({"kept": "true"}), self.resources, progress=False).opened([file]) as copier:
            copier.take(taken)
            copier.write(file, output)

    def _prepare(self, files: Sequence[MetadataFile]) -> None:
        for setting, value in SETTINGS.items():
            self._session.conf.set(setting, value)
        if self._session.conf.get(LEGACY) == "true":
            self._session.conf.unset(LEGACY)
        self._schema = self._common_schema(files)
        self._kinds = {field.name: _kind(field.type) for field in self._schema}
        uses_words = any("words_of(" in query for _, query in self.plan.tables.values())
        self._letters = {"letter": letters(self._session)} if uses_words else {}
        self._view("corpus", self._rows_of(files))
        self._check_rules()
        for name, table in self.plan.given.items():
            self._view(name, self._session.createDataFrame(table))
        for table, (rule, query) in self.plan.tables.items():
            self._make(table, query, f"rules.{rule} does not work on Spark")
        for name, made in self.plan.compiled.items():
            check_ids(name, made, lambda query: self._query(query, "ids").collect())

    def _make(self, table: str, query: str, says: str) -> None:
        """A view; the tables that are joined to every file are computed and kept, in memory or on disks."""
        frame = self._query(query, says)
        if any(table in made.join.split() for made in self.plan.compiled.values()):
            self._cached.append(frame.persist())
            log.info("%s has %d rows", table, self._run(frame.count, says))
        self._view(table, frame)

    def _check_rules(self) -> None:
        """Let Spark look at each rule alone, so that what is wrong is told with the rule's name."""
        for name, made in self.plan.compiled.items():
            if made.tables:
                continue
            says = f"rules.{name}, {self.plan.rules[name].described()!r},"
            self._query(f"SELECT 1 FROM corpus WHERE {made.keep}", f"{says} does not work on Spark")
            if parts := unproven(made.keep):
                log.warning(
                    "%s uses %s, which Spark may take for something else than DuckDB does: compare the two engines on "
                    "one file",
                    *(says, ", ".join(sorted(parts))),
                )

    def _common_schema(self, files: Sequence[MetadataFile]) -> pa.Schema:
        """The columns that rules read."""
        schema = pa.schema([files[0].schema.field(name) for name in self.plan.columns])
        for file in files:
            for field in schema:
                if (other := file.schema.field(field.name).type) != field.type:
                    raise ValueError(
                        f"column {field.name} is {field.type} in {files[0].path} and {other} in {file.path}: for "
                        "engine=spark it must be the same in all files; engine=duckdb reads them as they are"
                    )
        return schema

    def _rows_of(self, files: Sequence[MetadataFile]) -> "DataFrame":
        """The columns that rules read."""
        from pyspark.sql.pandas.types import from_arrow_schema

        paths = [_location(file.path) for file in files]
        says = (
            f"Spark cannot read {files[0].path}: a folder that all executors see, s3a://, gs:// and hdfs:// work, each "
            "with Hadoop's file system for it; engine=duckdb reads any address"
        )
        schema = pa.schema([(field.name, UNSIGNED.get(field.type, field.type)) for field in self._schema])
        return self._run(lambda: self._session.read.schema(from_arrow_schema(schema)).parquet(*paths), says)

    def _view(self, name: str, frame: "DataFrame") -> None:
        frame.createOrReplaceTempView(f"`{name}`")

    def _query(self, query: str, says: str) -> "DataFrame":
        try:
            spark = translated(query, self._kinds, **self._letters)
        except ValueError as error:
            raise ValueError(f"{says}: {error}; write it otherwise, or use engine=duckdb") from error
        return self._run(lambda: self._session.sql(spark), says)

    def _run(self, work: Callable[[], T], says: str) -> T:
        try:
            return work()
        except spark_errors() as error:
            raise ValueError(f"{says} ({reason(error)})") from error


def _location(path: str) -> str:
    """The name by which Hadoop knows a file, where no character stands for others."""
    return re.sub(r"([{}\[\]*?\\])", r"\\\1", path if "://" in path else f"file://{os.path.abspath(path)}")


def _kind(column: pa.DataType) -> Kind:
    if types.is_float32(column):
        return "float"
    if types.is_float64(column):
        return "double"
    return "exact" if types.is_integer(column) or types.is_decimal(column) else "unknown"
