"""The headless runner and the report, on throwaway notebooks; one test runs the project's own notebooks."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import papermill.iorw
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from traitlets.config import Config

from setlib import __main__ as cli
from setlib.checkpoint import read_history
from setlib.experiment import Experiment
from setlib.files import PROJECT, STATIC
from setlib.run import Run
from setlib.workbook import notebooks, report

PARAMETERS = """PROFILE: str = "quick"
RUN: str = ""
SOURCE: str = ""
TARGETS: list = []
SEED: int = 0
OVERRIDES: list = []  # for example ["model.refiner=rein"]"""
OPEN = """from setlib.experiment import Experiment
from setlib.run import Run
run = Run.open(RUN, Experiment.build(PROFILE, SOURCE, TARGETS, SEED, OVERRIDES))"""
FIRST = """import os, sys
import matplotlib.pyplot as plt
import setlib
given = {"PROFILE": PROFILE, "TARGETS": TARGETS, "SEED": SEED}
made = {"python": sys.executable, "setlib": setlib.__file__, "cwd": os.getcwd(), "given": given}
_ = run.save_figure(plt.subplots()[0], "01_a_<line>")"""
BAR = """from tqdm import tqdm
for _ in tqdm(range(5000), desc="work", mininterval=0, miniters=10):
    pass"""


def write_notebook(name: str, *cells: str, parameters: str = PARAMETERS) -> None:
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    content = [new_markdown_cell(f"# What is <{name}>?"), first, *map(new_code_cell, [OPEN, *cells])]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=content, metadata={"kernelspec": kernel}), notebooks.NOTEBOOKS / f"{name}.ipynb")


def read_outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]


@pytest.fixture
def own_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder in place of the project's notebooks."""
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "nb")
    notebooks.NOTEBOOKS.mkdir()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "run", Experiment.build("smoke"))


BUILDS = [
    {"profile": "smoke"},
    {"profile": "quick", "source": "scenes:clear", "seed": 3, "overrides": ["model.refiner=rein"]},
    {"profile": "smoke", "targets": ["folder@a b", "scenes:fog"], "overrides": ["train.learning_rate=1e-05"]},
    {"profile": "smoke", "overrides": ["model.refined_layers=", "ablation.seeds=4,5", "ablation.variants=none,set"]},
    {
        "profile": "paper",
        "source": "folder@it's",
        "targets": ["scenes:fog"],
        "overrides": ["train.ema=0.999", "seed=2"],
    },
]


