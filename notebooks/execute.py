"""Runs notebooks from the first cell to the last, each in an empty folder, for `make notebooks`; keeps no outputs.

python notebooks/execute.py [NOTEBOOK ...]
"""

import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
SECONDS = 900  # a cell may take; the longest takes about a minute on two cores with nothing else to do
AT_ONCE = 2  # notebooks, each on its share of the cores


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with what its cells gave; CellExecutionError, with the traceback, where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, km=kernel, timeout=SECONDS, resources=resources).execute(cleanup_kc=True)
    return notebook


def warnings_in(notebook: nbformat.NotebookNode) -> list[str]:
    """Lines of the outputs that warn, or that list weights which were not found: a reader should see none."""
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    return [line for text in texts for line in text.splitlines() if re.search("warning|load report", line, re.I)]


def judged(path: Path) -> str:
    """What is wrong with a notebook; it is told, with the time that it took."""
    start = time.monotonic()
    try:
        wrong = "\n".join(warnings_in(executed(path)))
    except CellExecutionError as error:
        wrong = str(error)
    verdict = f"failed\n{wrong}" if wrong else "passed"
    print(f"{path.name}: {time.monotonic() - start:.0f} s, {verdict}", flush=True)
    return wrong


def main(paths: list[Path]) -> int:
    """The number of notebooks that fail or warn; AT_ONCE of them run at a time."""
    print(f"running {', '.join(path.name for path in paths)} ...", flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(map(bool, pool.map(judged, paths)))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # they start from what the package ships
    # tqdm's bars in a notebook need ipywidgets, which Jupyter brings and nobody looks at here.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // AT_ONCE))
    sys.exit(main([Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))))
