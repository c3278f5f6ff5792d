"""Sources to folders of shards that training reads: COYO, the shipped sample, or any pairs of one's own."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from align_train.corpus.fetch import FetchSettings, Job, run_job
from align_train.corpus.fetch.spark_job import run_job_on_spark
from align_train.corpus.fetch.summary import summarise
from align_train.corpus.images import ImageSettings
from align_train.corpus.phash import phash_list
from align_train.corpus.sample_corpus import unit_hash
from align_train.corpus.select import Resources, select
from align_train.corpus.shards import ShardReport, ShardWriter
from align_train.records import Pair
from align_train.shipped import SAMPLE_PARTS, sample_metadata_file

log = logging.getLogger(__name__)

STEPS = ("select", "fetch", "summary")
RUNNERS = {"duckdb": run_job, "spark": run_job_on_spark}  # by engine


class Report(Protocol):
    """What a step did."""

    def described(self) -> str:
        """One line."""


def prepare_coyo(
    folder: str | Path,
    metadata: str | Sequence[str],
    rules: Mapping[str, Any],
    steps: Sequence[str] = STEPS,
    engine: str = "duckdb",
    resources: Resources | None = None,
    fetch: FetchSettings | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> dict[str, Report]:
    """COYO's metadata, or any in its schema, to FOLDER/selected, FOLDER/funnel.* and FOLDER/shards/NNNNN.tar.

    Stopped at any moment and started again, it goes on where it was.

    Args:
        folder: where everything goes.
        metadata: parquet files, folders, globs or addresses; read by the step `select` alone.
        rules: by name; see `align_train.corpus.select`.
        steps: of select, fetch and summary, those to do.
        engine: `duckdb` on this machine, or `spark`.
        resources: memory, threads and spill folder of DuckDB.
        fetch: how images are fetched.
        dry_run: report what the rules would do on a sample of the files, and stop there.
        overwrite: replace what was made from other metadata, by other rules, or with other settings.

    Returns:
        A report for each step done.
    """
    folder, reports, fetch = Path(folder), dict[str, Report](), fetch or FetchSettings()
    if unknown := set(steps) - set(STEPS):
        raise ValueError(f"source.steps has {sorted(unknown)[0]!r}; there are {', '.join(STEPS)}")
    if engine not in RUNNERS:
        raise ValueError(f"engine is {engine!r}; there are {', '.join(RUNNERS)}")
    if dry_run or "select" in steps:
        reports["dry run" if dry_run else "select"] = select(
            metadata, folder, rules, resources, engine, dry_run, overwrite
        )
    if dry_run:
        return reports
    job = Job(folder / "selected", folder / "shards", fetch)
    if "fetch" in steps:
        RUNNERS[engine](job, overwrite)
    if "summary" in steps:
        reports["fetch"] = summarise(job.shards, job.tasks, fetch.columns.url)
    return reports


def prepare_sample(
    folder: str | Path, rows_per_task: int = 1000, processes: int | None = 1, overwrite: bool = False
) -> dict[str, Report]:
    """The shipped sample, a small COYO, through the same steps: FOLDER/PART/shards/NNNNN.tar for each of its parts.

    Its links point into the package, its images are stored as they are, and no rule is applied: all of them are smaller
    than COYO's smallest.

    Args:
        folder: where the parts go.
        rows_per_task: pairs in each shard but the last of a part.
        processes: that work at the same time; None for twice as many as there are cores.
        overwrite: replace another sample, or one of another size.

    Returns:
        A report for each of `shipped.SAMPLE_PARTS`.
    """
    as_they_are = ImageSettings(mode="original", reencode=False)
    fetch = FetchSettings(images=as_they_are, rows_per_task=rows_per_task, processes=processes)
    return {
        part: prepare_coyo(Path(folder) / part, str(sample_metadata_file(part)), {}, fetch=fetch, overwrite=overwrite)[
            "fetch"
        ]
        for part in SAMPLE_PARTS
    }


def prepare_phash_list(images: str | Path, output: str | Path) -> dict[str, Report]:
    """Perceptual hashes of a folder of images, for the rule FarFrom; see `align_train.corpus.phash.phash_list`."""
    return {"pHash list": phash_list(images, output)}


def prepare_dataset(
    folder: str | Path,
    pairs: Iterable[Pair],
    validation_share: float = 0.0,
    pairs_per_shard: int = 1000,
    overwrite: bool = False,
) -> dict[str, ShardReport]:
    """Writes pairs of one's own, for instance of `dataset_pairs`, as FOLDER/train and FOLDER/validation in one pass.

    Args:
        folder: where the parts go.
        pairs: the source, read once.
        validation_share: fraction of the images, in [0, 1), that goes to validation. The bytes of the image decide,
            so all captions of one image are on the same side, and more data moves no image to the other.
        pairs_per_shard: pairs in each shard but the last of a part.
        overwrite: replace shards that are already there.

    Returns:
        A report for `train`, and for `validation` if it has a share.
    """
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}, it must be at least 0 and below 1")
    names = ["train", "validation"] if validation_share > 0 else ["train"]
    writers = {name: ShardWriter(Path(folder) / name, "", pairs_per_shard, overwrite) for name in names}
    for pair in tqdm(pairs, desc="prepare", unit="pair", delay=3):
        held_out = validation_share > 0 and unit_hash(pair.image) < validation_share
        writers["validation" if held_out else "train"].add(pair)
    return _closed(writers)


def _closed(writers: dict[str, ShardWriter]) -> dict[str, ShardReport]:
    reports = {name: writer.close(may_be_empty=name == "validation") for name, writer in writers.items()}
    for name, report in reports.items():
        log.info("%s: %s", name, report.described())
        if not report.shards:
            log.warning("no pair went to %s: a larger validation_share would send some there", name)
    return reports
