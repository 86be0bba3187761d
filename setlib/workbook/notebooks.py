"""The notebooks run headless through papermill, and the report of a run folder: one page that stands alone.

Only the standard library is imported before a notebook starts. What the notebooks compute is theirs.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import logging
import os
import re
import secrets
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from setlib.experiment import PROFILES, Experiment
from setlib.files import PROJECT, STATIC, load_json, nearest, write_atomic
from setlib.run import Run

NOTEBOOKS = PROJECT / "notebooks"
TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
PAGE = Path(__file__).with_name("report.html")  # a template of jinja
MAIN = ("01_styles", "02_swap", "03_predictions", "04_domains", "05_ablation")  # the figure that shows what each found
SHARES = {"smoke": (10, 14, 26, 18, 32), "quick": (6, 6, 37, 14, 37), "paper": (1, 1, 14, 2, 82)}  # % of a run's time


class NotebookStopped(RuntimeError):
    """A notebook did not reach its end; the message is one sentence that says where and why."""


def options(experiment: Experiment) -> dict[str, str]:
    """Every field by its dotted name, written as `Experiment.build` reads it."""
    flat = experiment.flat().items()
    return {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in flat}


def differing(experiment: Experiment) -> dict[str, str]:
    """The fields that are not as the profile has them."""
    base = options(PROFILES[experiment.profile])
    return {key: value for key, value in options(experiment).items() if value != base[key]}


def overrides(experiment: Experiment) -> list[str]:
    """The `key=value` options that lead from the profile to this experiment; domains and seed are not among them."""
    named = ("seed", "data.source", "data.targets")
    return [f"{key}={value}" for key, value in differing(experiment).items() if key not in named]


def command(run: Run) -> str:
    """The command line that makes this run folder."""
    experiment, changed, named = run.experiment, differing(run.experiment), overrides(run.experiment)
    words = ["python", "-m", "setlib", "run", "--profile", experiment.profile, "--run", shown(run.path)]
    words += ["--source", experiment.data.source] if "data.source" in changed else []
    words += ["--target", *experiment.data.targets] if "data.targets" in changed else []
    words += ["--seed", str(experiment.seed)] if "seed" in changed else []
    return shlex.join(words + (["-o", *named] if named else []))


def shown(path: Path) -> str:
    """A path for people: relative to the working folder where it lies below it."""
    path, here = Path(path).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def find_notebooks(only: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """The notebooks of a folder in order, or those that `only` names ("01", "1" or "01_data").

    Raises ValueError if there are none or a name is unknown.
    """
    folder = Path(folder or NOTEBOOKS)
    found = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise ValueError(f"There are no notebooks in {folder}: run setlib from a clone of the project.")
    chosen = {name: [stem for stem in found if name == stem or name.zfill(2) == stem[:2]] for name in only}
    for name, stems in chosen.items():
        if not stems:
            raise ValueError(f"Unknown notebook '{name}' ({nearest(name, found)}).")
    return [path for stem, path in found.items() if not only or any(stem in stems for stems in chosen.values())]


def notebook_parameters(run: Run) -> dict[str, Any]:
    """What every notebook's `parameters` cell is given: it builds the same experiment and opens the same folder."""
    experiment = run.experiment
    return {
        "PROFILE": experiment.profile,
        "RUN": str(run.path.absolute()),
        "SOURCE": experiment.data.source,
        "TARGETS": list(experiment.data.targets),
        "SEED": experiment.seed,
        "OVERRIDES": overrides(experiment),
    }


