"""The command line: usage errors, train, evaluate, predict and check on small hand-made domains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setlib import __main__ as cli
from setlib.data.labels import CITYSCAPES, id_map
from setlib.data.layouts import LAYOUTS
from setlib.experiment import Experiment
from setlib.workbook import predict

TINY = ["-o", "train.steps=2", "train.views=2", "data.height=32", "data.width=32", "data.long_edge=64"]
HEAVY = {"torch", "transformers", "papermill", "datasets", "matplotlib", "numpy"}


def make_domain(folder: Path, count: int = 2, labels: bool = True) -> Path:
    """A `folder@` domain of noise, its own for every folder's name, with the labels road and sky."""
    random = np.random.default_rng(list(folder.name.encode()))
    for name in ("images", "labels")[: 1 + labels]:
        (folder / name).mkdir(parents=True)
    for index in range(count):
        Image.fromarray(random.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / "images" / f"p{index}.png")
        if labels:
            label = np.where(np.arange(48)[:, None] < 24, 10, 0) * np.ones((1, 64), int)
            Image.fromarray(label.astype(np.uint8)).save(folder / "labels" / f"p{index}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model, made by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    domain = f"folder@{make_domain(folder / 'domain')}"
    options = ["--profile", "smoke", "--run", str(folder / "run"), "--source", domain, "--target", domain, *TINY]
    assert cli.main(["train", *options]) == 0
    return folder / "run"


def read_error(capsys: pytest.CaptureFixture) -> str:
    """The one line of an error."""
    lines = [line for line in capsys.readouterr().err.split("\n") if "error: " in line]
    assert len(lines) == 1
    return lines[0].partition("error: ")[2]


@pytest.mark.parametrize(
    "argv, words",
    [
        ("rnu", ["unknown command 'rnu'", "nearest: run"]),
        ("", ["required: COMMAND"]),
        ("run --profle smoke", ["unknown option '--profle' of run", "nearest: --profile"]),
        ("evaluate somewhere --profile smoke", ["unknown option '--profile' of evaluate"]),
        ("run -o model.backbone=dinov2-lagre", ["Unknown backbone 'dinov2-lagre'", "nearest: dinov2-large"]),
        ("train -o model.backbone=./nowhere/x.pth", ["There is no folder or file ./nowhere/x.pth"]),
        ("run -o model.refiner=adapter", ["Unknown refiner 'adapter'", "nearest: adaptformer"]),
        ("run --profile smok", ["Unknown profile 'smok'", "smoke, quick"]),
        ("run --seed one", ["--seed", "'one'"]),
        ("run --seed -1", ["Option seed should be greater than or equal to 0, got -1"]),
        ("train -o model.refner=set", ["Unknown option 'model.refner'", "nearest: model.refine"]),
        ("train -o model.refiner=sett", ["Unknown refiner 'sett'", "nearest: set"]),
        ("train -o ablation.variants=set,rain", ["Unknown refiner 'rain'", "nearest: rein"]),
        ("ablate -o ablation.transfers=scenes:nite->scenes:fog", ["Unknown style 'nite'"]),
        (
            "ablate -o ablation.baseline=rein ablation.variants=none,set",
            ["ablation.baseline is 'rein', which is none of the variants none, set"],
        ),
        ("train -o train.steps=many", ["Option train.steps should be a valid integer, got", "many"]),
        ("train --source scene:night", ["Unknown domain 'scene'", "nearest: scenes"]),
        ("train --target scenes:nite", ["Unknown style 'nite'", "nearest: night"]),
        ("train --target folder@nowhere", ["folder nowhere does not exist"]),
        ("run --only 07", ["'07'"]),
        ("evaluate nowhere", ["nowhere is no run folder"]),
        ("predict nowhere picture.png --out out", ["nowhere is no run folder"]),
        ("predict nowhere picture.png", ["required: --out"]),
        ("predict nowhere --out out -o inference.flip=true a.png", ["required: IMAGE", "names stand first: -o and"]),
        ("predict nowhere a.png --out out b.png", ["'b.png' stands behind an option"]),
        ("evaluate --target scenes:night nowhere", ["required: RUN", "names stand first: -o and --target take all"]),
    ],
)
def test_usage_errors_are_one_sentence_that_names_the_cure(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ["--run", "made"] if argv.startswith(("run", "train")) else []
    assert cli.main([*argv.split(), *folder]) == 2
    error = read_error(capsys)
    assert all(word in error for word in words), error
    assert not (tmp_path / "made").exists()


def test_help_and_usage_errors_import_nothing_heavy():
    code = "import sys; from setlib.__main__ import main; code = main(['run', '--profle']); print(code, *sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("2 ")
    assert not HEAVY & set(result.stdout.split())


@pytest.mark.parametrize("command", ["run", "train", "evaluate x", "check x", "backbones", "bench", "verify x.npz"])
def test_outside_the_environment_it_is_said_how_to_enter_it(command):
    bare = [sys.executable, "-S", "-E", "-m", "setlib"]  # without site-packages
    root = Path(cli.__file__).parents[1]
    result = subprocess.run([*bare, *command.split()], capture_output=True, text=True, timeout=60, cwd=root)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "has no package" in result.stderr
    assert f"source {root}/.venv/bin/activate" in result.stderr and "conda activate setlib" in result.stderr
    assert subprocess.run([*bare, command.split()[0], "--help"], capture_output=True, cwd=root).returncode == 0


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="Unknown profile"):
        cli.main(["run", "--debug", "--profile", "nothing"])


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_command", interrupt)
    assert cli.main(["train"]) == 130
    assert "stopped" in read_error(capsys)


def test_system_errors_name_the_file():
    error = OSError(28, "No space left on device", "runs/x")
    assert cli.sentence(error) == "No space left on device: runs/x"
    assert cli.sentence(ValueError("two\n lines")) == "two lines"


def test_run_folder_must_be_writable_and_hold_the_same_configuration(trained, capsys, tmp_path):
    domain = f"folder@{trained.parent / 'domain'}"
    options = ["--profile", "smoke", "--source", domain, "--target", domain, *TINY]
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "--run", str(tmp_path / "file" / "run"), *options]) == 2
    assert "Cannot write" in read_error(capsys)
    assert cli.main(["train", "--run", str(trained), "--seed", "1", *options]) == 2
    assert "another configuration (seed is 0, not 1)" in read_error(capsys)


