"""Domains: names, splits, class sets, EXIF, and one clear sentence for everything that can be wrong with a folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from setlib.data import check, domains, prepare
from setlib.data.labels import CAMVID, CITYSCAPES, id_map
from setlib.experiment import Data


@pytest.fixture
def root(tmp_path):
    """Four labelled CamVid-like pictures, 24 x 32, in two splits."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(tmp_path / f"images/ä {i}.jpg")
        Image.fromarray(rng.integers(0, 12, (24, 32), np.uint8)).save(tmp_path / f"labels/ä {i}.png")
    splits = {"splits": {"day": ["ä 0", "ä 1", "ä 2"], "dusk": ["ä 3"]}}
    (tmp_path / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    return tmp_path


def test_labels_come_back_id_by_id(root):
    domain = domains.load(f"camvid:day@{root}", Data())
    for i in range(len(domain)):
        sample = domain.sample(i)
        written = np.asarray(Image.open(root / f"labels/{sample.name}.png"))
        assert np.array_equal(sample.label, written) and sample.image.shape == (24, 32, 3)
        assert np.array_equal(domain.to_score(sample.label), np.where(written == 11, 255, written))
    row = domain.dataset[0]
    assert row["name"] == "ä 0" and row["domain"] == f"camvid:day@{root}"


def test_split_limit_and_whole_set(root):
    assert len(domains.load(f"camvid:dusk@{root}", Data())) == 1
    assert len(domains.load(f"camvid@{root}", Data())) == 4
    limited = domains.load(f"camvid@{root}", Data(eval_images=2, train_images=3))
    assert [limited.sample(i).name for i in range(2)] == ["ä 0", "ä 3"]
    assert len(domains.load(f"camvid@{root}", Data(train_images=3), role="source")) == 3


def test_camvid_ids_mean_the_right_train_classes():
    ids = id_map("camvid")
    for raw, name in {3: "road", 4: "sidewalk", 5: "vegetation", 8: "car", 9: "person", 10: "rider"}.items():
        assert CITYSCAPES.classes[ids.to_train[raw]] == name
        assert CAMVID.places[ids.to_train[raw]] == ids.to_score[raw]  # trained and scored as the same class
    assert ids.to_train[11] == ids.to_score[11] == 255


def test_probabilities_are_merged_into_a_class_set():
    probabilities = torch.rand(19, 2, 3)
    merged = CAMVID.merge(probabilities)
    assert merged.shape == (11, 2, 3)
    torch.testing.assert_close(merged.sum(0), probabilities.sum(0))
    cars = [CITYSCAPES.classes.index(name) for name in ("car", "truck", "bus", "train")]
    torch.testing.assert_close(merged[CAMVID.classes.index("Car")], probabilities[cars].sum(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("camvit@x", "Unknown domain 'camvit' .* .nearest: camvid"),
        ("scenes:nite", "Unknown style 'nite' .* .nearest: night"),
        ("hub", "needs a data set of the hub: write hub:owner/name"),
        ("camvid:day", "needs its folder: write camvid:day@FOLDER"),
        ("folder@/no/such", "folder /no/such does not exist"),
        ("camvid:dask@{root}", "Unknown split 'dask' .* .nearest: "),
        ("folder@{root}/images", "images is the wrong level of the tree: give "),
        ("folder@{root}/labels/deep/er/still", "expected pictures in .*images/.name..*, but there is no such folder"),
        ("folder@{root}/empty", "is empty: no picture in"),
    ],
)
def test_bad_names_are_one_sentence(root, text, message):
    for folder in ("labels/deep/er/still", "empty/images"):
        (root / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        domains.load(text.format(root=root), Data())


@pytest.mark.parametrize("splits", ["[]", '{"splits": {"day": 5}}', '{"splits": ["day"]}', '{"splits": null}'])
def test_splits_of_another_form_are_one_sentence(root, splits):
    (root / "splits.json").write_text(splits)
    with pytest.raises(ValueError, match="splits.json cannot be read: expected"):
        domains.load(f"camvid:day@{root}", Data())


def drop_label(root):
    (root / "labels/ä 1.png").unlink()
    return "image 'ä 1' has no label: expected"


def shrink_label(root):
    Image.new("L", (32, 23)).save(root / "labels/ä 1.png")
    return "'ä 1' is 32 x 24 but its label is 32 x 23"


def cut_label(root):
    (root / "labels/ä 1.png").write_bytes((root / "labels/ä 1.png").read_bytes()[:-90])
    return "labels/ä 1.png cannot be"


def cut_picture(root):
    (root / "images/ä 1.jpg").write_bytes((root / "images/ä 1.jpg").read_bytes()[:900])
    return "'ä 1' cannot be decoded"


def spoil_ids(root):
    Image.fromarray(np.pad(np.array([[19, 20]], np.uint8), ((0, 23), (0, 30)))).save(root / "labels/ä 1.png")
    return r"label of 'ä 1' holds the unknown ids \[19, 20\] .2 pixels.: expected"


def double_name(root):
    Image.new("RGB", (32, 24)).save(root / "images/ä 1.png")
    return "'ä 1.png' and 'ä 1.jpg' share one name: rename one"


@pytest.mark.parametrize("spoil", [drop_label, shrink_label, cut_label, cut_picture, spoil_ids, double_name])
def test_what_is_wrong_is_named_when_it_is_used_and_by_check(root, spoil):
    message = spoil(root)
    with pytest.raises(ValueError, match=message):
        domain = domains.load(f"camvid@{root}", Data())
        [domain.sample(i) for i in range(4)]
    (found,) = check.check(f"camvid@{root}", Data())
    with pytest.raises(ValueError, match=message):
        raise ValueError(found.problems[0])


def test_what_cannot_be_opened_is_passed_over_on_request(root, capsys):
    skip = Data(on_error="skip")
    (root / "images/ä 1.jpg").write_bytes(b"")
    assert len(domains.load(f"camvid@{root}", skip)) == 3
    assert "cannot be opened as a picture" in capsys.readouterr().out
    for path in (root / "labels").iterdir():
        path.write_bytes(b"nothing")
    for role in ("source", "target"):
        with pytest.raises(ValueError, match="none of its pictures can be used"):
            domains.load(f"camvid@{root}", skip, role=role)
    shutil.rmtree(root / "labels")
    domain = domains.load(f"camvid@{root}", skip)
    assert not domain.has_labels and domain.sample(0).label is None and domain.to_score(None) is None


@pytest.mark.parametrize("mode", ["1", "I;16"])
def test_one_and_sixteen_bit_labels_are_read(root, mode):
    Image.fromarray(np.eye(24, 32, dtype=np.uint16 if mode == "I;16" else bool)).save(root / "labels/ä 0.png")
    label = domains.load(f"camvid@{root}", Data()).sample(0).label
    assert label.dtype == np.uint8 and np.array_equal(label, np.eye(24, 32))


def test_a_picture_too_large_for_pillow_is_a_problem(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "more than 268 million pixels: cut or shrink it" in check.check(f"camvid@{root}", Data())[0].problems[0]


@pytest.mark.parametrize("alone", [200, 2])
def test_check_counts_pixels_and_sizes_also_in_several_processes(root, alone, monkeypatch):
    monkeypatch.setattr(check, "ALONE", alone)
    found = check.check(f"camvid@{root}", Data())[0]
    assert found.pairs == 4 and found.sizes == {(32, 24): 4} and not found.problems
    labels = np.stack([np.asarray(Image.open(p)) for p in (root / "labels").iterdir()])
    assert found.class_pixels == {name: int((labels == i).sum()) for i, name in enumerate(CAMVID.classes)}
    assert found.ignored_pixels == (labels == 11).sum()


def test_scenes_source_and_targets_are_different_streets():
    data = Data(height=32, width=64, train_images=2, eval_images=2)
    night, fog = (domains.load(f"scenes:{style}", data) for style in ("night", "fog"))
    source = domains.load("scenes:game", data, role="source")
    assert np.array_equal(night.sample(1).label, fog.sample(1).label)
    assert not np.array_equal(night.sample(1).image, fog.sample(1).image)
    assert not np.array_equal(night.sample(0).label, source.sample(0).label)
    assert night.class_set is CITYSCAPES and len(source) == 2


def test_labels_that_are_ignored_as_a_whole_teach_nothing(root):
    for path in (root / "labels").iterdir():
        Image.new("L", (32, 24), 255).save(path)
    with pytest.raises(ValueError, match="teaches nothing: every pixel of its labels is ignored"):
        domains.load(f"camvid@{root}", Data(), "source")
    for deep in (True, False):
        assert "is ignored as a whole" in check.check(f"camvid@{root}", Data(), deep=deep)[0].problems[0]
    Image.new("L", (32, 24), 3).save(root / "labels/ä 3.png")
    assert len(domains.load(f"camvid@{root}", Data(), "source")) == 4
    found = check.check(f"camvid@{root}", Data())[0]
    assert not found.problems and found.ignored_pixels == 3 * found.class_pixels["Road"] == 3 * 32 * 24


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("size", [(32, 24), (32, 32)])  # (w, h) as stored
@pytest.mark.parametrize("rule", ["shown", "stored"])
def test_a_label_is_turned_with_its_picture_where_sizes_prove_it_or_on_request(
    tmp_path, orientation, size, rule, capsys
):
    rng, exif = np.random.default_rng(orientation), Image.Exif()
    exif[0x0112] = orientation
    drawn = Image.fromarray(rng.integers(0, 19, size[::-1], np.uint8))
    for kind in ("images", "labels"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    Image.fromarray(np.repeat(np.asarray(drawn)[..., None] * 12, 3, 2)).save(tmp_path / "set/images/a.png", exif=exif)
    drawn.save(tmp_path / "set/labels/a.png")
    proven, text, data = orientation > 4 and size[0] != size[1], f"folder@{tmp_path / 'set'}", Data(exif_labels=rule)
    sample, found = domains.load(text, data).sample(0), check.check(text, data)[0]
    assert np.array_equal(sample.label * 12, sample.image[..., 0]) == (proven or rule == "stored")
    assert not found.problems and any("turned by EXIF" in note for note in found.notes) != proven
    assert ("turned by EXIF" in capsys.readouterr().out) != proven
    prepare.prepare(text, tmp_path / "copy", 99, data)
    copy = domains.load(f"folder@{tmp_path / 'copy'}", Data()).sample(0)
    assert np.array_equal(copy.label, sample.label) and np.array_equal(copy.image, sample.image)


def test_a_label_of_the_shown_size_fits_a_turned_picture(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (24, 32), "red").save(root / "images/ä 0.jpg", exif=exif)
    Image.new("RGB", (24, 32), "red").save(root / "images/ä 1.png", exif=exif)
    (root / "images/ä 1.jpg").unlink()
    domain, (found,) = domains.load(f"camvid@{root}", Data()), check.check(f"camvid@{root}", Data())
    for i in range(2):
        sample = domain.sample(i)
        assert sample.image.shape == (24, 32, 3)
        assert np.array_equal(sample.label, np.asarray(Image.open(root / f"labels/ä {i}.png")))
    assert found.sizes == {(32, 24): 4} and not found.problems


def test_a_folder_with_a_tilde_in_its_name_is_no_corruption(root):
    for name in ("walk~noise3", "a~b"):
        shutil.copytree(root, root.parent / name, dirs_exist_ok=True)
    assert domains.parse(f"folder@{root.parent}/walk~noise3").corruption == ""
    assert len(domains.load(f"camvid@{root.parent}/walk~noise3", Data())) == 4
    spec = domains.parse(f"camvid:day@{root.parent}/a~b~noise2")
    assert (spec.folder, spec.corruption, spec.severity) == (f"{root.parent}/a~b", "noise", 2)
    assert domains.parse(f"camvid@{root.parent}/walk~noise3~fog").corruption == "fog"


@pytest.mark.parametrize(
    ("domain", "short"),
    [("scenes:night", "scenes:night"), ("camvid:dusk@/x/y", "camvid:dusk"), ("folder@a/photos", "folder:photos")],
)
def test_short_name(domain, short):
    assert domains.short_name(domain) == short