def check_parameters(notebook: Path, values: dict[str, Any]) -> None:
    """Raises ValueError if the notebook lacks one of these parameters or annotates it with another type.

    papermill only warns, and its own inspection gives up on a line that holds two equals signs.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = next(("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])), "")
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    known = {ast.unparse(node.target): ast.unparse(node.annotation).partition("[")[0] for node in nodes}
    if not known:
        raise ValueError(f"Notebook {notebook.name} has no parameters: tag its first code cell 'parameters'.")
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"Notebook {notebook.name} has no parameter '{name}' ({nearest(name, known)}).")
        kind = known[name]
        if kind in TYPES and not isinstance(value, TYPES[kind]):
            raise ValueError(f"Parameter {name} of notebook {notebook.name} is of type {kind}, not {value!r}.")


def run_notebooks(run: Run, only: Sequence[str] = (), folder: Path | None = None, **parameters: Any) -> None:
    """Executes the notebooks in order; the executed copies go to RUN/notebooks. `parameters` adds to the run's own.

    Prints the main figure of each as it ends, and an estimate of the time that is left, from what they usually take.
    Raises ValueError before the first one starts if a notebook or parameter is unknown, NotebookStopped if one fails.
    """
    notebooks, began = find_notebooks(only, folder), time.monotonic()
    usual = dict(enumerate(SHARES[run.experiment.profile.partition("-")[0]], 1))
    shares = [usual.get(int(notebook.stem[:2]), 1) for notebook in notebooks]
    values = notebook_parameters(run) | parameters
    for notebook in notebooks:
        check_parameters(notebook, values)
    with this_python(headless=True):
        for number, notebook in enumerate(notebooks, 1):
            print(f"[{number}/{len(notebooks)}] {notebook.stem}", file=sys.stderr, flush=True)
            try:
                _execute(notebook, run.file(f"notebooks/{notebook.name}"), values)
            except BaseException:
                print(file=sys.stderr)  # ends the line of a progress bar that was cut short
                raise
            left = (time.monotonic() - began) * sum(shares[number:]) / sum(shares[:number]) / 60  # minutes
            figure = [shown(path) for path in figures(run, notebook.stem)[:1]]
            about = [f"about {left:.0f} min left (an estimate)" if left > 1 else "about a minute left (an estimate)"]
            print(", ".join([notebook.stem, *figure, *about * (number < len(notebooks))]), flush=True)


def _execute(notebook: Path, copy: Path, values: dict[str, Any]) -> None:
    """One notebook; its copy appears when it has ended or a cell has failed: an interrupt leaves the earlier one."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of what check_parameters has checked
    unfinished = copy.with_name(f".{copy.name}")
    options = {"kernel_name": "python3", "cwd": os.getcwd(), "progress_bar": False, "stderr_file": sys.stderr}
    try:
        # coalesce_streams keeps the last state of a progress bar, not its thousands of lines
        papermill.execute_notebook(_literal(notebook), _literal(unfinished), values, coalesce_streams=True, **options)
        os.replace(unfinished, copy)
    except papermill.PapermillExecutionError as error:
        os.replace(unfinished, copy)
        reason = error.evalue if error.ename == "ValueError" else f"{error.ename}: {error.evalue}"
        raise NotebookStopped(f"Notebook {shown(copy)} stopped in cell [{error.exec_count}]: {reason}") from error
    except DeadKernelError as error:
        reason = "its process was killed, most likely for want of memory"
        raise NotebookStopped(f"Notebook {notebook.name} stopped: {reason}.") from error
    except OSError as error:
        reason = f"{error.strerror or error}. Free some space or choose another folder."
        raise ValueError(f"Cannot write {copy}: {reason}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _literal(path: Path) -> str:
    """A path as papermill takes it: braces would be filled with parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def this_python(headless: bool = False) -> Iterator[dict[str, str]]:
    """Makes the kernel called python3 this interpreter with this setlib, whatever kernels the user has installed.

    headless: nobody moves a slider: the explorers show a picture. Yields what was added to the environment.
    """
    from ipykernel.kernelspec import get_kernel_dict

    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # an inherited Agg would drop every figure
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the debugger warns at every start
        "TQDM_MININTERVAL": "0.5" if sys.stderr.isatty() else "10",  # seconds; a log needs fewer lines than an eye
        STATIC: "1" if headless else "",
    }
    spec = get_kernel_dict() | {"env": environment}
    if headless:
        spec["argv"] = [*spec["argv"], "--log-level=CRITICAL"]  # its warnings are about Jupyter's own plumbing
    before = os.environ.get("JUPYTER_PATH", "")
    with tempfile.TemporaryDirectory(prefix="setlib-kernel-") as folder:
        write_atomic(Path(folder) / "kernels" / "python3" / "kernel.json", json.dumps(spec))
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield {"JUPYTER_PATH": os.environ["JUPYTER_PATH"]}
        finally:
            os.environ["JUPYTER_PATH"] = before  # empty means none


def lab_command(
    folder: Path, open_browser: bool = True, port: int = 0, notebook: str = ""
) -> tuple[list[str], str, str]:
    """The command that serves a folder's notebooks in JupyterLab to this machine alone; its address and its token.

    notebook: is opened, in JupyterLab's simple mode, with nothing around it.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"There is no port {port}: give one from 1 to 65535, or leave it out.")
    with socket.socket() as free:
        try:
            free.bind(("127.0.0.1", port))
        except OSError:
            raise ValueError(f"Port {port} is in use or not allowed: give another, or leave it out.") from None
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder.absolute(),
        "ServerApp.open_browser": open_browser,
        "ServerApp.allow_root": True,
        "ServerApp.answer_yes": True,
        "ServerApp.log_level": "WARN",
        "IdentityProvider.token": token,
        "LabApp.default_url": f"/doc/tree/{notebook}" if notebook else "/lab",
        "LabApp.news_url": None,
        "LabApp.extension_manager": "readonly",  # asks no index
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    return command, f"http://127.0.0.1:{port}", token


EXPLORER = """# Press Shift + Enter.
import os

from setlib.explorer.widgets import Tabs
from setlib.explorer.studio import Studio

os.chdir({here!r})
Tabs(Studio.open({names}))"""


def write_explorer(run: Run, domains: Sequence[str] = (), code: str = EXPLORER) -> Path:
    """RUN/explore.ipynb: one cell that shows the four views, of the run's domains and some more."""
    import nbformat

    names = ", ".join(map(repr, [str(run.path.absolute()), *domains]))
    source = code.format(names=names, here=os.getcwd())
    cells = [nbformat.v4.new_code_cell(source, id="explorer")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    return write_atomic(run.path / "explore.ipynb", nbformat.writes(notebook) + "\n")


def figures(run: Run, stem: str, captions: Sequence[str] = ()) -> list[Path]:
    """A notebook's figures: first the one that shows what it found, then in the order of captions."""
    found = sorted((run.path / "figures").glob(f"{stem[:2]}_*.png"))
    places = {name: place for place, name in enumerate(captions)}
    return sorted(found, key=lambda path: (path.stem not in MAIN, places.get(path.stem, len(places))))


def executed(run: Run) -> list[dict]:
    """Per executed copy: name, title, captions, said, seconds, peak_bytes (None without results), and whether it ended.

    captions: the text above each cell that saves a figure, by the figure's name, in the notebook's order. said: the
    notebook's own last words.
    """
    found = []
    for path in sorted((run.path / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook, results = json.loads(path.read_text(encoding="utf-8")), f"results/{path.stem}.json"
        texts = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
        title = next((text.splitlines()[0].lstrip("# ") for _, text in texts if text.startswith("# ")), path.stem)
        pairs = [
            (above, code) for (kind, above), (_, code) in zip(texts, texts[1:], strict=False) if kind == "markdown"
        ]
        captions = {name: above for above, code in pairs for name in re.findall(r'"(\d\d_\w+)"', code)}
        outputs = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", ())]
        said = ["".join(data["text/markdown"]) for data in outputs if "text/markdown" in data]
        peak = run.read_json(results).get("peak_bytes") if (run.path / results).is_file() else None
        notes = notebook["metadata"]["papermill"]
        entry = {"name": path.stem, "title": title, "captions": captions, "said": said[-1] if said else ""}
        found.append(entry | {"seconds": notes["duration"], "peak_bytes": peak, "ended": not notes["exception"]})
    return found


def cost_rows(run: Run) -> list[list[str]]:
    """Header and rows: wall-clock seconds and peak memory of each executed notebook."""
    rows = [["notebook", "seconds", "peak memory"]]
    for entry in executed(run):
        seconds = f"{entry['seconds']:.1f}" if entry["ended"] else "stopped"
        known = entry["ended"] and entry["peak_bytes"]
        rows.append([entry["name"], seconds, f"{entry['peak_bytes'] / 1e9:.2f} GB" if known else "-"])
    return rows


def _scores(run: Run) -> dict[str, dict[str, float | None]]:
    """mIoU by model and domain: of the run's own model also what `evaluate` has added to metrics.json."""
    refiner, beside = run.experiment.model.refiner, "results/04_cross_domain.json"
    miou = run.read_json(beside).get("miou", {}) if (run.path / beside).is_file() else {}
    results = run.read_json("metrics.json")["results"] if (run.path / "metrics.json").is_file() else []
    own = miou.pop(refiner, {}) | {result["domain"]: result["miou"] for result in results}
    return miou | ({refiner: own} if own else {})


def metric_rows(run: Run) -> list[list[str]]:
    """Header and rows: mIoU of each scored domain by model, class set, pictures, precision; [] if nothing is scored."""
    if not (run.path / "metrics.json").is_file():
        return []
    scored, miou = {result["domain"]: result for result in run.read_json("metrics.json")["results"]}, _scores(run)
    rows = [["domain", *(f"mIoU % {name}" for name in miou), "class set", "pictures", "precision"]]
    for domain in miou.get(run.experiment.model.refiner, ()):
        result = scored.get(domain, {})
        values = [_percent(by_domain.get(domain)) for by_domain in miou.values()]
        name = domain if result else f"{domain} (source)"
        rows.append([name, *values, *(str(result.get(key, "-")) for key in ("class_set", "images", "precision"))])
    return rows


def embedded(path: Path) -> dict[str, Any]:
    """A figure as a data URI (source) and its size (w, h): as it is, or as a JPEG in all of its colours if smaller."""
    from PIL import Image

    picture, files = Image.open(path).convert("RGB"), {"webp": io.BytesIO(), "jpeg": io.BytesIO()}
    picture.save(files["webp"], "WEBP", lossless=True, quality=50, method=2)  # effort alone
    picture.save(files["jpeg"], "JPEG", quality=84, subsampling=0)
    kind = min(files, key=lambda kind: files[kind].tell())
    content = base64.b64encode(files[kind].getvalue()).decode()
    return {"source": f"data:image/{kind};base64,{content}", "size": picture.size}


def write_report(run: Run) -> Path:
    """RUN/report.html: one page with the answer, the story and the rest, readable without any other file."""
    from jinja2 import Environment

    experiment, entries = run.experiment, {entry["name"][:2]: entry for entry in executed(run)}
    for path in sorted((run.path / "figures").glob("[0-9][0-9]_*.png")):  # those of a notebook run by hand, too
        number = path.name[:2]
        entries.setdefault(number, {"name": number, "title": f"Notebook {number}", "captions": {}, "said": ""})
    for number, entry in entries.items():
        entry["figures"] = [
            {"name": path.stem[3:].replace("_", " "), "caption": entry["captions"].get(path.stem, "")} | embedded(path)
            for path in figures(run, number, entry["captions"])
        ]
    cells = [
        {"variant": model, "domain": domain, "values": [value], "seeds": [experiment.seed]}
        for model, by_domain in _scores(run).items()
        for domain, value in by_domain.items()
        if value is not None
    ]
    beside, metrics = run.path / "results/05_ablations.json", run.path / "metrics.json"
    variants = load_json(beside)["spread"] if beside.is_file() else []
    variants = [cell for cell in variants if None not in cell["values"]]
    values = {
        "title": f"Profile {experiment.profile}, refiner {experiment.model.refiner}, seed {experiment.seed}",
        "question": f"How well does a model that saw only {experiment.data.source} hold on domains it never saw?",
        "command": command(run),
        "notes": list(_notes(experiment)),
        "panels": [("Trained in notebook 03", cells), ("Trained in notebook 05", variants)],
        "notebooks": [entries[number] for number in sorted(entries)],
        "results": metric_rows(run),
        "scored": load_json(metrics)["results"] if metrics.is_file() else [],
        "cost": cost_rows(run),
        "differing": [["option", "value"], *differing(experiment).items()],
        "options": [["option", "value"], *options(experiment).items()],
        "versions": _versions(),
    }
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE.read_text("utf-8"))
    return write_atomic(run.path / "report.html", template.render(values) + "\n")


def _notes(experiment: Experiment) -> Iterator[str]:
    """What a reader must know before he compares these numbers with others."""
    backbone, domains = experiment.model.backbone, (experiment.data.source, *experiment.data.targets)
    if "saliency" in backbone:
        yield f"The backbone {backbone} is a DINOv2 fine-tuned for saliency: its numbers are not DINOv2's."
    if backbone == "tiny-random":
        yield "The backbone is small and random: the numbers show that everything runs, nothing more."
    if any(name.startswith("scenes") for name in domains):
        yield "The domains called scenes are rendered: their night, fog, rain and snow are not ACDC's."


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _versions() -> str:
    installed = {d.name.lower(): d.version for d in metadata.distributions()} | {"python": sys.version.split()[0]}
    return ", ".join(f"{k} {installed.get(k, 'not installed')}" for k in ("setlib", "torch", "transformers", "python"))