def test_a_domain_without_labels_is_refused_before_training(capsys, tmp_path):
    domain = f"folder@{make_domain(tmp_path / 'domain', labels=False)}"
    options = ["--profile", "smoke", "--run", str(tmp_path / "run")]
    assert cli.main(["train", *options, "--source", domain]) == 2
    assert "no labels" in read_error(capsys)
    assert cli.main(["run", *options, "--target", domain]) == 2
    assert "no labels" in read_error(capsys)
    assert not (tmp_path / "run").exists()


def test_training_never_opens_a_target(capsys, tmp_path):
    source, target = make_domain(tmp_path / "source"), make_domain(tmp_path / "target", labels=False)
    for path in (target / "images").iterdir():
        path.write_bytes(b"no picture")
    options = ["--profile", "smoke", "--run", str(tmp_path / "run"), "--source", f"folder@{source}", *TINY]
    assert cli.main(["train", *options, "--target", f"folder@{target}"]) == 0
    assert cli.main(["run", *options, "--target", f"folder@{target}"]) == 2
    assert "cannot be opened as a picture" in read_error(capsys)


def test_train_says_where_the_model_is(trained, capsys):
    domain = f"folder@{trained.parent / 'domain'}"
    options = ["--profile", "smoke", "--run", str(trained), "--source", domain, "--target", domain, *TINY]
    before = (trained / "model" / "model.safetensors").read_bytes()
    assert cli.main(["train", *options]) == 0
    output = capsys.readouterr().out
    assert str(trained / "model") in output and "2 steps" in output
    assert (trained / "model" / "model.safetensors").read_bytes() == before
    assert not (trained / "metrics.json").exists()


def test_ablate_prints_one_table_and_goes_on_with_more_variants(capsys, tmp_path):
    command = ["ablate", "--profile", "smoke", "--run", str(tmp_path), "-o", "ablation.overrides=train.steps=2"]
    assert cli.main([*command, "ablation.variants=none,set model.rank=2"]) == 0
    out = capsys.readouterr().out
    assert "set model.rank=2" in out and "mean of targets" in out and "beside none" in out and "table.csv" in out
    assert (tmp_path / "figures" / "ablation.png").is_file() and (tmp_path / "ablation" / "differences.json").is_file()
    first = (tmp_path / "ablation" / "none-seed0" / "history.jsonl").stat().st_mtime_ns
    assert cli.main([*command, "ablation.variants=none,set model.rank=2,style", "ablation.seeds=0"]) == 0
    assert "style" in capsys.readouterr().out
    assert (tmp_path / "ablation" / "none-seed0" / "history.jsonl").stat().st_mtime_ns == first


