"""The notebooks as they lie in the repository: clean, and of code that compiles. `make notebooks` runs them."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_there_are_notebooks_and_their_readme_lists_each_once() -> None:
    listed = re.findall(r"\((\w+\.ipynb)\)", (ROOT / "notebooks" / "README.md").read_text())
    assert listed == [path.name for path in NOTEBOOKS] != []


@each_notebook
def test_a_notebook_is_valid_and_asks_for_the_kernel_that_every_environment_has(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


@each_notebook
def test_outputs_are_stripped(path: Path) -> None:
    for cell in cells_of(path, "code"):
        assert cell.outputs == []
        assert cell.execution_count is None


@each_notebook
def test_no_path_is_absolute(path: Path) -> None:
    absolute = re.compile(r"""(?:^|[\s"'=(])(?:/|~/)\w""", re.MULTILINE)
    for cell in nbformat.read(path, as_version=4).cells:
        assert not absolute.search(cell.source), cell.source


@each_notebook
def test_links_to_files_of_the_repository_lead_somewhere(path: Path) -> None:
    links = [link for cell in cells_of(path, "markdown") for link in re.findall(r"\]\(([^)#:]+)\)", cell.source)]
    assert links
    assert [link for link in links if not (path.parent / link).is_file()] == []


@each_notebook
def test_every_code_cell_compiles(path: Path) -> None:
    to_python = TransformerManager().transform_cell
    for number, cell in enumerate(cells_of(path, "code")):
        compile(to_python(cell.source), f"{path.name}[{number}]", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
