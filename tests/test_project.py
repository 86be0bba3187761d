"""The project's own files: set-up lists agree, imports go downwards, sizes stay small, the README's commands exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from setlib import __main__ as cli
from setlib.experiment import Experiment
from setlib.files import VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "setlib").rglob("*.py"))
USER_VISIBLE = {"torch", "transformers", "jupyterlab", "matplotlib", "ipywidgets", "datasets", "evaluate", "papermill"}

# What each folder, and each file of the hall, may import directly; what those import in turn is allowed too. Each
# stands above all it imports, so the table is also the order of the house, top first.
IMPORTS = {
    "__main__": {"bench", "workbook"},
    "bench": {"analysis"},
    "workbook": {"explorer"},
    "explorer": {"analysis"},
    "analysis": {"training", "plots", "release"},
    "release": {"checkpoint"},
    "training": {"evaluation", "mixing"},
    "evaluation": {"inference", "checkpoint", "metric"},
    "mixing": {"segmenter", "data"},
    "metric": {"data"},
    "inference": {"segmenter"},
    "checkpoint": {"segmenter", "weights", "refiners", "distributed", "run"},
    "run": {"experiment"},
    "distributed": {"experiment"},
    "segmenter": {"backbone", "tokens", "mask2former"},
    "weights": {"backbone"},
    "backbone": {"features", "_families"},
    "_families": set(),
    "features": {"style"},
    "mask2former": {"_mask2former", "heads"},
    "_mask2former": set(),
    "heads": {"data"},
    "refiners": {"baselines", "variants"},
    "baselines": {"tokens"},
    "variants": {"tokens"},
    "tokens": {"_kernels", "style"},
    "style": {"spectral", "data"},
    "_kernels": {"spectral"},
    "plots": {"data"},
    "data": {"scenes", "experiment", "spectral"},
    "spectral": set(),
    "scenes": {"files"},
    "_memory": set(),
    "experiment": {"files"},
    "files": set(),
    "__init__": set(),
}
UPWARDS = {("refiners.py", "release")}  # SET as it was released is built by name, though its room stands above
HALL = {  # what a reader of the method reads
    *("spectral", "tokens", "refiners", "backbone", "features", "heads", "mask2former", "segmenter", "inference"),
    *("training", "evaluation", "experiment", "run"),
}
STUDY = (  # the premise, measured: what notebook 02 asks
    *(f"analysis/{name}.py" for name in ("factorial", "transplant", "premise", "verdict", "probe", "lessons")),
    *("plots/evidence.py", "explorer/guess.py"),
)
ABLATION = (  # what notebook 05 asks: SET's variants and rivals, modes of training, and how they are compared
    *("variants.py", "style.py", "mixing.py", "analysis/ablation.py", "analysis/averages.py", "analysis/properties.py"),
)
COMMON = {"experiment", "files", "_memory"}  # which everyone may import


def read_pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def split_requirement(requirement: str) -> tuple[str, str]:
    """'Torch>=2.6' -> ('torch', '>=2.6')."""
    name, bound = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", requirement).groups()
    return re.sub(r"[-_.]+", "-", name).lower(), bound


def read_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def find_place(path: Path) -> str:
    """The folder that a module lies in, or its own name in the hall."""
    return path.relative_to(ROOT / "setlib").parts[0].removesuffix(".py")


def find_imported(tree: ast.Module) -> set[str]:
    """Places of setlib that a module names in any import, at the top or inside a function."""
    typing_only = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unread = {id(inner) for node in typing_only for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports inside setlib name their module in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "setlib" and len(part) > 1 and part[1] in IMPORTS}
    return found


def find_allowed(place: str) -> set[str]:
    """Every place that lies below one."""
    below = IMPORTS[place] | (COMMON - {place} if place not in COMMON else set())
    return below | {deeper for name in below for deeper in find_allowed(name)}


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
    assert str(citation["version"]) == project["version"] == VERSION
    (paper,) = citation["references"]
    assert "arXiv:2407.18568" in [identifier["value"] for identifier in paper["identifiers"]]


# The package


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "setlib").as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downwards(path: Path):
    place = find_place(path)
    assert place in IMPORTS, f"{place} is new: give it a line in the table IMPORTS of this file"
    wrong = find_imported(read_tree(path)) - find_allowed(place) - {place}
    wrong -= {above for name, above in UPWARDS if name == name_of(path)}
    assert not wrong, f"{name_of(path)} imports {sorted(wrong)}, which do not lie below it"


def test_table_of_imports_has_no_circle():
    order = list(IMPORTS)
    for place, below in IMPORTS.items():
        assert all(order.index(name) > order.index(place) for name in below), f"{place} stands below what it imports"


@pytest.mark.parametrize(
    "line",
    [
        "import setlib.training",
        "from setlib import training",
        "from setlib.training import train",
        "from setlib.plots.board import Board\nfrom setlib.training import train",
        "def f():\n    from setlib.training import train",
    ],
)
def test_every_form_of_import_is_seen(line: str):
    assert find_imported(ast.parse(line)) - {"plots"} == {"training"}


def test_public_names_are_there_and_documented():
    import setlib

    assert 20 <= len(setlib.__all__) <= 30
    for name in setlib.__all__:
        found = getattr(setlib, name)
        assert name == "REFINERS" or found.__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        getattr(setlib, "trian")  # noqa: B009


def test_what_is_no_module_is_packaged_too():
    package = ROOT / "setlib"
    others = {
        p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc") and p.name != "README.md"
    }
    packaged = read_pyproject()["tool"]["setuptools"]["package-data"]
    folders = {ROOT / name.replace(".", "/"): patterns for name, patterns in packaged.items()}
    assert others == {p for folder, patterns in folders.items() for pattern in patterns for p in folder.glob(pattern)}


def test_package_stays_compact():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    hall = {name: count for name, count in lines.items() if find_place(ROOT / "setlib" / name) in HALL}
    assert len(hall) == len(HALL) and sum(hall.values()) < 2000, hall
    study, asked = ({name: lines.pop(name) for name in names} for names in (STUDY, ABLATION))
    assert sum(study.values()) <= 1_332 and sum(asked.values()) <= 1_135, study | asked
    assert sum(lines.values()) <= 11_312, lines  # both only ever go down
    assert not {name: count for name, count in (lines | study | asked).items() if count > 480}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
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
    assert not wrong, f"{name_of(path)} can unpickle: {wrong}"


def test_no_path_of_one_machine():
    machine = re.compile(r"(?<![\w./~}-])/(?:work|home|root|Users|opt|mnt|tmp|media|scratch)/|\b[A-Z]:\\\\?\w")
    files = [*MODULES, *ROOT.glob("notebooks/*.ipynb"), *READMES, ROOT / "Makefile"]
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


READMES = [ROOT / name for name in ("README.md", "notebooks/README.md", "setlib/README.md", "data/README.md")]


def read_commands() -> list[list[str]]:
    """Each command of the READMEs' fenced blocks as words, variables in front and comments dropped."""
    commands = []
    text = "\n".join(path.read_text(encoding="utf-8") for path in READMES)
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\bmake\b|-m setlib", line):
                words = shlex.split(line.removeprefix("$ "), comments=True)
                for end in [i for i, word in enumerate(words) if word in ("&&", ";", "|")][::-1]:
                    commands.append(words[end + 1 :])
                    words = words[:end]
                commands.append(words)
    return [[word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] for words in commands]