def test_premise_measures_each_backbone_beside_its_control_once(capsys, tmp_path):
    command = ["premise", "--profile", "smoke", "--run", str(tmp_path / "run"), "--layouts", "3", "--places", "1"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "tiny-random, as trained, 3 layouts in 8 styles" in first and "tiny-random, random weights" in first
    assert len([line for line in first.splitlines() if line.startswith("layer 4")]) == 2
    assert first.count("*Is phase content?*") == 2
    names = [f"premise_{kind}{control}.png" for kind in ("atlas", "shares") for control in ("", "_control")]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "run" / "figures").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("premise*/*.json")}
    assert cli.main(command) == 0 and capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("premise*/*.json")} == kept
    assert cli.main([*command[:-3], "2"]) == 2
    assert "at least 3 layouts, 3 styles and 1 place" in read_error(capsys)


def test_evaluate_adds_to_the_metrics(trained, capsys, tmp_path):
    own = f"folder@{trained.parent / 'domain'}"
    other = f"folder@{make_domain(tmp_path / 'other', count=1)}"
    assert cli.main(["evaluate", str(trained)]) == 0
    assert cli.main(["evaluate", str(trained), "--target", other]) == 0
    metrics = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    assert {result["domain"]: result["images"] for result in metrics["results"]} == {own: 2, other: 1}
    assert Experiment.from_dict(metrics["config"]).data.source == own
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for result in metrics["results"]:
        assert table[result["domain"]] == [f"{result['miou']:.1f}", "cityscapes-19", str(result["images"]), "float32"]
    unlabelled = f"folder@{make_domain(tmp_path / 'unlabelled', labels=False)}"
    assert cli.main(["evaluate", str(trained), "--target", unlabelled]) == 2
    assert "no labels" in read_error(capsys)


def test_evaluate_takes_more_or_fewer_pictures(trained, capsys, tmp_path):
    six = f"folder@{make_domain(tmp_path / 'six', count=6)}"
    assert cli.main(["evaluate", str(trained), "--target", six, "-o", "data.eval_images=0"]) == 0
    results = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))["results"]
    assert {result["domain"]: result["images"] for result in results}[six] == 6  # 4 in the smoke profile
    assert cli.main(["evaluate", str(trained), "-o", "model.refiner=rein"]) == 2
    assert "'model.refiner=rein' was settled by training" in read_error(capsys)


