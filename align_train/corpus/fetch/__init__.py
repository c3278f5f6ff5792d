"""Links to shards: downloads, verification, resizing, and tasks that survive being killed."""

from align_train.corpus.fetch.fetcher import Fetched, Fetcher
from align_train.corpus.fetch.job import FetchSettings, Job
from align_train.corpus.fetch.running import run_job
from align_train.corpus.fetch.tasks import Columns
from align_train.corpus.fetch.terms import Limits, Permissions

__all__ = ["Columns", "FetchSettings", "Fetched", "Fetcher", "Job", "Limits", "Permissions", "run_job"]
