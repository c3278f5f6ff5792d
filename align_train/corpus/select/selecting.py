"""Selection from beginning to end: metadata and rules in, selected parquet and the funnel report out."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from align_train.corpus.select.duckdb_engine import DuckDB, Resources
from align_train.corpus.select.funnel import Funnel, Step, add_up
from align_train.corpus.select.metadata import MetadataFile, find_metadata
from align_train.corpus.select.plan import Plan
from align_train.files import atomic_write

log = logging.getLogger(__name__)

DRY_RUN_FILES, DRY_RUN_ROWS = 4, 250_000


class Engine(Protocol):
    """What carries out a plan: DuckDB here, Spark on a cluster."""

    name: str

    def opened(self, files: Sequence[MetadataFile]) -> AbstractContextManager["Engine"]:
        """Make the tables that the rules need from all files together."""

    def counts(self, file: MetadataFile) -> list[int]:
        """Judge the rows of a file; the row of `Plan.counts`."""

    def write(self, file: MetadataFile, output: Path) -> None:
        """Write the kept rows of the file last judged, in their order."""


def select(
    metadata: str | Sequence[str],
    folder: str | Path,
    rules: Mapping[str, Any],
    resources: Resources | None = None,
    engine: str = "duckdb",
    dry_run: bool = False,
    overwrite: bool = False,
) -> Funnel:
    """Writes FOLDER/selected/NNNNN.parquet, one for each file of metadata, and FOLDER/funnel.json, .md and .png.

    A selection that was stopped goes on with the files that are missing; one that is complete is left alone.

    Args:
        metadata: parquet files, folders, globs or addresses; see `find_metadata`.
        folder: where the results go.
        rules: by name: SQL, or a rule.
        resources: memory, threads and spill folder of DuckDB.
        engine: `duckdb`, or `spark` (needs `pip install 'align-train[spark]'`).
        dry_run: judge up to 250,000 rows of each of four files, write FOLDER/dry_run.json, .md and .png, select nothing
        overwrite: replace the selection of other metadata or other rules.

    Raises:
        FileNotFoundError: there is no such metadata.
        ValueError: a file or a rule is wrong, or FOLDER holds another selection.
    """
    folder, files, plan = Path(folder), find_metadata(metadata), Plan.of(rules)
    resources = resources or Resources()
    for file in files:
        plan.check_columns(file.path, file.schema.names)
    if dry_run:
        return _dry_run(files, plan, resources, folder)
    identity, worker = _identity(files, plan), _engine(engine, plan, resources)
    marker, selected = folder / "funnel.json", folder / "selected"
    _check_identity(marker, selected / "identity.json", identity, overwrite)
    if marker.is_file() and all(_counts_of(selected, number) for number in range(len(files))):
        log.info("the selection in %s is complete, nothing to do", folder)
        return read_funnel(marker)
    selected.mkdir(parents=True, exist_ok=True)
    with atomic_write(selected / "identity.json") as target:
        target.write(json.dumps(identity).encode())
    clock = time.monotonic()
    counts = _select_files(files, worker, selected)
    funnel = _funnel(plan, counts)
    sources = {f"{number:05d}.parquet": file.path for number, file in enumerate(files)}
    facts = {"identity": identity, "engine": engine, "seconds": round(time.monotonic() - clock, 3), "files": sources}
    funnel.write(folder / "funnel", facts)
    return funnel


def read_funnel(path: Path) -> Funnel:
    """The funnel that `Funnel.write` wrote."""
    read = json.loads(path.read_text())
    return Funnel(read["rows"], read["kept"], tuple(Step(**step) for step in read["steps"]), read["sample"])


def _engine(name: str, plan: Plan, resources: Resources) -> Engine:
    if name == "duckdb":
        return DuckDB(plan, resources)
    if name == "spark":
        from align_train.corpus.select.spark_engine import Spark

        return Spark(plan, resources)
    raise ValueError(f"engine is {name!r}; there are duckdb and spark")


def _select_files(files: Sequence[MetadataFile], engine: Engine, selected: Path) -> list[list[int]]:
    """Counts of each file, once its kept rows are written."""
    done = {number: counts for number in range(len(files)) if (counts := _counts_of(selected, number))}
    if len(done) == len(files):
        return [done[number] for number in range(len(files))]
    with (
        engine.opened(files) as opened,
        tqdm(total=sum(file.rows for file in files), desc="select", unit="row", unit_scale=True, delay=3) as bar,
    ):
        for number, file in enumerate(files):
            if number not in done:
                done[number] = opened.counts(file)
                opened.write(file, selected / f"{number:05d}.parquet")
                with atomic_write(selected / f"{number:05d}.json") as target:  # last: the file is done
                    target.write(json.dumps(done[number]).encode())
            bar.update(file.rows)
    return [done[number] for number in range(len(files))]


def _counts_of(selected: Path, number: int) -> list[int] | None:
    path = selected / f"{number:05d}.json"
    return json.loads(path.read_text()) if path.is_file() and path.with_suffix(".parquet").is_file() else None


def _funnel(plan: Plan, counts: Sequence[Sequence[int]], sample: str = "") -> Funnel:
    rows, *rest = add_up(counts)
    steps = tuple(
        Step(name, rule.described(), rule.nulls, *rest[3 * i : 3 * i + 3])
        for i, (name, rule) in enumerate(plan.rules.items())
    )
    return Funnel(rows, rows - sum(step.in_order for step in steps), steps, sample)


def _dry_run(files: Sequence[MetadataFile], plan: Plan, resources: Resources, folder: Path) -> Funnel:
    count = min(DRY_RUN_FILES, len(files))
    chosen = [files[i * len(files) // count] for i in range(count)]
    with DuckDB(plan, resources, DRY_RUN_ROWS).opened(chosen) as engine:
        counts = [engine.counts(file) for file in chosen]
    funnel = _funnel(plan, counts, f"the first rows, up to {DRY_RUN_ROWS:,}, of {count} of {len(files)} files")
    funnel.write(folder / "dry_run", {"files": [file.path for file in chosen]})
    return funnel


def _identity(files: Sequence[MetadataFile], plan: Plan) -> dict[str, str]:
    """What fixes a selection: the files, wherever they lie, and the rules with what they are given."""
    listed = json.dumps([file.digest for file in files])
    rules = json.dumps([[name, made.keep, made.join, dict(made.tables)] for name, made in plan.compiled.items()])
    nulls = json.dumps([rule.nulls for rule in plan.rules.values()])
    given = json.dumps([table.to_pylist() for table in plan.given.values()])
    return {
        "metadata": sha256(listed.encode()).hexdigest(),
        "rules": sha256((rules + nulls + given).encode()).hexdigest(),
    }


def _check_identity(marker: Path, begun: Path, identity: dict[str, str], overwrite: bool) -> None:
    """Clear FOLDER of another selection if that is allowed; ValueError if not."""
    present = [*begun.parent.glob("[0-9]*.json"), *begun.parent.glob("[0-9]*.parquet")]
    if present and not begun.is_file():
        raise ValueError(
            f"{begun.parent} holds {present[0].name}, which is not of a selection: take it away, or name another folder"
        )
    found = (
        json.loads(begun.read_text()) if present else identity
    )  # one that wrote nothing, say for a wrong rule, is none
    if found == identity:
        return
    if not overwrite:
        differs = " and ".join(key for key in identity if found.get(key) != identity[key])
        raise ValueError(
            f"{begun.parent} already holds a selection of other {differs}: set overwrite=true to replace it, or name "
            "another folder"
        )
    marker.unlink(missing_ok=True)
    for path in [*present, begun]:  # what tells whose they are goes last
        path.unlink(missing_ok=True)