def find_quoted() -> tuple[set[str], list[list[str]]]:
    """The make targets that the READMEs quote, and their sub-commands of setlib with all words."""
    targets, calls = set(), []
    for words in read_commands():
        if words and words[0] == "make":
            targets |= {word for word in words[1:] if not word.startswith("-")}
        if "setlib" in words and words[words.index("setlib") - 1] == "-m":
            calls.append(words[words.index("setlib") + 1 :])
    return targets, [words for words in calls if words]


def test_the_links_and_pictures_of_the_readmes_are_there_and_small():
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        names = [name for name in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not name.startswith("http")]
        assert not [name for name in names if not (readme.parent / name).exists()], readme
        pictures = [readme.parent / name for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)]
        assert not [path for path in pictures if not 0 < path.stat().st_size < 150_000]


def test_readme_is_read_in_one_go_and_names_the_two_commands():
    assert len(READMES[0].read_text(encoding="utf-8").splitlines()) < 130
    assert {"workbook", "test"} <= find_quoted()[0]


def test_readme_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    known = "workbook test test-reliability test-browser screenshots lab lint format clean"
    assert {*known.split()} <= targets
    assert find_quoted()[0] <= targets


@pytest.mark.parametrize("words", find_quoted()[1], ids=" ".join)
def test_readme_sub_commands_are_understood_whole(words: list[str]):
    args = cli.parse(words)
    if hasattr(args, "seed"):  # profile, domains and options too
        assert Experiment.build(args.profile, args.source, args.target, args.seed, args.options)
    elif hasattr(args, "options"):
        assert Experiment.build(overrides=args.options)
