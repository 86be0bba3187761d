"""The project's own files: set-up lists agree, imports go downwards, sizes stay small, the README's commands exist."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted((ROOT / "setlib").glob("*.py"))
USER_VISIBLE = {"torch", "transformers", "jupyterlab", "matplotlib", "ipywidgets", "datasets", "evaluate", "papermill"}

# What each room may import directly; what those import in turn is allowed too, and everyone may import COMMON.
# A room stands above all it imports, so the table is also the order of the house, top first.
COMMON = {"experiment", "labels", "files"}
IMPORTS = {
    "__main__": {"check", "workbook", "release", "bench", "predict"},
    "bench": {"gpu"},
    "gpu": {"train"},
    "workbook": {"explore", "ablation", "attention", "evaluate", "train", "plots"},
    "explore": {"views", "controls"},
    "controls": set(),
    "views": {"material", "boards", "plots"},
    "material": {"attention", "evaluate", "domains"},
    "boards": {"plots"},
    "attention": {"analysis", "refiners"},
    "analysis": {"plots", "spectral", "model", "domains", "scenes", "transforms"},
    "plots": set(),
    "ablation": {"train", "evaluate"},
    "train": {"evaluate", "model", "domains", "transforms", "processes"},
    "evaluate": {"model", "domains", "processes", "windows"},
    "predict": {"model", "readers"},
    "release": {"model"},
    "model": {"backbone", "refiners", "heads", "transforms", "pictures", "windows"},
    "heads": {"pixels"},
    "pixels": set(),
    "windows": set(),
    "processes": set(),
    "backbone": {"weights"},
    "refiners": {"tokens"},
    "tokens": {"spectral"},
    "spectral": set(),
    "check": {"domains"},
    "domains": {"scenes", "readers", "pictures", "corruptions", "weights"},
    "weights": {"convert"},
    "convert": set(),
    "readers": set(),
    "pictures": set(),
    "corruptions": set(),
    "scenes": {"surfaces", "streets"},
    "surfaces": {"streets"},
    "streets": set(),
    "transforms": set(),
    "labels": {"experiment", "files"},
    "experiment": {"files"},
    "files": set(),
    "__init__": set(),
}


def read_pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def split_requirement(requirement: str) -> tuple[str, str]:
    """'Torch>=2.6' -> ('torch', '>=2.6')."""
    name, bound = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", requirement).groups()
    return re.sub(r"[-_.]+", "-", name).lower(), bound


def read_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def find_rooms_imported(tree: ast.Module, rooms: set[str]) -> set[str]:
    """Rooms of setlib that a module names in any import, at the top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "setlib" if node.level and not node.module else (node.module or "")
            base = f"setlib.{base}" if node.level and node.module else base
            names = [base] + [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "setlib" and len(part) > 1 and part[1] in rooms}
    return found


def find_allowed(room: str) -> set[str]:
    """Every room that lies below a room."""
    if room in COMMON | {"__init__"}:
        return IMPORTS[room]
    below = set(IMPORTS[room])
    return below | COMMON | {deeper for name in below for deeper in find_allowed(name)}


# Set-up


