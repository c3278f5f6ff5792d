"""Whether what exams need is there, before anything is embedded or trained."""

from collections.abc import Mapping

from align_train.distributed import on_all_ranks
from align_train.evaluation.exam import Exam, naming


def check_exams(exams: Mapping[str, Exam]) -> None:
    """Open the data of every exam; every rank must call it.

    Raises:
        ValueError: it is not what the exam needs; names the exam.
        OSError: it cannot be read; likewise.
    """
    for name, exam in exams.items():
        with naming(name):
            on_all_ranks(exam.check)
