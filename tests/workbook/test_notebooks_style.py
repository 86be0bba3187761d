"""The notebooks as files: order of cells, size, no outputs, and nothing in them that belongs into setlib."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = ("01_data", "02_frequency", "03_training", "04_cross_domain", "05_ablations")
MAX_LINES = 15
BANNED_NODES = {"FunctionDef": "def", "ClassDef": "class", "For": "loop", "While": "loop", "Try": "try"}
BANNED_MODULES = {"os", "sys", "pathlib", "glob", "shutil", "subprocess"}


def find_code_problems(source: str) -> list[str]:
    """What a code cell holds that belongs into setlib."""
    lines = source.strip().splitlines()
    problems = [] if len(lines) <= MAX_LINES else [f"{len(lines)} lines, at most {MAX_LINES}"]
    if not lines:
        return ["empty"]
    if any(line.lstrip().startswith(("!", "%")) for line in lines):
        return [*problems, "shell or magic line"]
    for node in ast.walk(ast.parse(source)):
        name = type(node).__name__
        if name in BANNED_NODES:
            problems.append(BANNED_NODES[name])
        elif isinstance(node, (ast.If, ast.IfExp)) and "profile" in ast.unparse(node.test).lower():
            problems.append("branch on the profile")
        elif isinstance(node, ast.Import):
            problems += [f"imports {a.name}" for a in node.names if a.name.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES:
            problems.append(f"imports {node.module}")
    return problems


def find_parameter_problems(cell: NotebookNode) -> list[str]:
    """What is wrong with the first code cell: it is tagged, and holds annotated assignments of plain values."""
    problems = [] if "parameters" in cell.metadata.get("tags", []) else ["first code cell is not tagged parameters"]
    body = ast.parse(cell.source).body
    if not body or not all(isinstance(node, ast.AnnAssign) and node.value is not None for node in body):
        return [*problems, "parameters are not annotated assignments alone"]
    for node in body:
        try:
            ast.literal_eval(node.value)
        except ValueError:
            problems.append(f"parameter {ast.unparse(node.target)} is not a plain value")
    return problems


def find_problems(notebook: NotebookNode) -> list[str]:
    """Every departure of one notebook from the style, in words."""
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    problems = []
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        problems.append("first cell is not a markdown title")
    if not code:
        return [*problems, "no code cell"]
    problems += find_parameter_problems(code[0])
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("kernel is not python3")
    for number, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        where = f"cell {number}: "
        if cell.outputs or cell.execution_count is not None:
            problems.append(where + "stored output")
        if number == 0 or cells[number - 1].cell_type != "markdown":
            problems.append(where + "no markdown cell before it")
        allowed = cell.metadata.get("tags", [])  # "loop": the training loop, written out once
        problems += [where + problem for problem in find_code_problems(cell.source) if problem not in allowed]
    if not any(".finish(" in cell.source for cell in code):
        problems.append("writes no results")
    if cells[-1].cell_type == "code" and ".finish(" not in cells[-1].source:
        problems.append("last cell is neither markdown nor writes results")
    return problems


@pytest.mark.parametrize("name", NAMES)
def test_notebook_keeps_the_style(name: str):
    path = NOTEBOOKS / f"{name}.ipynb"
    assert path.exists(), f"notebooks/{path.name} is missing"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not find_problems(notebook)


def test_no_other_notebooks():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} <= set(NAMES)


def make_notebook() -> NotebookNode:
    """A small notebook that keeps the style."""
    cells = [
        new_markdown_cell("# Does it work?"),
        new_code_cell('PROFILE: str = "quick"\nSEED: int = 0', metadata={"tags": ["parameters"]}),
        new_markdown_cell("We ask; look for the answer."),
        new_code_cell("from setlib import experiment\n\nrun = experiment.PROFILES"),
        new_markdown_cell("What we keep."),
        new_code_cell('run.finish("01_data", {x: 1 for x in "ab"})'),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


@pytest.mark.parametrize(
    "cell, key, value, problem",
    [
        (3, "source", "def f():\n    return 1", "cell 3: def"),
        (3, "source", "class A:\n    x = 1", "cell 3: class"),
        (3, "source", "for x in y:\n    x", "cell 3: loop"),
        (3, "source", "while x:\n    x", "cell 3: loop"),
        (3, "source", "try:\n    x\nfinally:\n    y", "cell 3: try"),
        (3, "source", "!pip install x", "cell 3: shell or magic line"),
        (3, "source", "%cd ..", "cell 3: shell or magic line"),
        (3, "source", "import os.path", "cell 3: imports os.path"),
        (3, "source", "from pathlib import Path", "cell 3: imports pathlib"),
        (3, "source", 'x = 1 if PROFILE == "smoke" else 2', "cell 3: branch on the profile"),
        (3, "source", "\n".join("x" * 16), "cell 3: 16 lines, at most 15"),
        (3, "source", " ", "cell 3: empty"),
        (3, "execution_count", 1, "cell 3: stored output"),
        (2, "cell_type", "raw", "cell 3: no markdown cell before it"),
        (0, "source", "Does it work?", "first cell is not a markdown title"),
        (1, "metadata", {}, "first code cell is not tagged parameters"),
        (1, "source", "SEED = 0", "parameters are not annotated assignments alone"),
        (1, "source", "SEED: int = len(x)", "parameter SEED is not a plain value"),
        (5, "source", "run", "last cell is neither markdown nor writes results"),
    ],
)
def test_what_is_wrong_with_a_notebook_is_named(cell: int, key: str, value: object, problem: str):
    notebook = make_notebook()
    assert find_problems(notebook) == []
    notebook.cells[cell][key] = value
    assert problem in find_problems(notebook)