def test_environment_agrees_with_pyproject():
    project = read_pyproject()["project"]
    versions = dict(split_requirement(line) for line in project["dependencies"])
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))

    plain = [line for line in conda["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in conda["dependencies"] if isinstance(line, dict)]
    assert conda["name"] == project["name"] and conda["channels"] == ["conda-forge"]
    assert plain == [f"python{project['requires-python']}", "pip"]
    assert {"-e .[test]", "-c constraints.txt"} <= set(pip)
    listed = dict(split_requirement(line) for line in pip if not line.startswith("-"))
    assert set(listed) == USER_VISIBLE
    assert listed == {name: versions[name] for name in USER_VISIBLE}


def test_torch_is_held_by_the_constraints_alone():
    project = read_pyproject()["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    pinned = [line for line in project["dependencies"] + extras if "==" in line or "<" in line]
    assert not pinned, f"pyproject.toml pins {pinned}: pin in constraints.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("==")[0] for line in lines if line and not line.startswith("#")] == ["torch"]


def test_torchvision_is_absent_or_imports():
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        pytest.fail(f"this torchvision breaks every vision model of transformers ({error}): pip uninstall torchvision")


def test_notebook_kernel_is_this_python():
    from jupyter_client.kernelspec import KernelSpecManager

    command = KernelSpecManager().get_kernel_spec("python3").argv
    python = shutil.which(command[0]) if command[0] not in ("python", "python3") else sys.executable
    assert python and Path(python).absolute() == Path(sys.executable).absolute(), (
        f"the kernel python3 starts {command[0]}, not {sys.executable}: see `jupyter kernelspec list`"
    )


def test_licence_and_citation():
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    project = read_pyproject()["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert str(citation["version"]) == project["version"]
    (paper,) = citation["references"]
    assert "arXiv:2407.18568" in [identifier["value"] for identifier in paper["identifiers"]]


# The package


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_imports_go_downwards(path: Path):
    assert path.stem in IMPORTS, f"{path.name} is new: give it a line in the table IMPORTS of this file"
    wrong = find_rooms_imported(read_tree(path), set(IMPORTS)) - find_allowed(path.stem)
    assert not wrong, f"{path.name} imports {sorted(wrong)}, which do not lie below it"


def test_table_of_imports_has_no_circle():
    order = list(IMPORTS)
    for room, below in IMPORTS.items():
        assert all(order.index(name) > order.index(room) for name in below), f"{room} stands below what it imports"


@pytest.mark.parametrize(
    "line",
    [
        "import setlib.train",
        "from setlib import train",
        "from setlib.train import fit",
        "from . import train",
        "from .train import fit",
        "def f():\n    from setlib.train import fit",
    ],
)
def test_every_form_of_import_is_seen(line: str):
    assert find_rooms_imported(ast.parse(line), set(IMPORTS)) == {"train"}


def test_what_is_no_module_is_packaged_too():
    others = {path.name for path in (ROOT / "setlib").iterdir() if path.is_file() and path.suffix != ".py"}
    assert others == set(read_pyproject()["tool"]["setuptools"]["package-data"]["setlib"])


def test_package_stays_compact():
    assert ROOMS, "setlib/ holds no module"
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOMS}
    assert not {name: count for name, count in lines.items() if count > 480}
    assert sum(lines.values()) <= 11200, lines


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_nothing_is_unpickled(path: Path):
    wrong = []
    for node in ast.walk(read_tree(path)):
        if isinstance(node, ast.Import):
            wrong += [alias.name for alias in node.names if alias.name.split(".")[0] in ("pickle", "dill", "joblib")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pickle", "dill", "joblib"):
            wrong += [alias.name for alias in node.names if alias.name != "UnpicklingError"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True":
                wrong.append(ast.unparse(node))
            elif given.get("allow_pickle", "False") != "False":
                wrong.append(ast.unparse(node))
    assert not wrong, f"{path.name} can unpickle: {wrong}"


def test_no_path_of_one_machine():
    machine = re.compile(r"(?<![\w./~}-])/(?:work|home|root|Users|opt|mnt|tmp|media|scratch)/|\b[A-Z]:\\\\?\w")
    files = [*ROOMS, *ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("*.md"), *ROOT.glob("data/*.md"), ROOT / "Makefile"]
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if machine.search(line)
    ]
    assert not wrong


def test_no_large_file_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert files
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in files if path.is_file()}
    assert not {name: size for name, size in large.items() if size > 500_000}


# The README's commands


def read_commands() -> list[list[str]]:
    """Each command of the README's fenced blocks as words, variables in front and comments dropped."""
    readme = ROOT / "README.md"
    if not readme.exists():
        return []
    commands = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\bmake\b|python3? -m setlib", line):
                words = shlex.split(line.removeprefix("$ "), comments=True)
                for end in [i for i, word in enumerate(words) if word in ("&&", ";", "|")][::-1]:
                    commands.append(words[end + 1 :])
                    words = words[:end]
                commands.append(words)
    return [[word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] for words in commands]


def find_quoted() -> tuple[set[str], list[tuple[str, list[str]]]]:
    """The make targets that the README quotes, and its sub-commands of setlib with their options."""
    targets, calls = set(), []
    for words in read_commands():
        if words and words[0] == "make":
            targets |= {word for word in words[1:] if not word.startswith("-")}
        if "setlib" in words and words[words.index("setlib") - 1] == "-m":
            rest = words[words.index("setlib") + 1 :]
            if rest:
                calls.append((rest[0], [word.split("=")[0] for word in rest[1:] if word.startswith("-")]))
    return targets, calls


@functools.cache
def read_help(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "setlib", command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_pictures_of_the_readme_are_there_and_small():
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) >= 4
    assert not [name for name in named if not 0 < (ROOT / name).stat().st_size < 150_000]


def test_readme_names_the_two_commands():
    assert (ROOT / "README.md").exists(), "README.md is missing"
    assert {"workbook", "test"} <= find_quoted()[0]


def test_readme_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert {"workbook", "test", "test-browser", "screenshots", "lab", "lint", "format", "clean"} <= targets
    assert find_quoted()[0] <= targets


@pytest.mark.parametrize("command, options", find_quoted()[1])
def test_readme_sub_commands_exist(command: str, options: list[str]):
    result = read_help(command)
    assert result.returncode == 0, f"`python -m setlib {command}` of the README: {result.stderr.strip()}"
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", result.stdout))
    assert set(options) <= known, f"the README gives `{command}` options that its --help does not know"
