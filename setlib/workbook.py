"""The notebooks run headless through papermill, and the report of a run folder: one page that stands alone.

Only the standard library is imported before a notebook starts. What the notebooks compute is theirs.
"""

from __future__ import annotations

import ast
import base64
import json
import logging
import os
import re
import secrets
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from setlib.experiment import PROFILES, Experiment, Run, nearest
from setlib.files import PROJECT, STATIC, write_atomic

NOTEBOOKS = PROJECT / "notebooks"
TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
PAGE = """<!doctype html>
{% macro table(rows, caption) %}
<div class="wide"><table><caption>{{ caption }}</caption><tr><th>{{ rows[0] | join("<th>" | safe) }}</tr>
{% for row in rows[1:] %}<tr><td>{{ row | join("<td>" | safe) }}</tr>
{% endfor %}</table></div>
{% endmacro %}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{{ title }}</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem;color:#222;background:#fff}
code{background:#f3f3f3;padding:.1em .3em;overflow-wrap:anywhere}.wide{overflow-x:auto}
.note,caption,figcaption{color:#555}
table{border-collapse:collapse}caption,th{text-align:left}th,td{padding:.2rem .7rem;border-bottom:1px solid #ccc}
td+td{text-align:right}img{max-width:100%;height:auto}figure{margin:1.5rem 0;break-inside:avoid}
</style></head><body><h1>{{ title }}</h1><p>Made by <code>{{ command }}</code></p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
<h2>Results</h2>
{% if results %}{{ table(results, "Mean IoU in percent over the classes that occur, from one seed; - is not scored") }}
{% else %}<p>Nothing is scored yet.</p>
{% endif %}
{% for name, rows in classes.items() %}<details><summary>IoU per class, {{ name }}</summary>
{{ table(rows, "Percent; - where neither labels nor predictions hold the class") }}</details>
{% endfor %}
{% for heading, pictures in figures.items() %}<h2>{{ heading }}</h2>
{% for name, picture, caption in pictures %}
<figure><img alt="{{ name }}" src="data:image/png;base64,{{ picture }}">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}{% endfor %}
<h2>Cost</h2>{{ table(cost, "Wall-clock time and largest resident memory of each notebook's process") }}
<h2>Configuration</h2>
{{ table(differing, "What is not as the profile has it" if differing[1:] else "The profile as it is") }}
<details><summary>All options</summary>{{ table(options, "") }}</details>
<p>{{ versions }}</p></body></html>"""


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

    Raises ValueError before the first one starts if a notebook or parameter is unknown, NotebookStopped if one fails.
    """
    notebooks = find_notebooks(only, folder)
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

from setlib.explore import Tabs
from setlib.views import Studio

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


def executed(run: Run) -> list[dict]:
    """Per executed copy: name, title, captions, seconds, peak_bytes (None without results), and whether it has ended.

    captions: the text above each cell that saves a figure, by the figure's name, in the notebook's order.
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
        peak = run.read_json(results).get("peak_bytes") if (run.path / results).is_file() else None
        notes = notebook["metadata"]["papermill"]
        entry = {"name": path.stem, "title": title, "captions": captions, "seconds": notes["duration"]}
        found.append(entry | {"peak_bytes": peak, "ended": not notes["exception"]})
    return found


def cost_rows(run: Run) -> list[list[str]]:
    """Header and rows: wall-clock seconds and peak memory of each executed notebook."""
    rows = [["notebook", "seconds", "peak memory"]]
    for entry in executed(run):
        seconds = f"{entry['seconds']:.1f}" if entry["ended"] else "stopped"
        known = entry["ended"] and entry["peak_bytes"]
        rows.append([entry["name"], seconds, f"{entry['peak_bytes'] / 1e9:.2f} GB" if known else "-"])
    return rows


def metric_rows(run: Run) -> list[list[str]]:
    """Header and rows: mIoU of each scored domain by model, class set, pictures; [] if nothing is scored.

    Targets of the run's own model come from metrics.json, all else from results/04_cross_domain.json.
    """
    if not (run.path / "metrics.json").is_file():
        return []
    scored = {result["domain"]: result for result in run.read_json("metrics.json")["results"]}
    refiner, beside = run.experiment.model.refiner, "results/04_cross_domain.json"
    miou = run.read_json(beside).get("miou", {}) if (run.path / beside).is_file() else {}
    own = miou.pop(refiner, {})
    rows = [["domain", *(f"mIoU % {name}" for name in [*miou, refiner]), "class set", "pictures"]]
    for domain in {**own, **scored}:
        result = scored.get(domain, {"miou": own.get(domain)})
        values = [*(values.get(domain) for values in miou.values()), result["miou"]]
        name = domain if domain in scored else f"{domain} (source)"
        rows.append([name, *map(_percent, values), result.get("class_set", "-"), str(result.get("images", "-"))])
    return rows


def write_report(run: Run) -> Path:
    """RUN/report.html: one page with command, configuration, tables and figures, readable without any other file."""
    from jinja2 import Environment

    experiment, entries = run.experiment, executed(run)
    titles = {entry["name"][:2]: entry["title"] for entry in entries}
    captions = {name: text for entry in entries for name, text in entry["captions"].items()}
    places = {name: place for place, name in enumerate(captions)}
    figures: dict[str, list[tuple[str, str, str]]] = {}
    paths = sorted((run.path / "figures").glob("*.png"))
    for path in sorted(paths, key=lambda path: (path.name[:2], places.get(path.stem, len(places)))):
        name = path.stem.partition("_")[2].replace("_", " ") or path.stem
        picture = base64.b64encode(path.read_bytes()).decode()
        group = figures.setdefault(titles.get(path.name[:2], "Figures"), [])
        group.append((name, picture, re.sub("[`*]", "", captions.get(path.stem, name))))
    values = {
        "title": f"Profile {experiment.profile}, refiner {experiment.model.refiner}, seed {experiment.seed}",
        "command": command(run),
        "notes": list(_notes(experiment)),
        "results": metric_rows(run),
        "classes": _class_tables(run),
        "figures": figures,
        "cost": cost_rows(run),
        "differing": [["option", "value"], *differing(experiment).items()],
        "options": [["option", "value"], *options(experiment).items()],
        "versions": _versions(),
    }
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE).render(values)
    return write_atomic(run.path / "report.html", page + "\n")


def _class_tables(run: Run) -> dict[str, list[list[str]]]:
    """Class set -> header and rows: IoU per class of each domain that is scored in it."""
    results = run.read_json("metrics.json")["results"] if (run.path / "metrics.json").is_file() else []
    tables = {}
    for name in dict.fromkeys(result.get("class_set", "-") for result in results):
        group = [result for result in results if result.get("class_set", "-") == name]
        tables[name] = [["class", *(result["domain"] for result in group)]]
        tables[name] += [[c, *(_percent(result["per_class"][c]) for result in group)] for c in group[0]["per_class"]]
    return tables


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
