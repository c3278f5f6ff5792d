"""All tasks of a selection on a Spark cluster."""

import logging
import socket
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from tqdm import tqdm

from align_train.corpus.fetch.job import Job
from align_train.corpus.fetch.running import progress
from align_train.corpus.spark import reason, spark_errors, spark_session
from align_train.records import Tally

if TYPE_CHECKING:
    from pyspark import Accumulator, SparkContext

log = logging.getLogger(__name__)

GROUP = "align_train.fetch"


def run_job_on_spark(job: Job, overwrite: bool = False) -> None:
    """Run the tasks that are not finished, as `run_job` does, on the executors of a Spark cluster.

    Every core of an executor runs one task at a time, each with connections of its own; `job.settings.processes` plays
    no part. All executors must see the two folders of the job under the same names as this process, and their Python
    must have align_train. The task of an executor that is lost runs again on another one.

    Raises:
        ValueError: the tasks do not exist, the folder holds other shards, or Spark is missing or not set up as needed.
        OSError: a disk is full, a folder is not shared, or Spark gave up.
    """
    job = replace(job, selected=job.selected.absolute(), shards=job.shards.absolute())
    job.begin(overwrite)
    wanted = job.wanted()
    if not wanted:
        log.info("all tasks of %s are finished, nothing to do", job.shards)
        return
    context = spark_session().sparkContext
    if context.getConf().get("spark.speculation", "false") == "true":
        raise ValueError(
            "spark.speculation is true, by which Spark starts a second copy of a slow task and keeps the one that ends "
            "first: here the second finds the task taken and ends at once. Set spark.speculation=false"
        )
    elsewhere = [ended.index for ended in _run(context, job, wanted) if not ended.ran]
    if elsewhere:
        log.warning("%d tasks are being worked on by other processes, such as %05d", len(elsewhere), elsewhere[0])


@dataclass(frozen=True)
class _Ended:
    """What became of a task: not run if another process is at it; rows by reason; what went wrong."""

    index: int
    ran: bool
    reasons: Tally
    error: Exception | None = None


def _run(context: "SparkContext", job: Job, wanted: list[int]) -> list[_Ended]:
    """Run the tasks; the progress bar moves whenever one ends."""
    told: Accumulator[list[_Ended]] = context.accumulator([], _Lists())  # type: ignore[arg-type]  # it need not inherit

    def work() -> None:
        context.setJobGroup(GROUP, f"fetch to {job.shards}", interruptOnCancel=True)
        context.parallelize(wanted, len(wanted)).foreach(partial(_work, job, told))

    rows = None if job.settings.retry_failed else sum(job.rows_of(index) for index in wanted)
    with ThreadPoolExecutor(1) as pool, tqdm(total=rows, unit="row", smoothing=0.05, mininterval=0.5) as bar:
        running, shown, reasons = pool.submit(work), 0, Tally()
        try:
            while wait([running], 0.5).not_done or shown < len(told.value):
                shown = _show(told.value, shown, reasons, bar)
            running.result()
        except spark_errors() as error:
            raise OSError(
                f"Spark gave up ({reason(error)}): the Python of every executor needs align_train, of the same version "
                "as here. The same command goes on where it stopped"
            ) from error
        finally:
            context.cancelJobGroup(GROUP)  # what still runs when one task fails, or when this process is interrupted
    return told.value


def _show(ended: list[_Ended], shown: int, reasons: Tally, bar: tqdm) -> int:
    """Count in the tasks that have ended since; how many have ended. Raises what went wrong in one."""
    new = ended[shown:]
    for one in new:
        if one.error:
            raise one.error
        reasons.update(one.reasons)
    bar.set_description(f"fetch, {shown + len(new)} tasks", refresh=False)
    bar.set_postfix_str(progress(reasons), refresh=False)
    bar.update(sum(reasons.values()) - bar.n)
    return shown + len(new)


class _Lists:
    """How Spark adds up lists; an AccumulatorParam of PySpark."""

    def zero(self, value: list[_Ended]) -> list[_Ended]:
        return []

    def addInPlace(self, value: list[_Ended], more: list[_Ended]) -> list[_Ended]:  # noqa: N802 - PySpark's name
        value += more
        return value


def _work(job: Job, told: "Accumulator[list[_Ended]]", index: int) -> None:
    """On an executor: run a task. What is wrong with data or disk is told, since trying again would not help."""
    reasons = Tally()

    def tell(reason: str) -> None:
        reasons[reason] += 1

    try:
        if not (job.shards / "job.json").is_file():
            raise FileNotFoundError(
                f"{job.shards} is another folder on {socket.gethostname()}, where an executor runs: name one that all "
                "executors share with this machine"
            )
        told.add([_Ended(index, job.run(index, tell), reasons)])
    except (ValueError, OSError) as error:
        told.add([_Ended(index, False, reasons, error)])