@pytest.mark.parametrize("build", BUILDS)
def test_parameters_and_command_lead_back_to_the_experiment(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(Path("my run"), Experiment.build(**build))
    values = notebooks.notebook_parameters(run)
    arguments = [values[key] for key in ("PROFILE", "SOURCE", "TARGETS", "SEED", "OVERRIDES")]
    assert Experiment.build(*arguments) == run.experiment
    assert values["RUN"] == str(tmp_path / "my run")
    words = shlex.split(report.command(run))
    assert words[:4] == ["python", "-m", "setlib", "run"]
    args = cli.parse(words[3:])
    assert Experiment.build(args.profile, args.source, args.target, args.seed, args.options) == run.experiment
    assert args.run == "my run"


def test_only_keeps_the_order_and_knows_its_names(own_notebooks):
    with pytest.raises(ValueError, match="no notebooks in"):
        notebooks.find_notebooks()
    for name in ("02_b", "01_a", "03_c", "10_d"):
        write_notebook(name)
    (notebooks.NOTEBOOKS / "notes.ipynb").write_text("{}")
    assert [path.stem for path in notebooks.find_notebooks()] == ["01_a", "02_b", "03_c", "10_d"]
    assert [path.stem for path in notebooks.find_notebooks(["3", "01_a", "01"])] == ["01_a", "03_c"]
    with pytest.raises(ValueError, match=r"Unknown notebook '07' \(known: 01_a, 02_b"):
        notebooks.find_notebooks(["01", "07"])


@pytest.mark.parametrize(
    "parameters, problem",
    [
        (PARAMETERS.replace("SEED: int = 0\n", ""), "02_b.ipynb has no parameter 'SEED' .nearest: "),
        ("print(1)", "02_b.ipynb has no parameters: tag its first code cell 'parameters'"),
    ],
)
def test_parameters_are_checked_before_anything_runs(run, own_notebooks, parameters, problem):
    write_notebook("01_a")
    write_notebook("02_b", parameters=parameters)
    with pytest.raises(ValueError, match=problem):
        notebooks.run_notebooks(run)
    assert not (run.path / "notebooks").exists()


def test_a_run_that_stops_keeps_what_it_holds_and_says_why(tmp_path, own_notebooks, monkeypatch, capsys):
    """Two notebooks run, the second stops, the third never starts; all that a user relies on along the way."""
    write_notebook("01_first", FIRST, BAR, 'run.finish("01_first", made)["given"]')
    write_notebook("02_second", BAR, 'raise ValueError("It cannot be:\\n do that.")')
    write_notebook("03_third")
    foreign = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text(json.dumps({"argv": ["/nowhere/python"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)

    assert cli.main(["run", "--profile", "smoke", "--run", "a {run}", "--target", "scenes:fog", "--seed", "4"]) == 1
    captured = capsys.readouterr()
    folder = tmp_path / "a {run}"
    copy = Path("a {run}") / "notebooks" / "02_second.ipynb"
    assert captured.err.endswith(f"\nerror: Notebook {copy} stopped in cell [5]: It cannot be: do that.\n")
    assert "arameter" not in captured.err
    assert "[1/3] 01_first\n" in captured.err and "work: 100%" in captured.err and "[3/3]" not in captured.err
    assert sorted(path.name for path in (folder / "notebooks").iterdir()) == ["01_first.ipynb", "02_second.ipynb"]
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "jupyter")

    made = json.loads((folder / "results" / "01_first.json").read_text())
    assert made["given"] == {"PROFILE": "smoke", "TARGETS": ["scenes:fog"], "SEED": 4}
    assert (made["python"], made["cwd"]) == (sys.executable, str(tmp_path))
    assert Path(made["setlib"]).parent == PROJECT / "setlib"
    outputs = read_outputs(folder / "notebooks" / "01_first.ipynb")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    bars = [output.text for output in outputs if output.output_type == "stream"]
    assert len(bars) == 1 and bars[0].strip().count("work:") == 1 and "5000/5000" in bars[0]
    assert read_outputs(folder / "notebooks" / "02_second.ipynb")[-1].ename == "ValueError"

    rows = {line.split()[0]: line.split()[1:] for line in captured.out.splitlines() if line[:3] in ("01_", "02_")}
    assert float(rows["01_first"][0]) > 0 and 0.02 < float(rows["01_first"][1]) < 4 and rows["01_first"][2] == "GB"
    assert rows["02_second"] == ["stopped", "-"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What is &lt;01_first&gt;?" in page and 'alt="a &lt;line&gt;"' in page
    assert "Report: " + str(Path("a {run}") / "report.html") in captured.out
    figure = Path("a {run}") / "figures" / "01_a_<line>.png"
    assert f"\n01_first, {figure}, about a minute left (an estimate)\n" in captured.out


def test_a_killed_kernel_is_one_sentence(run, own_notebooks):
    write_notebook("01_a", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(notebooks.NotebookStopped, match="01_a.ipynb stopped: its process was killed"):
        notebooks.run_notebooks(run)


def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_copy(run, own_notebooks, monkeypatch):
    write_notebook("01_a")
    (run.path / "notebooks").mkdir()
    (run.path / "notebooks" / "01_a.ipynb").write_text("earlier")

    def fill(self, content, path):
        Path(path).write_text(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", fill)
    with pytest.raises(ValueError, match="Cannot write .*01_a.ipynb: No space left on device"):
        notebooks.run_notebooks(run)
    assert [path.read_text() for path in (run.path / "notebooks").iterdir()] == ["earlier"]


SEEDS = [("none", 0, 20.04), ("none", 3, 22.0), ("rein", 0, 31.5)]


def write_results(run: Run) -> None:
    """Metrics, the models beside the run's own, a figure and an executed copy."""
    results = [
        {"domain": "scenes:fog", "miou": 41.26, "per_class": {"road": 90.0, "sky": None}, "images": 4, "pixels": 9},
        {"domain": "camvid@<b>", "miou": None, "per_class": {"Road": 80.5}, "images": 2, "pixels": 9},
    ]
    results = [result | {"class_set": f"set-{place}"} for place, result in enumerate(results)]
    run.write_json("metrics.json", {"results": results})
    own, other = {"scenes:game": 60.0, "scenes:fog": 41.26}, {"scenes:game": 55.0, "scenes:fog": 30.0}
    run.write_json("results/04_cross_domain.json", {"miou": {"none": other, "set": own}, "peak_bytes": 2_000_000_000})
    code = [new_code_cell(f'run.save_figure(figure, "{name}")') for name in ("04_worst", "04_best")]
    texts = [new_markdown_cell(text) for text in ("Intro", "# Cross & domain", "The *worst* <one>.")]
    last = new_code_cell("verdict", outputs=[new_output("display_data", {"text/markdown": "**What** is <seen>."})])
    copy = new_notebook(cells=[*texts, *code, last])
    cells: dict[str, dict] = {}
    for variant, seed, miou in SEEDS:
        cell = cells.setdefault(variant, {"variant": variant, "domain": "scenes:fog", "seeds": [], "values": []})
        cell["seeds"].append(seed)
        cell["values"].append(miou)
    run.write_json("results/05_ablations.json", {"spread": list(cells.values())})
    copy.metadata["papermill"] = {"duration": 12.345, "exception": None}
    (run.path / "notebooks").mkdir(exist_ok=True)
    nbformat.write(copy, run.path / "notebooks" / "04_cross_domain.ipynb")
    for name in ("04_best", "04_all_others", "04_worst", "04_domains", "02_by_hand"):
        run.save_figure(Figure(), name)


def test_tables_hold_every_model_and_domain(run):
    assert report.metric_rows(run) == []
    write_results(run)
    assert report.cost_rows(run) == [["notebook", "seconds", "peak memory"], ["04_cross_domain", "12.3", "2.00 GB"]]
    assert report.metric_rows(run) == [
        ["domain", "mIoU % none", "mIoU % set", "class set", "pictures", "precision"],
        ["scenes:game (source)", "55.0", "60.0", "-", "-", "-"],
        ["scenes:fog", "30.0", "41.3", "set-0", "4", "-"],
        ["camvid@<b>", "-", "-", "set-1", "2", "-"],
    ]
    (run.path / "results" / "04_cross_domain.json").unlink()
    assert report.metric_rows(run)[1] == ["scenes:fog", "41.3", "set-0", "4", "-"]


def test_the_report_stands_alone(tmp_path):
    options = ["train.steps=7", "ablation.variants=none,set"]
    run = Run.open(tmp_path / "a<b", Experiment.build("smoke", "scenes:clear", ["camvid@<b>"], 5, options))
    write_results(run)
    page = report.write_report(run).read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:image/(?:webp|jpeg);base64,)', page) == []
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "<b>" not in page
    opening, folded = page.split("<h2>Everything else</h2>")
    assert "<details" not in opening and "What is &lt;seen&gt;." in opening
    assert re.findall(r'<img alt="([\w ]+)"', opening) == ["by hand", "domains"]
    assert re.findall(r'<img alt="([\w ]+)"', folded) == ["worst", "all others", "best"]
    assert "<figcaption>The worst &lt;one&gt;.</figcaption>" in folded
    assert "<h2>Cross &amp; domain</h2>" in opening and re.search("beforeprint", page) and "@media print" in page
    assert "--seed 5 -o train.steps=7 ablation.variants=none,set" in page
    differing = page[page.index("What is not as the profile has it") : page.index("All options")]
    assert re.findall(r"<tr><td>([\w.]+)<td>", differing) == ["seed", "data.source", "data.targets", *[
        option.partition("=")[0] for option in options]]  # fmt: skip
    assert "<td>train.batch_size<td>2" in page[page.index("All options") :]
    assert "small and random" in page and "not ACDC" in page and "DINOv2" not in page
    assert "<td>Road<td>80.5" in page and "<td>sky<td>-" in page
    assert "torch " in page and "transformers " in page
    assert "nan" not in re.sub(r'src="data:[^"]+"', "", page.partition("<style>")[2])


def test_the_report_opens_with_every_seed_of_every_model_and_domain(run):
    write_results(run)
    page = report.write_report(run).read_text(encoding="utf-8")
    assert "saw only scenes:game hold" in page[: page.index("<svg")]
    own, short = re.findall("<svg.*?</svg>", page, flags=re.S)
    words = [re.findall(r"<text[^>]*>\s*([^<]*?)</text>", one) for one in (own, short)]
    assert words[0] == ["none", "set", "scenes:game", "55.0", "60.0", "scenes:fog", "30.0", "41.3"]
    assert words[1] == ["none", "rein", "scenes:fog", "21.0", "20.0  22.0", "31.5"]
    assert re.findall('class="cell best"[^>]*>([^<]*)', own + short) == ["60.0", "41.3", "31.5"]
    assert "notebook 03: seed 0" in page and "notebook 05: seeds 0, 3" in page


@pytest.mark.parametrize("kind", ["chart", "photo"])
def test_a_figure_is_embedded_small_and_shows_no_loss(kind, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "01_a.png"
    pixels = np.full((200, 300, 3), 255, np.uint8)
    pixels[50:150, 20:280:20] = (0, 114, 178)
    if kind == "photo":
        smooth = Image.fromarray(rng.integers(0, 256, (10, 15, 3), np.uint8)).resize((300, 200))
        pixels = np.asarray(smooth) // 2 + rng.integers(0, 9, (200, 300, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    made = report.embedded(path)
    form, _, content = made["source"].partition(";base64,")
    assert form == f"data:image/{'jpeg' if kind == 'photo' else 'webp'}" and made["size"] == (300, 200)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), float)
    error = np.square(shown - pixels).mean()
    assert error == 0 if kind == "chart" else error < 20
    assert len(content) < (1 if kind == "photo" else 2) * path.stat().st_size


def test_the_report_says_what_the_backbone_is_not(run):
    run.experiment = Experiment.build("quick", "folder@a", ["folder@b"])
    page = report.write_report(run).read_text(encoding="utf-8")
    assert "its numbers are not DINOv2&#39;s" in page and "ACDC" not in page
    assert "Nothing is scored yet" in page


@pytest.mark.first
@pytest.mark.notebooks
def test_the_workbook_runs_from_end_to_end(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    options = ["run", "--profile", "smoke", "--run", str(folder)]
    assert cli.main(options) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    names = ["01_data", "02_frequency", "03_training", "04_cross_domain", "05_ablations"]
    assert [path.stem for path in sorted((folder / "notebooks").iterdir())] == names
    for name in names:
        outputs = read_outputs(folder / "notebooks" / f"{name}.ipynb")
        assert not [output for output in outputs if output.output_type == "error"]
        assert [output for output in outputs if "image/png" in output.get("data", {})], f"{name} shows no figure"
        assert sum(len(str(output.get("text", ""))) for output in outputs) < 20_000, f"{name} stores its progress"
        assert list((folder / "figures").glob(f"{name[:2]}_*.png"))
        assert json.loads((folder / "results" / f"{name}.json").read_text())["peak_bytes"] > 0
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+ GB$", output, flags=re.M)

    first = Run.load(folder).read_json("results/03_training.json")["first_losses"]  # of the loop as it is written out
    assert first and first == [entry["loss"] for entry in read_history(Run.load(folder))[: len(first)]]
    metrics = json.loads((folder / "metrics.json").read_text())
    experiment = Experiment.build("smoke")
    assert (metrics["profile"], metrics["seed"], metrics["source"]) == ("smoke", 0, "scenes:game")
    assert metrics["config"] == experiment.to_dict()
    assert [result["domain"] for result in metrics["results"]] == list(experiment.data.targets)
    for result in metrics["results"]:
        scores = [value for value in result["per_class"].values() if value is not None]
        assert result["miou"] == pytest.approx(sum(scores) / len(scores), abs=0.01) and 0 <= result["miou"] <= 100
        assert (len(result["per_class"]), result["images"]) == (19, 4) and 0 < result["pixels"] <= 4 * 64 * 128
        assert re.search(rf"^{result['domain']} .* {result['miou']:.1f} ", output, flags=re.M)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == len(list((folder / "figures").glob("*.png")))

    run_here(Run.load(folder), ["04"], monkeypatch)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert cli.main([*options, "--seed", "1"]) == 2
    assert "another configuration (seed is 0, not 1)" in capsys.readouterr().err

    camvid = f"camvid@{write_camvid(tmp_path)}"  # the same models on eleven classes
    other = Run.open(tmp_path / "other", Experiment.build("smoke", targets=[camvid, "scenes:fog"]))
    for part in ("model", "baseline"):
        shutil.copytree(folder / part, other.path / part)
    run_here(other, ["04"], monkeypatch)
    numbers = other.read_json("results/04_cross_domain.json")
    assert numbers["hardest"] == camvid and numbers["rows"][1]["drop set"] is None


def run_here(run: Run, only: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's notebooks in this process, cell by cell: no kernel has to start."""
    monkeypatch.setenv(STATIC, "1")
    monkeypatch.setenv("IPYTHONDIR", str(run.path.parent / "ipython"))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell puts its own there
    for path in notebooks.find_notebooks(only):
        shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()
                shell.push(notebooks.notebook_parameters(run) if "parameters" in cell.metadata.get("tags", ()) else {})


def write_camvid(folder: Path, name: str = "camvid", kinds: tuple[str, ...] = ("images", "labels")) -> Path:
    """Three random pictures with labels of CamVid's eleven classes, or photos without labels."""
    random = np.random.default_rng(0)
    for kind in kinds:
        (folder / name / kind).mkdir(parents=True)
        for i in range(3):
            shape, high = ((60, 80, 3), 256) if kind == "images" else ((60, 80), 12)
            Image.fromarray(random.integers(0, high, shape, np.uint8)).save(folder / name / kind / f"{i}.png")
    return folder / name


@pytest.mark.first
@pytest.mark.notebooks
def test_domains_of_several_class_sets_and_without_labels(tmp_path, monkeypatch):
    """CamVid's eleven classes, the nineteen of the scenes and photos without labels, side by side in every notebook."""
    camvid, photos = f"camvid@{write_camvid(tmp_path)}", f"folder@{write_camvid(tmp_path, 'photos', ('images',))}"
    words = ["run", "--profile", "smoke", "--run", str(tmp_path / "a"), "--source", camvid]
    words += ["--target", "scenes:night", photos, camvid, "-o", "train.steps=2"]
    run = cli.open_run(cli.parse([*words, "ablation.variants=none,set", "ablation.overrides=train.steps=1"]))
    run_here(run, [], monkeypatch)
    scored = {result["domain"]: result["class_set"] for result in run.read_json("metrics.json")["results"]}
    assert scored == {"scenes:night": "cityscapes-19", camvid: "camvid-11"}
    named = [row[0] for row in report.metric_rows(run)[1:]]
    assert "scenes:night" in named and photos not in named
    assert "camvid" in report.write_report(run).read_text(encoding="utf-8")


# The explorer's notebook, served


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "99999"], "Port 99999 is in use or not allowed"),
        (["--port", "-1"], "Port -1 is in use or not allowed"),
        (["nope"], "nope is no run folder"),
        ([""], "is no run folder"),
        (["--target", "scenes:dawn"], "Unknown style 'dawn'"),
        (["--target", "folder@nowhere"], "folder nowhere does not exist"),
    ],
)
def test_explore_refuses_in_a_sentence(words, sentence, capsys, tmp_path, monkeypatch):
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    monkeypatch.chdir(tmp_path)
    words = words if words[0] in ("nope", "") else [str(run.path), *words]
    assert cli.main(["explore", "--no-browser", *words]) == 2
    assert sentence in capsys.readouterr().err and not (run.path / "explore.ipynb").exists()


def test_explore_names_a_port_that_is_taken(capsys, tmp_path):
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["explore", str(run.path), "--no-browser", "--port", str(port)]) == 2
    assert f"Port {port} is in use" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_explore_serves_this_machine_until_it_is_stopped(kind, tmp_path):
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    command = [sys.executable, "-m", "setlib", "explore", str(run.path), "--no-browser"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as started:
        try:
            address = started.stdout.readline().strip()
            host, port = urllib.parse.urlsplit(address).netloc.split(":")
            assert host == "127.0.0.1" and address.endswith(tuple("0123456789abcdef")) and "token=" in address
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    page = urllib.request.urlopen(address, timeout=5).read().decode()
                    break
                time.sleep(0.2)
            assert "jupyter-config-data" in page
        finally:
            started.send_signal(kind)
            try:
                assert started.wait(30) == 0
            finally:
                started.kill()
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(port)))  # the server is gone
    (cell,) = nbformat.read(run.path / "explore.ipynb", as_version=4).cells
    assert repr(str(run.path)) in cell.source and repr(os.getcwd()) in cell.source
