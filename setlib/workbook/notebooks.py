"""The notebooks run headless through papermill, in order. What they compute is theirs; the report is in `report.py`."""

from __future__ import annotations

import ast
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setlib.experiment import PROFILES, Experiment
from setlib.files import LOCK, PROJECT, alone, cure, load_json, nearest, shown
from setlib.run import Run
from setlib.workbook.serve import this_python

NOTEBOOKS = PROJECT / "notebooks"
MAIN = ("01_styles", "02_premise", "03_predictions", "04_domains", "05_ablation")  # the figure of what each found
SHARES = {"smoke": (8, 27, 22, 15, 28), "quick": (5, 28, 28, 10, 29), "paper": (1, 1, 14, 2, 82)}  # % of a run's time
NAMED = ("seed", "data.source", "data.targets")  # fields that have a parameter, and an option, of their own


class NotebookStopped(RuntimeError):
    """A notebook did not reach its end; the message is one sentence that says where and why."""


def options(experiment: Experiment) -> dict[str, str]:
    """Every field by its dotted name, written as `Experiment.build` reads it."""
    flat = experiment.flat().items()
    return {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in flat}


def differing(experiment: Experiment) -> dict[str, str]:
    """The `options` that are not as the profile has them."""
    base = options(PROFILES[experiment.profile])
    return {key: value for key, value in options(experiment).items() if value != base[key]}


def notebook_parameters(run: Run) -> dict[str, Any]:
    """What every notebook's `parameters` cell is given: it builds the same experiment and opens the same folder."""
    experiment = run.experiment
    return {
        "PROFILE": experiment.profile,
        "RUN": str(run.path.absolute()),
        "SOURCE": experiment.data.source,
        "TARGETS": list(experiment.data.targets),
        "SEED": experiment.seed,
        "OVERRIDES": [f"{key}={value}" for key, value in differing(experiment).items() if key not in NAMED],
    }


def find_notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The notebooks in order, or those that `only` names ("1" or "01_data"). Raises ValueError for an unknown one."""
    found = {path.stem: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise ValueError(f"There are no notebooks in {NOTEBOOKS}: run setlib from a clone of the project.")
    chosen = set()
    for name in only:
        stems = {stem for stem in found if name == stem or name.zfill(2) == stem[:2]}
        if not stems:
            raise ValueError(f"Unknown notebook '{name}' ({nearest(name, found)}).")
        chosen |= stems
    return [path for stem, path in found.items() if not only or stem in chosen]


def check_parameters(notebook: Path, names: Sequence[str]) -> None:
    """Raises ValueError if the notebook lacks one of these parameters: papermill would go on without it."""
    cells = [cell for cell in load_json(notebook)["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    lines = ast.parse("".join(cells[0]["source"])).body if cells else []
    known = [ast.unparse(line.target) for line in lines if isinstance(line, ast.AnnAssign)]
    if not known:
        raise ValueError(f"Notebook {notebook.name} has no parameters: tag its first code cell 'parameters'.")
    for name in names:
        if name not in known:
            raise ValueError(f"Notebook {notebook.name} has no parameter '{name}' ({nearest(name, known)}).")


def run_notebooks(run: Run, only: Sequence[str] = ()) -> None:
    """Executes the notebooks in order; the executed copies go to RUN/notebooks.

    Prints the main figure of each as it ends, and an estimate of the time that is left, from what they usually take.
    Raises ValueError before the first one starts if a notebook or parameter is unknown, NotebookStopped if one fails.
    """
    notebooks, values, began = find_notebooks(only), notebook_parameters(run), time.monotonic()
    for notebook in notebooks:
        check_parameters(notebook, list(values))
    usual = dict(enumerate(SHARES.get(run.experiment.profile.partition("-")[0], ()), start=1))
    shares = [usual.get(int(notebook.stem[:2]), 1) for notebook in notebooks]
    with alone(run.path / f".notebooks{LOCK}"), this_python(headless=True):
        for number, notebook in enumerate(notebooks, start=1):
            print(f"[{number}/{len(notebooks)}] {notebook.stem}", file=sys.stderr, flush=True)
            try:
                _execute(notebook, run.path / "notebooks" / notebook.name, values)
            except BaseException:
                print(file=sys.stderr)  # ends the line of a progress bar that was cut short
                raise
            words = [notebook.stem, *map(shown, figures(run, notebook.stem)[:1])]
            if number < len(notebooks):
                minutes = (time.monotonic() - began) * sum(shares[number:]) / sum(shares[:number]) / 60
                left = f"{minutes:.0f} min" if minutes > 1 else "a minute"
                words.append(f"about {left} left (an estimate)")
            print(", ".join(words), flush=True)


def _execute(notebook: Path, copy: Path, values: dict[str, Any]) -> None:
    """One notebook; its copy appears when it has ended or a cell has failed: an interrupt leaves the earlier one."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    for name in ("papermill", "asyncio"):  # one warns of what is checked here, one of a kernel that is ended
        logging.getLogger(name).setLevel(logging.CRITICAL)
    unfinished = copy.with_name(f".{copy.name}")
    options = {"kernel_name": "python3", "cwd": str(Path.cwd()), "progress_bar": False, "stderr_file": sys.stderr}
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        # coalesce_streams keeps the last state of a progress bar, not its thousands of lines
        papermill.execute_notebook(_literal(notebook), _literal(unfinished), values, coalesce_streams=True, **options)
        unfinished.replace(copy)
    except papermill.PapermillExecutionError as error:
        unfinished.replace(copy)
        reason = error.evalue if error.ename == "ValueError" else f"{error.ename}: {error.evalue}"
        reason = cure(reason, "run") or reason
        raise NotebookStopped(f"Notebook {shown(copy)} stopped in cell [{error.exec_count}]: {reason}") from error
    except DeadKernelError as error:
        kept = ", ".join(["", *sorted(path.stem for path in copy.parent.glob("[0-9]*.ipynb"))])
        reason = f"its process was killed, most likely for want of memory; {shown(copy.parents[1])} is kept{kept}"
        raise NotebookStopped(f"Notebook {notebook.name} stopped: {reason}.") from error
    except OSError as error:
        raise ValueError(f"Cannot write {copy}: {error.strerror or error}: free space or change the folder.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _literal(path: Path) -> str:
    """A path as papermill takes it: braces would be filled with parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def figures(run: Run, stem: str, captions: Sequence[str] = ()) -> list[Path]:
    """A notebook's figures: first the one that shows what it found, then in the order of captions."""
    found = sorted((run.path / "figures").glob(f"{stem[:2]}_*.png"))
    places = {name: place for place, name in enumerate(captions)}
    return sorted(found, key=lambda path: (path.stem not in MAIN, places.get(path.stem, len(places))))
