"""The report of a run folder: its tables, and one page that stands alone."""

from __future__ import annotations

import base64
import io
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from setlib.files import VERSION, load_json, write_atomic
from setlib.run import Run
from setlib.workbook.notebooks import differing, figures, notebook_parameters, options, shown

PAGE = Path(__file__).with_name("report.html")  # a template of jinja


def command(run: Run) -> str:
    """The command line that makes this run folder."""
    experiment, changed = run.experiment, differing(run.experiment)
    words = ["python", "-m", "setlib", "run", "--profile", experiment.profile, "--run", shown(run.path)]
    if "data.source" in changed:
        words += ["--source", experiment.data.source]
    if "data.targets" in changed:
        words += ["--target", *experiment.data.targets]
    if "seed" in changed:
        words += ["--seed", str(experiment.seed)]
    overrides = notebook_parameters(run)["OVERRIDES"]
    return shlex.join([*words, "-o", *overrides] if overrides else words)


def executed(run: Run) -> list[dict]:
    """Per executed copy: name, title, captions, said, seconds, peak_bytes (None without results), and whether it ended.

    captions: the text above each cell that saves a figure, by the figure's name, in the notebook's order. said: the
    notebook's own last words.
    """
    found = []
    for path in sorted((run.path / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = load_json(path)
        title, above, captions, said = "", "", {}, ""
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and above:
                captions |= dict.fromkeys(re.findall(r'"(\d\d_\w+)"', source), above)
            above = source if cell["cell_type"] == "markdown" else ""
            if above.startswith("# ") and not title:
                title = above.splitlines()[0].lstrip("# ")
            for output in cell.get("outputs", ()):
                said = "".join(output.get("data", {}).get("text/markdown", said))
        peak = run.read_json(f"results/{path.stem}.json", {}).get("peak_bytes")
        notes = notebook["metadata"]["papermill"]
        entry = {"name": path.stem, "title": title or path.stem, "captions": captions, "said": said}
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
    refiner, miou = run.experiment.model.refiner, run.read_json("results/04_cross_domain.json", {}).get("miou", {})
    results = run.read_json("metrics.json", {}).get("results", ())
    own = miou.pop(refiner, {}) | {result["domain"]: result["miou"] for result in results}
    return miou | ({refiner: own} if own else {})


def metric_rows(run: Run) -> list[list[str]]:
    """Header and rows: mIoU of each scored domain by model, class set, pictures, precision; [] if nothing is scored."""
    metrics, miou = run.read_json("metrics.json", {}), _scores(run)
    if not metrics:
        return []
    scored = {result["domain"]: result for result in metrics["results"]}
    rows = [["domain", *(f"mIoU % {name}" for name in miou), "class set", "pictures", "precision"]]
    for domain in miou.get(run.experiment.model.refiner, ()):
        result = scored.get(domain, {})
        values = [by_domain.get(domain) for by_domain in miou.values()]
        percents = ["-" if value is None else f"{value:.1f}" for value in values]
        name = domain if result else f"{domain} (source)"
        rows.append([name, *percents, *(str(result.get(key, "-")) for key in ("class_set", "images", "precision"))])
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

    experiment, copies = run.experiment, {copy["name"][:2]: copy for copy in executed(run)}
    drawn = {path.name[:2] for path in (run.path / "figures").glob("[0-9][0-9]_*.png")}
    notebooks = []
    for number in sorted({*copies, *drawn}):
        by_hand = {"name": number, "title": f"Notebook {number}", "captions": {}, "said": ""}
        copy = copies.get(number, by_hand)
        pictures = [
            {"name": path.stem[3:].replace("_", " "), "caption": copy["captions"].get(path.stem, "")} | embedded(path)
            for path in figures(run, number, copy["captions"])
        ]
        notebooks.append(copy | {"figures": pictures})
    cells = [
        {"variant": model, "domain": domain, "values": [value], "seeds": [experiment.seed]}
        for model, by_domain in _scores(run).items()
        for domain, value in by_domain.items()
        if value is not None
    ]
    variants = run.read_json("results/05_ablations.json", {}).get("spread", ())
    versions = {"setlib": VERSION} | {name: metadata.version(name) for name in ("torch", "transformers")}
    versions["python"] = sys.version.split()[0]
    values = {
        "experiment": experiment,
        "command": command(run),
        "panels": [
            ("Trained in notebook 03", cells),
            ("Trained in notebook 05", [cell for cell in variants if None not in cell["values"]]),
        ],
        "notebooks": notebooks,
        "results": metric_rows(run),
        "scored": run.read_json("metrics.json", {}).get("results", []),
        "cost": cost_rows(run),
        "differing": [["option", "value"], *differing(experiment).items()],
        "options": [["option", "value"], *options(experiment).items()],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE.read_text("utf-8"))
    return write_atomic(run.path / "report.html", template.render(values) + "\n")