def save_pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Pictures of many formats and modes; file name -> the size they are shown at."""
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (folder / "sub").mkdir(parents=True)
    picture.save(folder / "a.png")
    picture.save(folder / "a.jpg")
    picture.save(folder / "sub" / "a.png")
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("RGBA").save(folder / "clear.webp")
    picture.convert("P").save(folder / "palette.gif")
    picture.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.new("1", (9, 400)).save(folder / "thin.tif")
    Image.new("RGB", (1, 1)).save(folder / "one.bmp")
    sizes = dict.fromkeys(
        ["a.png", "a.jpg", "sub/a.png", "grey.jpg", "cmyk.jpg", "clear.webp", "palette.gif"], (70, 50)
    )
    return sizes | {"deep.png": (70, 50), "turned.jpg": (50, 70), "thin.tif": (9, 400), "one.bmp": (1, 1)}


def test_predict_reads_every_format_and_overwrites_nothing(trained, capsys, tmp_path):
    sizes = save_pictures(tmp_path / "in")
    images = [str(tmp_path / "in" / name) for name in sizes]
    assert cli.main(["predict", str(trained), *images, "--out", str(tmp_path / "out")]) == 0
    assert f"{len(sizes)} of {len(sizes)}" in capsys.readouterr().out
    names = predict.output_names([Path(image) for image in images])
    assert names[:3] == ["a", "in_a", "sub_a"]
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(sizes)
    for name, size in zip(names, sizes.values(), strict=True):
        labels = Image.open(tmp_path / "out" / f"{name}_trainids.png")
        overlay = Image.open(tmp_path / "out" / f"{name}_overlay.png")
        assert (labels.mode, labels.size, overlay.mode, overlay.size) == ("L", size, "RGB", size)
        assert np.asarray(labels).max() < 19


def test_predict_does_what_it_can_and_names_the_rest(trained, capsys, tmp_path):
    save_pictures(tmp_path)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("no picture")
    images = [str(tmp_path / name) for name in ("cut.png", "text.png", "grey.jpg")]
    assert cli.main(["predict", str(trained), *images, "--out", str(tmp_path / "out")]) == 2
    error = read_error(capsys)
    assert "cut.png cannot be read" in error and "text.png cannot be read" in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grey_overlay.png", "grey_trainids.png"]


@pytest.mark.parametrize(
    "images, words",
    [
        (["missing.png"], "There is no file"),
        (["sub"], "is a folder"),
        (["a.png", "a_overlay.png"], "would be overwritten"),
        (["a.png", "a_labelids.png"], "would be overwritten"),
    ],
)
def test_predict_refuses_before_it_starts(trained, capsys, tmp_path, images, words):
    save_pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a_overlay.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a_labelids.png")
    before = (tmp_path / "a_overlay.png").read_bytes()
    images = [str(tmp_path / name) for name in images]
    assert cli.main(["predict", str(trained), *images, "--out", str(tmp_path), "--labels", "kitti"]) == 2
    assert words in read_error(capsys)
    assert (tmp_path / "a_overlay.png").read_bytes() == before and not list(tmp_path.glob("*_trainids.png"))


CANONICAL = {  # train class -> id and colour in the labels of a data set
    "cityscapes": {"road": (7, (128, 64, 128)), "train": (31, (0, 80, 100)), "bicycle": (33, (119, 11, 32))},
    "mapillary": {"road": (13, (128, 64, 128)), "traffic sign": (50, (220, 220, 0)), "rider": (20, (255, 0, 0))},
    "mapillary-v2": {"road": (21, (128, 64, 128)), "traffic sign": (100, (220, 220, 0)), "person": (30, (220, 20, 60))},
    "wilddash2": {"car": (26, (0, 0, 142)), "pole": (17, (153, 153, 153))},
    "camvid32": {"person": (16, (64, 64, 0)), "truck": (5, (64, 0, 128)), "traffic sign": (20, (192, 128, 128))},
    "camvid": {"bus": (8, (64, 0, 128)), "sky": (0, (128, 128, 128))},
    "bdd100k": {"road": (0, (128, 64, 128)), "bicycle": (18, (119, 11, 32))},
    "iddlevel3": {"road": (0, (128, 64, 128)), "train": (255, (0, 0, 0))},  # it has none
}


@pytest.mark.parametrize("name", CANONICAL)
def test_label_ids_are_those_of_the_class_itself(name):
    to_ids, colours = predict.label_ids(name)
    places = {word: CITYSCAPES.classes.index(word) for word in CANONICAL[name]}
    assert {w: (to_ids[i], tuple(colours[to_ids[i]])) for w, i in places.items()} == CANONICAL[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_label_ids_of_every_data_set_are_read_as_the_class_that_was_predicted(name):
    to_ids, _ = predict.label_ids(name)
    ids = id_map(LAYOUTS[name][0].labels[0][1])
    assert ids.to_score[to_ids[:19]].tolist() == ids.class_set.to_place[:19].tolist() and (to_ids[19:] == 255).all()


def test_predict_writes_label_ids_and_colours_on_demand(trained, capsys, tmp_path):
    picture = str(trained.parent / "domain" / "images" / "p0.png")
    words = ["predict", str(trained), picture, "--out", str(tmp_path / "out"), "--labels"]
    assert cli.main([*words, "cityscapes"]) == 0
    made = {path.stem.removeprefix("p0_"): Image.open(path) for path in (tmp_path / "out").iterdir()}
    assert {kind: image.mode for kind, image in made.items()} == {
        "overlay": "RGB", "trainids": "L", "labelids": "L", "colours": "RGB"}  # fmt: skip
    found = {kind: np.asarray(image) for kind, image in made.items()}
    assert np.array_equal(id_map("labelids").to_train[found["labelids"]], found["trainids"])
    assert np.array_equal(found["colours"], CITYSCAPES.palette[found["trainids"]])
    assert cli.main([*words, "cityscape"]) == 2
    assert "Unknown data set 'cityscape' of --labels (nearest: cityscapes" in read_error(capsys)
    assert cli.main(["predict", str(trained), picture, "--out", "x", "-o", "inference.flip=true", "b.png"]) == 2
    assert "Option 'b.png' is not KEY=VALUE" in read_error(capsys)


def test_output_names_never_meet():
    paths = [Path(name) for name in ("x/A.png", "y/a.png", "z/y/a.png", "z/y/a.jpg", "q/y/a.jpg")]
    names = predict.output_names(paths)
    assert names[:3] == ["A", "y_a", "y_a_png"]
    assert len({name.lower() for name in names}) == len(paths)


def test_check_describes_what_is_there(capsys, tmp_path):
    domain = f"folder@{make_domain(tmp_path / 'domain')}"
    unlabelled = f"folder@{make_domain(tmp_path / 'unlabelled', labels=False)}"
    rows = tmp_path / "rows.json"
    assert cli.main(["check", domain, unlabelled, "--profile", "paper"]) == 0
    output = capsys.readouterr().out
    assert f"{domain}: 2 pairs; sizes: 64 x 48 (2)" in output and "road" not in output  # nothing is decoded
    assert cli.main(["check", domain, unlabelled, "--profile", "paper", "--deep", "--json", str(rows)]) == 0
    output = capsys.readouterr().out
    assert f"{domain}: 2 pairs; sizes: 64 x 48 (2)" in output
    assert any(line.split()[:3] == ["road", "50.0", "%"] and "#" * 20 in line for line in output.splitlines())
    assert f"{unlabelled}: 2 pictures without labels" in output
    found, bare = json.loads(rows.read_text())
    assert list(found) == ["domain", "split", "pairs", "class_pixels", "problems", "ignored_pixels", "notes"]
    assert found["class_pixels"]["road"] == found["class_pixels"]["sky"] == 2 * 24 * 64 and found["pairs"] == 2
    assert (bare["domain"], bare["problems"]) == (unlabelled, [])


def test_check_finds_pictures_that_two_domains_share(capsys, tmp_path):
    source, target = make_domain(tmp_path / "source"), make_domain(tmp_path / "target")
    (target / "images" / "p1.png").write_bytes((source / "images" / "p0.png").read_bytes())
    assert cli.main(["check", f"folder@{source}", f"folder@{target}"]) == 1
    captured = capsys.readouterr()
    assert "p1.png of 'folder@" in captured.out and "is the same picture as" in captured.err
    assert str(source / "images" / "p0.png") in captured.err


def test_prepare_passes_over_a_damaged_label_in_colours(capsys, tmp_path):
    pictures, labels = tmp_path / "set" / "701_StillsRaw_full", tmp_path / "set" / "LabeledApproved_full"
    for folder, ending in ((pictures, ""), (labels, "_L")):
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (40, 30), (128, 64, 128)).save(folder / f"{name}{ending}.png")
    (labels / "b_L.png").write_bytes((labels / "b_L.png").read_bytes()[:-30])
    command = ["prepare", f"camvid@{tmp_path / 'set'}", "--out", str(tmp_path / "out"), "--short-edge", "12"]
    assert cli.main(command) == 2 and "b_L.png cannot be decoded" in capsys.readouterr().err
    assert cli.main([*command, "-o", "data.on_error=skip"]) == 0
    assert [path.name for path in (tmp_path / "out").rglob("*_L.png")] == ["a_L.png"]


def test_prepare_writes_a_resized_copy_once(capsys, tmp_path):
    domain, out = make_domain(tmp_path / "domain"), tmp_path / "small"
    command = ["prepare", f"folder@{domain}", "--out", str(out), "--short-edge", "12"]
    assert cli.main(command) == 0
    assert f"use it as folder@{out}" in capsys.readouterr().out
    (out / "labels" / "p1.png").unlink()  # cut short: goes on
    untouched = (out / "images" / "p0.png").stat().st_mtime_ns
    assert cli.main(command) == 0 and (out / "images" / "p0.png").stat().st_mtime_ns == untouched
    for index in range(2):
        label = np.asarray(Image.open(out / "labels" / f"p{index}.png"))
        assert label.shape == (12, 16) and (label[:6] == 10).all() and (label[6:] == 0).all()
        assert Image.open(out / "images" / f"p{index}.png").size == (16, 12)
    assert cli.main(["check", f"folder@{out}", "--deep"]) == 0
    assert cli.main([*command[:-1], "24"]) == 2
    assert "is not empty and no copy of" in read_error(capsys)
    assert cli.main(["prepare", "scenes:night", "--out", str(tmp_path / "x"), "--short-edge", "9"]) == 2
    assert "has no folder of files" in read_error(capsys)


def cut_picture(domain: Path) -> str:
    path = domain / "images" / "p1.png"
    path.write_bytes(path.read_bytes()[:300])
    return "p1"


def drop_label(domain: Path) -> str:
    (domain / "labels" / "p1.png").unlink()
    return "image 'p1' has no label"


def shrink_label(domain: Path) -> str:
    Image.new("L", (32, 48)).save(domain / "labels" / "p0.png")
    return "64 x 48 but its label is 32 x 48"


def spoil_ids(domain: Path) -> str:
    Image.new("L", (64, 48), 77).save(domain / "labels" / "p0.png")
    return "unknown ids [77]"


def drop_all(domain: Path) -> str:
    for path in (domain / "images").iterdir():
        path.unlink()
    return "is empty"


@pytest.mark.parametrize("spoil", [cut_picture, drop_label, shrink_label, spoil_ids, drop_all])
def test_check_looks_at_all_domains_and_names_what_is_unusable(spoil, capsys, tmp_path):
    good, bad = make_domain(tmp_path / "good"), make_domain(tmp_path / "bad")
    words = spoil(bad)
    assert cli.main(["check", f"folder@{bad}", f"folder@{good}", "--deep"]) == 1
    captured = capsys.readouterr()
    assert f"folder@{good}: 2 pairs" in captured.out
    assert words in captured.out and "problem: " in captured.out
    error = captured.err.rpartition("error: ")[2]
    assert words in error and f"'folder@{bad}' cannot be used" in error and str(good) not in error


def test_backbones_lists_every_preset(capsys: pytest.CaptureFixture):
    from setlib.weights.presets import PRESETS

    assert cli.main(["backbones"]) == 0
    head, *rows, advice = capsys.readouterr().out.splitlines()
    assert head.split() == ["backbone", "M", "parameters", "patch", "layers", "here", "licence", "from"]
    assert [row.split()[0] for row in rows] == list(PRESETS)
    large = next(row.split() for row in rows if row.startswith("dinov2-large"))
    assert large[:4] == ["dinov2-large", "304.37", "14", "24"] and large[-1] == "facebook/dinov2-large"
    assert "-o model.backbone=NAME" in advice


@pytest.mark.parametrize("refiner", ["full", "lora", "vpt", "adaptformer", "fada"])
def test_every_baseline_is_trained_scored_and_predicts(refiner: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    if refiner == "lora":
        pytest.importorskip("peft")
    domain = f"folder@{make_domain(tmp_path / 'domain')}"
    options = ["--profile", "smoke", "--run", str(tmp_path / "run"), "--source", domain, "--target", domain, *TINY]
    assert cli.main(["train", *options, f"model.refiner={refiner}"]) == 0
    trained = capsys.readouterr().out
    assert "(backbone) +" in trained and "(refiner) +" in trained and "(head)" in trained
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    picture = str(tmp_path / "domain" / "images" / "p0.png")
    assert cli.main(["predict", str(tmp_path / "run"), picture, "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_inference_is_free_when_a_trained_model_is_scored(trained, capsys):
    domain = json.loads((trained / "experiment.json").read_text())["data"]["source"]
    words = ["evaluate", str(trained), "--target", domain, "-o"]
    found = []
    for options in (
        ["inference.flip=true", "inference.scales=1,2"],
        ["inference.whole=true"],
        ["data.eval_edges=folder=16"],
    ):
        assert cli.main([*words, *options]) == 0
        found.append(json.loads((trained / "metrics.json").read_text())["results"][0])
    assert len({tuple(result["per_class"].items()) for result in found}) > 1
    for name in ("folder", "foldr"):
        assert cli.main([*words, f"data.eval_edges={name}=16,folder=20"]) == 2
        assert ("names folder more than once" if name == "folder" else "nearest: folder") in capsys.readouterr().err
    assert cli.main(["predict", str(trained), "x.png", "--out", str(trained / "out"), "-o", "data.height=5"]) == 2
    assert "settled by training" in capsys.readouterr().err
    assert cli.main([*words, "model.rank=2"]) == 2
    assert "settled by training: only data.eval_images" in capsys.readouterr().err
    (trained / "metrics.json").unlink()
