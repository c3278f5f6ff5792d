"""The report's two files."""

from pathlib import Path

from align_train.evaluation.report.content import document
from align_train.evaluation.report.html import html
from align_train.evaluation.report.markdown import markdown
from align_train.evaluation.report.run_folder import read_run
from align_train.files import atomic_write


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write FOLDER/report.md and FOLDER/report.html.

    They say what FOLDER/result.json says, with curves of metrics.csv, contact sheets (contact_sheet_EXAM.png) and the
    settings of resolved.yaml where these files are there. The same files give the same reports.

    Raises:
        ValueError: result.json is missing or not of this program; metrics.csv has no column `step`.
    """
    report = document(read_run(folder))
    paths = folder / "report.md", folder / "report.html"
    for path, text in zip(paths, (markdown(report), html(report)), strict=True):
        with atomic_write(path) as file:
            file.write(text.encode())
    return paths
