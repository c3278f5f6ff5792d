"""Selection on one machine with DuckDB: larger than memory, within limits of memory and threads."""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from align_train.corpus.select.metadata import MetadataFile
from align_train.corpus.select.plan import Plan
from align_train.corpus.select.rules import Compiled, quoted
from align_train.files import atomic_path

# Stands before an address, so that DuckDB leaves it to `Addresses`.
PROTOCOL = "fsspec"

ROW_GROUP = 61_440  # rows; half of DuckDB's own, and parquet's second version, write in 60 % of the time (docs/log.md)

# Functions that rules use and that every engine has to offer.
FUNCTIONS = (
    """CREATE MACRO phash_distance(a, b) AS
        bit_count(xor(try_cast('0x' || a AS UBIGINT), try_cast('0x' || b AS UBIGINT)))""",
    # Two letters have a lower case that depends on the library: dotted capital I, and sigma at a word's end.
    r"""CREATE MACRO words_of(text) AS
        regexp_extract_all(lower(replace(replace(text, 'İ', 'i'), 'Σ', 'σ')), '[\p{L}\p{N}_]+')""",  # noqa: RUF001
    # Words, and pairs of neighbouring words.
    """CREATE MACRO grams_of(words) AS
        list_concat(words, list_transform(range(1, len(words)), lambda i: words[i] || ' ' || words[i + 1]))""",
)


@dataclass(frozen=True)
class Resources:
    """What DuckDB may take of the machine.

    Attributes:
        memory: of all its threads together, such as `4GiB`; beyond it intermediate tables go to `spill`.
        threads: that work at the same time.
        spill: folder for what does not fit into memory; as large as the texts of the corpus at worst. Each run makes a
            folder of its own there and removes it at the end; one that is killed leaves it behind.
    """

    memory: str = "4GiB"
    threads: int = 2
    spill: str = "/tmp/align_train_spill"


