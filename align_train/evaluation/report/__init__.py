"""The report of a run: what was measured, how, and beside what others have published."""

from align_train.evaluation.report.comparison import Row, comparison, comparison_text, not_compared_texts
from align_train.evaluation.report.finetuning import finetuning_text
from align_train.evaluation.report.run_folder import read_result
from align_train.evaluation.report.scores import scores_text
from align_train.evaluation.report.writing import write_report

__all__ = [
    "Row",
    "comparison",
    "comparison_text",
    "finetuning_text",
    "not_compared_texts",
    "read_result",
    "scores_text",
    "write_report",
]
