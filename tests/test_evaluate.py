"""The metric: counts, absent classes, ignored pixels, merged classes, credit to the right domain."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from setlib.model import Segmenter
from setlib.windows import label_map

from setlib import evaluate
from setlib.analysis import survey
from setlib.data import domains
from setlib.data.labels import CAMVID, CITYSCAPES
from setlib.evaluate import MeanIoU
from setlib.experiment import Data, Experiment
from setlib.run import Run


def naive_iou(prediction, reference, classes):
    values = []
    for k in range(classes):
        p, r = (prediction == k) & (reference != 255), reference == k
        values.append(100 * (p & r).sum() / (p | r).sum() if (p | r).sum() else np.nan)
    return np.array(values)


def test_equals_an_independent_computation_and_adds_up_over_batches():
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 5, (6, 20, 30)), rng.integers(0, 6, (6, 20, 30))
    reference = np.where(reference == 5, 255, reference).astype(np.uint8)
    metric = MeanIoU(5)
    metric.add_batch(predictions=prediction[:4], references=reference[:4])
    metric.add(prediction=prediction[4], reference=reference[4])
    result = metric.compute(predictions=prediction[5:], references=reference[5:])
    expected = naive_iou(prediction, reference, 5)
    np.testing.assert_allclose(result["iou"], expected, atol=1e-9)
    assert result["miou"] == pytest.approx(expected.mean(), abs=1e-9)


def test_absent_classes_have_no_iou_and_ignored_pictures_no_mean():
    metric = MeanIoU(3)
    metric.add(prediction=np.zeros((2, 2), np.uint8), reference=np.full((2, 2), 255, np.uint8))
    assert np.isnan(metric.compute()["miou"])
    metric.add(prediction=np.array([[0, 1]]), reference=np.array([[0, 0]]))
    result = metric.compute()
    assert result["iou"][:2].tolist() == [50, 0] and np.isnan(result["iou"][2])
    assert result["miou"] == 25


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="differ in size"):
        MeanIoU(3).add(prediction=np.zeros((2, 2), np.uint8), reference=np.zeros((2, 3), np.uint8))


def test_classes_are_merged_by_summed_probabilities():
    probabilities = torch.zeros(19, 1, 1)
    train, car, building = (CITYSCAPES.classes.index(name) for name in ("train", "car", "building"))
    probabilities[[train, car, building], 0, 0] = torch.tensor([0.3, 0.3, 0.4])
    merged = torch.einsum("khw,kc->chw", probabilities, torch.from_numpy(CAMVID.merge_matrix()))
    assert CAMVID.classes[label_map(merged, (1, 1))[0, 0]] == "Car"
    assert merged.sum() == pytest.approx(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five labelled pictures with train ids and five CamVid frames, 64 x 128."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, ids in (("train", 19), ("camvid", 12)):
        for kind in ("images", "labels"):
            (root / name / kind).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (64, 128, 3), np.uint8)).save(root / name / f"images/{i}.png")
            Image.fromarray(rng.integers(0, ids, (64, 128), np.uint8)).save(root / name / f"labels/{i}.png")
    return root


@pytest.fixture(scope="module")
def model():
    return Segmenter(Experiment.build("smoke")).eval()


def test_every_domain_is_scored_in_its_own_classes(folder, model, tmp_path):
    run = Run.open(tmp_path, Experiment.build("smoke"))
    names = [f"folder@{folder}/train", f"camvid@{folder}/camvid"]
    scores = evaluate.evaluate_run(run, {"set": model}, names, progress=False)["set"]
    assert [score.class_set.name for score in scores] == ["cityscapes-19", "camvid-11"]
    metrics = evaluate.write_metrics(run, scores)
    assert [result["domain"] for result in metrics["results"]] == names
    assert metrics["results"][0]["pixels"] == 4 * 64 * 128  # data.eval_images = 4 of the five
    assert set(metrics["results"][1]["per_class"]) == set(CAMVID.classes)
    again = evaluate.write_metrics(run, scores[1:])
    assert [result["domain"] for result in again["results"]] == names


def test_scores_are_those_of_predict(folder, model):
    domain = domains.load(f"folder@{folder}/train", Data(eval_images=3))
    score = evaluate.evaluate_models({"a": model}, domain, progress=False)["a"]
    counts = np.zeros((19, 19), np.int64)
    for i in range(3):
        sample = domain.sample(i)
        metric = MeanIoU(19)
        metric.add(prediction=model.predict(sample.image), reference=sample.label)
        counts += metric.counts
    assert np.array_equal(score.counts, counts)


def test_models_are_scored_together_as_alone(folder):
    """Also beside one whose own backbone is changed, from the first layer or a later one."""
    models = {}
    for name in ("lora", "none", "set", "full"):
        models[name] = Segmenter(Experiment.build("smoke", overrides=[f"model.refiner={name}"])).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, p in models[name].named_parameters():
                if p.requires_grad and not key.startswith("head."):
                    p.add_(0.3 * torch.randn(p.shape, generator=generator))
    domain = domains.load(f"folder@{folder}/train", Data(eval_images=2))
    together = evaluate.evaluate_models(models, domain, progress=False)
    for name, model in models.items():
        alone = evaluate.evaluate_models({name: model}, domain, progress=False)[name]
        assert np.abs(together[name].counts - alone.counts).sum() <= 20, name  # of 16,384 pixels: rounding
    assert np.abs(together["lora"].counts - together["none"].counts).sum() > 200


def test_a_damaged_picture_stops_the_scoring_or_is_passed_over_and_said(folder, model, tmp_path, capsys):
    shutil.copytree(folder / "train", tmp_path / "set")
    damaged = tmp_path / "set" / "images" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:-9000])  # the header is whole
    text = f"folder@{tmp_path}/set"
    domain = domains.load(text, Data())
    with pytest.raises(ValueError, match="'1.*' cannot be decoded"):
        evaluate.evaluate_models({"a": model}, domain, progress=False)
    with pytest.raises(ValueError, match="'1.*' cannot be decoded"):
        survey.survey(domain, CITYSCAPES)
    domain = domains.load(text, Data(on_error="skip"))
    found = evaluate.evaluate_models({"a": model}, domain, progress=False)["a"]
    assert [place for place, _, _ in found.pictures] == [0, 2, 3, 4]
    assert survey.survey(domain, CITYSCAPES).brightness > 0
    assert len(survey.examples(domain, (0, 1, 2), CITYSCAPES)) == 4
    out = capsys.readouterr().out
    assert out.count("cannot be decoded") == 1 and "Passed over" in out


def test_a_domain_without_labels_is_not_scored(tmp_path, model):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png")
    domain = domains.load(f"folder@{tmp_path}", Data())
    with pytest.raises(ValueError, match="has no labels"):
        evaluate.evaluate_models({"a": model}, domain)


def score(domain, hit, classes=CITYSCAPES):
    """One with `hit` right pixels of every class for one of each kind of mistake."""
    size = len(classes)
    return evaluate.Score(domain, classes, np.diag([hit] * size) + np.ones((size, size), np.int64))


def test_verdict_names_the_hardest_domain():
    table = {"none": [score("s", 50), score("t", 20)], "set": [score("s", 40), score("t", 30)]}
    assert "hardest for set is t" in (text := evaluate.verdict(table, "s")) and "points below its own source" in text
    assert evaluate.summary(table, "s")[1]["drop none"] == pytest.approx(table["none"][0].miou - table["none"][1].miou)


def test_class_sets_are_never_averaged_or_compared():
    scores = [score("s", 50, CAMVID), score("t", 20, CAMVID), score("u", 30, CAMVID), score("v", 5)]
    means = evaluate.target_means(scores, "s")
    assert means == pytest.approx({"camvid-11": (scores[1].miou + scores[2].miou) / 2, "cityscapes-19": scores[3].miou})
    assert evaluate.hardest(scores, "s").domain == "t"  # not v, which is scored in other classes
    assert np.isnan(evaluate.summary({"set": scores}, "s")[3]["drop set"])
    text = evaluate.verdict({"set": scores}, "s")
    assert "in camvid-11: set" in text and f"in cityscapes-19: set {scores[3].miou:.1f}" in text
    assert [len(found["set"]) for _, found in evaluate.class_means({"set": scores}, "s")] == [11, 19]


def test_the_source_alone_is_said_to_be_all():
    text = evaluate.verdict({"set": [score("s", 50)]}, "s")
    assert "No domain but the source was scored" in text and "nan" not in text
    assert evaluate.target_means([score("s", 50)], "s") == {}


@pytest.mark.parametrize("order", ["sie", "sei", "eis"])
def test_a_domain_without_a_labelled_pixel_is_out_of_everything_and_said_once(order):
    found = {
        "s": score("s", 50),
        "i": evaluate.Score("i", CITYSCAPES, np.zeros((19, 19), np.int64)),
        "e": score("e", 9),
    }
    scores = [found[name] for name in order]
    assert evaluate.target_means(scores, "s") == {"cityscapes-19": found["e"].miou}
    assert evaluate.hardest(scores, "s").domain == "e"
    ((_, means),) = evaluate.class_means({"set": scores}, "s")
    assert np.array_equal(means["set"], found["e"].iou)
    text = evaluate.verdict({"none": scores, "set": scores}, "s")
    assert text.count("no pixel of it is labelled: i.") == 1 and "nan" not in text and "hardest for none is e" in text
    alone = evaluate.verdict({"set": scores[: order.index("i") + 1] if order[0] == "s" else scores[1:]}, "s")
    assert "nan" not in alone


def test_domains_without_labels_are_left_out(folder, model, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (128, 64)).save(tmp_path / "images" / "a.png")
    run = Run.open(tmp_path / "run", Experiment.build("smoke"))
    scores = evaluate.evaluate_run(run, {"a": model}, [f"folder@{tmp_path}", f"folder@{folder}/train"], False)["a"]
    assert [score.domain for score in scores] == [f"folder@{folder}/train"]