class DuckDB:
    """Carries out a plan over metadata files.

    Args:
        plan: the rules.
        resources: memory, threads, spill folder.
        rows: of each file, read at most so many; 0 for all. For a dry run.
        progress: show the progress of long queries.
    """

    name = "duckdb"

    def __init__(self, plan: Plan, resources: Resources, rows: int = 0, progress: bool = True) -> None:
        self.plan, self.resources, self.rows, self.progress = plan, resources, rows, progress

    @contextmanager
    def opened(self, files: Sequence[MetadataFile]) -> Iterator["DuckDB"]:
        """Connect, and make the tables that the rules need from all files together."""
        with self._own_spill() as spill:
            self._connect(spill)
            try:
                self._prepare(files)
                yield self
            finally:
                self._connection.close()

    def counts(self, file: MetadataFile) -> list[int]:
        """Judge the rows of a file; returns the row of `Plan.counts`."""
        query = self.plan.judged(f"(SELECT * FROM {self._rows_of(file)})", "file_row_number AS _row")
        self._run(f"CREATE OR REPLACE TEMP TABLE judged AS {query}", "", [file])
        return [int(count) for count in self._connection.execute(self.plan.counts("judged")).fetchall()[0]]

    def take(self, judged: pa.Table) -> None:
        """Let `write` go by what another engine judged: the number `_row` of every row, the columns of `Plan.kept`."""
        self._connection.register("taken", judged)
        self._connection.execute("CREATE OR REPLACE TEMP TABLE judged AS SELECT * FROM taken")
        self._connection.unregister("taken")

    def write(self, file: MetadataFile, output: Path) -> None:
        """Write the rows of the file last judged that all rules keep, in their order, with all their columns."""
        kept = self.plan.kept
        # Looked up bit by bit: a join would mix the order of rows as soon as there are two threads.
        bits = f"SELECT bitstring_agg(_row::INTEGER, 0, {max(file.rows - 1, 0)}) FROM judged WHERE {kept}"
        self._connection.execute(f"SET VARIABLE kept = ({bits})::BIT")
        # Else columns without a null are declared so, each file in its own way, and the files do not go together.
        self._connection.execute("SET disabled_optimizers = 'statistics_propagation'")
        with atomic_path(output) as temporary:
            self._run(
                f"COPY (SELECT * EXCLUDE (file_row_number) FROM {self._rows_of(file)} "
                f"WHERE get_bit(getvariable('kept'), file_row_number::INTEGER) = 1) "
                f"TO {_text(str(temporary))} (FORMAT parquet, PARQUET_VERSION v2, ROW_GROUP_SIZE {ROW_GROUP})",
                "",
                [file],
            )
            written = self._connection.fetchall()[0][0]
            self._connection.execute("RESET disabled_optimizers")
            wanted = self._connection.execute(f"SELECT count(*) FROM judged WHERE {kept}").fetchall()[0][0]
            if written != wanted:
                raise OSError(f"{file.path} changed while it was read ({written} rows, not {wanted}): start again")

    @contextmanager
    def _own_spill(self) -> Iterator[str]:
        """A new folder, since two DuckDBs in one folder overwrite each other (duckdb/duckdb issue 15173)."""
        try:
            Path(self.resources.spill).mkdir(parents=True, exist_ok=True)
            folder = TemporaryDirectory(prefix="duckdb-", dir=self.resources.spill)
        except OSError as error:
            raise ValueError(
                f"nothing can be written to resources.spill={self.resources.spill} ({error}): name a folder on a disk "
                "with room"
            ) from error
        with folder as spill:
            yield spill

    def _connect(self, spill: str) -> None:
        import duckdb

        memory, threads = self.resources.memory, self.resources.threads
        try:
            self._connection = duckdb.connect(
                config={"memory_limit": memory, "threads": threads, "temp_directory": spill}
            )
            self._connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
        except duckdb.Error as error:
            raise ValueError(
                f"DuckDB does not take resources.memory={memory} with resources.threads={threads} ({_reason(error)}): "
                "give for instance memory=4GiB threads=2"
            ) from error

    def _prepare(self, files: Sequence[MetadataFile]) -> None:
        if any("://" in file.path for file in files):
            from align_train.corpus.select.addresses import Addresses

            self._connection.register_filesystem(Addresses())
        for function in FUNCTIONS:
            self._connection.execute(function)
        for name, table in self.plan.given.items():
            self._connection.register(name, table)
        used = _listed(self.plan.columns) or "*"
        union = " UNION ALL ".join(f"SELECT {used} FROM {self._rows_of(file)}" for file in files)
        self._run(f"CREATE VIEW corpus AS {union}", "", files)
        check_rules(self._connection, self.plan)
        for table, (rule, query) in self.plan.tables.items():
            self._run(f"CREATE TEMP TABLE {table} AS {query}", f"rule {rule}", files)
        for name, made in self.plan.compiled.items():
            check_ids(name, made, lambda query: self._connection.execute(query).fetchall())

    def _rows_of(self, file: MetadataFile) -> str:
        """The rows of a file with their numbers; folders named `key=value` add no column."""
        where = f"{PROTOCOL}://{file.path}" if "://" in file.path else glob.escape(file.path)
        read = f"read_parquet({_text(where)}, file_row_number = true, hive_partitioning = false)"
        return f"(SELECT * FROM {read} LIMIT {self.rows})" if self.rows else read

    def _run(self, query: str, says: str, files: Sequence[MetadataFile]) -> None:
        """Execute with a progress bar; an error that a file or a rule causes names it."""
        import duckdb

        try:
            self._with_progress(lambda: self._connection.execute(query), says)
        except duckdb.OutOfMemoryException as error:
            raise ValueError(
                f"{_reason(error)}: give more memory than resources.memory={self.resources.memory}, fewer threads than "
                f"{self.resources.threads}, or a larger disk than that of resources.spill={self.resources.spill}"
            ) from error
        except (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException) as error:
            raise ValueError(f"{says or files[0].path}: {_reason(error)}") from error
        except duckdb.Error as error:
            self._blame(files)
            raise OSError(
                f"{says or files[0].path}: {_reason(error)} (results go to the output folder, what exceeds memory to "
                f"{self.resources.spill}: is there room?)"
            ) from error

    def _with_progress(self, work: Callable[[], Any], says: str) -> None:
        if not (self.progress and says):
            work()
            return
        layout = "{l_bar}{bar}| {elapsed}<{remaining}"
        with (
            ThreadPoolExecutor(1) as pool,
            tqdm(total=100, desc=says, bar_format=layout, delay=3, mininterval=1) as bar,
        ):
            running = pool.submit(work)
            try:
                while not running.done():
                    bar.update(max(0.0, self._connection.query_progress() - bar.n))
                    wait([running], 0.2)
            except BaseException:
                self._connection.interrupt()
                raise
            running.result()

    def _blame(self, files: Sequence[MetadataFile]) -> None:
        """Read every file alone, then let every rule judge alone; ValueError naming the first that fails."""
        import duckdb

        for file in files:
            used = self.plan.columns if len(files) > 1 else file.schema.names
            try:  # hashes, since counts may come from the footer
                self._connection.execute(f"SELECT bit_xor(hash({_listed(used)})) FROM {self._rows_of(file)}").fetchall()
            except duckdb.Error as error:
                raise ValueError(
                    f"{file.path} is broken ({_reason(error)}): download it again, or leave it out"
                ) from error
        for name, made in _of_one_row(self.plan):
            for file in files:
                try:
                    self._connection.execute(f"SELECT count({made.keep}) FROM {self._rows_of(file)}").fetchall()
                except duckdb.Error as error:
                    raise ValueError(
                        f"rules.{name}, {self.plan.rules[name].described()!r}, fails on {file.path}: {_reason(error)}"
                    ) from error


