"""Scoring: counts, absent classes, ignored pixels, merged classes, credit to the right domain, tables and words."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from setlib import evaluation as evaluate
from setlib._memory import label_map
from setlib.analysis import scores as shown
from setlib.checkpoint import build_segmenter
from setlib.data import domains
from setlib.data.labels import CAMVID, CITYSCAPES
from setlib.experiment import Data, Experiment
from setlib.inference import predict
from setlib.metric import MeanIoU
from setlib.run import Run
from setlib.weights.load import load_backbone


def test_equals_an_independent_computation_and_adds_up_over_batches():
    rng, metric = np.random.default_rng(0), MeanIoU(5)
    prediction, reference = rng.integers(0, 5, (6, 20, 30)), rng.integers(0, 6, (6, 20, 30))
    reference = np.where(reference == 5, 255, reference).astype(np.uint8)
    metric.add_batch(predictions=prediction[:4], references=reference[:4])
    metric.add(prediction=prediction[4], reference=reference[4])
    result = metric.compute(predictions=prediction[5:], references=reference[5:])
    for k in range(5):
        p, r = (prediction == k) & (reference != 255), reference == k
        assert result["iou"][k] == pytest.approx(100 * (p & r).sum() / (p | r).sum())
    assert result["miou"] == pytest.approx(result["iou"].mean())
    with pytest.raises(ValueError, match=r"Prediction \(20, 30\) and label \(20, 29\) differ in size"):
        metric.add(prediction=prediction[0], reference=reference[0, :, 1:])


def test_absent_classes_have_no_iou_and_ignored_pictures_no_mean():
    metric = MeanIoU(3)
    metric.add(prediction=np.zeros((2, 2), np.uint8), reference=np.full((2, 2), 255, np.uint8))
    assert np.isnan(metric.compute()["miou"])
    metric.add(prediction=np.array([[0, 1]]), reference=np.array([[0, 0]]))
    result = metric.compute()
    np.testing.assert_array_equal(result["iou"], [50, 0, np.nan])
    assert result["miou"] == 25


def test_classes_are_merged_by_summed_probabilities():
    probabilities = torch.zeros(19, 1, 1)
    train, car, building = (CITYSCAPES.classes.index(name) for name in ("train", "car", "building"))
    probabilities[[train, car, building], 0, 0] = torch.tensor([0.3, 0.3, 0.4])
    merged = CAMVID.merge(probabilities)
    assert CAMVID.classes[label_map(merged, (1, 1))[0, 0]] == "Car"
    assert merged.shape == (11, 1, 1) and merged.sum() == pytest.approx(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five labelled pictures with train ids, five CamVid frames, 64 x 128, and a picture without labels."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, ids in (("train", 19), ("camvid", 12)):
        for kind in ("images", "labels"):
            (root / name / kind).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (64, 128, 3), np.uint8)).save(root / name / f"images/{i}.png")
            Image.fromarray(rng.integers(0, ids, (64, 128), np.uint8)).save(root / name / f"labels/{i}.png")
    (root / "bare" / "images").mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(root / "bare" / "images" / "a.png")
    return root


@pytest.fixture(scope="module")
def model():
    return build_segmenter(Experiment.build("smoke")).eval()


def test_every_domain_is_scored_in_its_own_classes(folder, model, tmp_path):
    """And one without labels is left out."""
    run = Run.open(tmp_path, Experiment.build("smoke"))
    names = [f"folder@{folder}/train", f"folder@{folder}/bare", f"camvid@{folder}/camvid"]
    scores = evaluate.evaluate_run(run, {"set": model}, names)["set"]
    assert [score.class_set.name for score in scores] == ["cityscapes-19", "camvid-11"]
    shown.write_metrics(run, scores)
    metrics = run.read_json("metrics.json")
    assert [result["domain"] for result in metrics["results"]] == [names[0], names[2]]
    assert metrics["results"][0]["pixels"] == 4 * 64 * 128  # data.eval_images = 4 of the five
    assert set(metrics["results"][1]["per_class"]) == set(CAMVID.classes)
    shown.write_metrics(run, scores[1:])
    assert run.read_json("metrics.json")["results"] == metrics["results"]  # what was scored before is kept
    assert run.read_json("metrics.json")["config"] == run.experiment.to_dict()
    with pytest.raises(ValueError, match="has no labels: it can be predicted and looked at, not scored"):
        evaluate.evaluate({"set": model}, domains.load(names[1], Data()))


def test_scores_are_those_of_predict(folder, model):
    domain, metric = domains.load(f"folder@{folder}/train", Data(eval_images=3)), MeanIoU(19)
    score = evaluate.evaluate({"a": model}, domain, progress=False)["a"]
    for sample in map(domain.sample, range(3)):
        metric.add(prediction=predict(model, sample.image), reference=sample.label)
    assert np.array_equal(score.counts, metric.counts) and score.miou == metric.compute()["miou"]
    assert [(place, name) for place, name, *_ in score.pictures] == [(0, "0"), (1, "2"), (2, "4")]


def test_models_are_scored_together_as_alone(folder):
    """Also beside one whose own backbone is changed, from the first layer or a later one."""
    backbone, models = load_backbone("tiny-random"), {}
    for name in ("lora", "none", "set", "full"):
        experiment = Experiment.build("smoke", overrides=[f"model.refiner={name}"])
        models[name] = build_segmenter(experiment, backbone).eval()
        generator = torch.Generator().manual_seed(0)
        for key, p in models[name].named_parameters():
            if p.requires_grad and not key.startswith("head."):
                p.data += 0.3 * torch.randn(p.shape, generator=generator)
    domain = domains.load(f"folder@{folder}/train", Data(eval_images=2))
    together = evaluate.evaluate(models, domain, progress=False)
    for name, model in models.items():
        alone = evaluate.evaluate({name: model}, domain, progress=False)[name]
        assert np.abs(together[name].counts - alone.counts).sum() <= 20, name  # of 16,384 pixels: rounding
    assert np.abs(together["lora"].counts - together["none"].counts).sum() > 200


def test_a_damaged_picture_stops_the_scoring_or_is_passed_over_and_said(folder, model, tmp_path, capsys):
    shutil.copytree(folder / "train", tmp_path / "set")
    damaged = tmp_path / "set" / "images" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:-9000])  # the header is whole
    stopping, passing = (domains.load(f"folder@{tmp_path}/set", Data(on_error=do)) for do in ("stop", "skip"))
    with pytest.raises(ValueError, match="'1.*' cannot be decoded"):
        evaluate.evaluate({"a": model}, stopping, progress=False)
    found = evaluate.evaluate({"a": model}, passing, progress=False)["a"]
    assert [place for place, *_ in found.pictures] == [0, 2, 3, 4]
    assert re.search("'1.*' cannot be decoded.*Passed over", capsys.readouterr().out)


# Tables and words


def score(domain, hit, classes=CITYSCAPES):
    """One with `hit` right pixels of every class for one of each kind of mistake."""
    size = len(classes)
    return evaluate.Score(domain, classes, np.diag([hit] * size) + np.ones((size, size), np.int64))


def test_the_table_and_its_words():
    table = {"none": [score("s", 50), score("t", 20)], "set": [score("s", 40), score("t", 30)]}
    rows = shown.results(table, "s").set_index(["model", "domain"])
    assert rows.unseen.to_dict() == {(m, d): d == "t" for m in table for d in "st"}
    drop = table["none"][0].miou - table["none"][1].miou
    assert rows["drop"]["none", "t"] == pytest.approx(drop) and rows["drop"]["none", "s"] == 0
    summary = shown.score_summary(table, "s")
    assert [row["domain"] for row in summary] == ["s (source)", "t"] and summary[1]["drop none"] == pytest.approx(drop)
    assert summary[1]["set"] == table["set"][1].miou
    text = shown.say_scores(table, "s")
    assert "hardest for set is t" in text and "points below its own source" in text


def test_class_sets_are_never_averaged_or_compared():
    scores = [score("s", 50, CAMVID), score("t", 20, CAMVID), score("u", 30, CAMVID), score("v", 5)]
    means = shown.target_means({"set": scores}, "s")
    assert list(means) == ["camvid-11", "cityscapes-19"]
    assert means["camvid-11"]["set"] == pytest.approx((scores[1].miou + scores[2].miou) / 2)
    assert means["cityscapes-19"]["set"] == pytest.approx(scores[3].miou)
    assert shown.hardest(scores, "s").domain == "t"  # not v, which is scored in other classes
    assert np.isnan(shown.score_summary({"set": scores}, "s")[3]["drop set"])
    text = shown.say_scores({"set": scores}, "s")
    assert "in camvid-11: set" in text and f"in cityscapes-19: set {scores[3].miou:.1f}" in text
    assert [len(found["set"]) for _, found in shown.class_means({"set": scores}, "s")] == [11, 19]


@pytest.mark.parametrize("order", ["sie", "sei", "eis"])
def test_a_domain_without_a_labelled_pixel_is_out_of_everything_and_said_once(order):
    empty = evaluate.Score("i", CITYSCAPES, np.zeros((19, 19), np.int64))
    found = {"s": score("s", 50), "i": empty, "e": score("e", 9)}
    scores = [found[name] for name in order]
    assert shown.target_means({"set": scores}, "s") == {"cityscapes-19": {"set": found["e"].miou}}
    assert shown.hardest(scores, "s").domain == "e"
    ((_, means),) = shown.class_means({"set": scores}, "s")
    assert np.array_equal(means["set"], found["e"].iou)
    text = shown.say_scores({"none": scores, "set": scores}, "s")
    assert text.count("no pixel of it is labelled: i.") == 1 and "nan" not in text and "hardest for none is e" in text
    for few in (scores[:2], [empty], [found["s"]]):
        assert "nan" not in (text := shown.say_scores({"set": few}, "s"))
    assert "No domain but the source was scored" in text and shown.target_means({"set": few}, "s") == {}


def test_the_best_and_the_worst_pictures():
    none = np.zeros((3, 19))
    pictures = [
        evaluate.PictureScore(i, str(i), miou, none) for i, miou in enumerate((30.0, float("nan"), 50.0, 10.0, 40.0))
    ]
    found = evaluate.Score("s", CITYSCAPES, pictures=pictures)
    assert [place for place, *_ in shown.extremes(found, 1)] == [2, 3]
    assert [place for place, *_ in shown.extremes(found, 3)] == [2, 4, 0, 3]  # four have an mIoU