def check_rules(connection: Any, plan: Plan, limit: str = "LIMIT 0") -> None:
    """Let each rule of one row judge the view `corpus` alone; ValueError naming the first that does not work."""
    import duckdb

    for name, made in _of_one_row(plan):
        says = f"rules.{name}, {plan.rules[name].described()!r},"
        try:  # in WHERE, where what belongs to several rows is refused
            found = connection.execute(f"SELECT {made.keep} FROM corpus WHERE {made.keep} {limit}")
            kind = str(found.description[0][1])
            found.fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{says} does not work on this metadata: {_reason(error)}") from error
        if kind != "BOOLEAN":
            raise ValueError(f"{says} gives {kind}, not true or false: make it a condition such as word_count > 3")


def _of_one_row(plan: Plan) -> list[tuple[str, Compiled]]:
    return [(name, made) for name, made in plan.compiled.items() if not made.tables]


def check_ids(rule: str, made: Compiled, ask: Callable[[str], Sequence[Any]]) -> None:
    """ValueError where rows that a rule takes for the same have one id; `ask` gives the rows of a query's answer."""
    table = made.unique_ids
    if not table or not ask(f"SELECT 1 FROM {table} WHERE _repeated LIMIT 1"):
        return
    repeated = ask(
        f"SELECT id, count(*) FROM corpus {made.join} WHERE {table}._repeated "
        f"GROUP BY id, {table}._kept HAVING id IS NULL OR count(*) > 1 LIMIT 1"
    )
    raise ValueError(
        f"rules.{rule}: {repeated[0][1]} rows that are the same by this rule have the id {repeated[0][0]}, so that "
        "the first of them cannot be told: ids must be unique; is one file listed under two names?"
    )


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(quoted(column) for column in columns)


def _reason(error: Exception) -> str:
    """What DuckDB says, without the query and its advice; of a Python traceback the last line."""
    said = str(error).strip()
    return said.splitlines()[-1] if said.startswith("Traceback") else " ".join(said.split("\n\n")[0].split())
