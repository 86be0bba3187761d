"""The style of the source: levels of amplitudes put in place of a picture's own, phases and content kept."""

import copy

import pytest
import torch

from setlib import spectral
from setlib.checkpoint import build_segmenter, load_segmenter
from setlib.data import domains
from setlib.data.crops import RandomCrops
from setlib.experiment import Experiment
from setlib.features import SharedFeatures, keep_crops
from setlib.refiners import build_refiner
from setlib.run import Run
from setlib.style import OCTAVES, SourceStyle, fit_style, same, turned
from setlib.training import train


def features(seed=0, count=4, size=(8, 12), channels=6):
    random = torch.Generator().manual_seed(seed)
    waves = spectral.transform(torch.randn(count, *size, channels, generator=random))
    return spectral.invert(waves / (0.1 + spectral.frequency_radius(size)[..., None]), size) + 0.3


def fitted(x, **options):
    style = SourceStyle((2,), x.shape[-1], **options)
    style.observe(x, 2)
    return style


@pytest.mark.parametrize("edges", [(), OCTAVES])
@pytest.mark.parametrize("scrambled", [False, True])
def test_every_picture_gets_the_levels_of_the_source(edges, scrambled):
    style = fitted(features(), edges=edges, scrambled=scrambled)
    moved = style(3 * features(1) - 2, 2)
    mean, level = style.statistics(turned(moved) if scrambled else moved)
    torch.testing.assert_close(mean, style.mean[0].expand_as(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(level, style.level[0].expand_as(level), atol=1e-4, rtol=0)


@pytest.mark.parametrize("edges", [(), OCTAVES])
def test_no_phase_turns(edges):
    x = features(1)
    before, after = (spectral.transform(z) for z in (x, fitted(features(), edges=edges)(x, 2)))
    bins = spectral.frequency_radius((8, 12)) > 0
    turned = torch.angle(after / before)[:, bins]
    assert turned.abs().max() < 1e-3


def test_two_styles_of_one_picture_become_one_and_two_pictures_stay_two():
    style, x = fitted(features()), features(1, 2)
    other = 1.7 * x - 0.8  # gain and veil
    torch.testing.assert_close(style(x, 2), style(other, 2), atol=1e-4, rtol=0)
    assert (style(x, 2)[0] - style(x, 2)[1]).norm() > 0.5 * (x[0] - x[1]).norm()


def test_a_picture_is_brought_there_alone_and_an_unfitted_style_changes_nothing():
    style, x = fitted(features()), features(1)
    torch.testing.assert_close(style(x, 2)[:1], style(x[:1], 2))
    assert torch.equal(SourceStyle((2,), 6)(x, 2), x)
    constant = style(torch.zeros(1, 8, 12, 6), 2)
    assert torch.isfinite(constant).all()


def test_gains_keep_what_content_says():
    contents = features(0, 32)
    style = SourceStyle((2,), 6, edges=OCTAVES, gains=True)
    style.observe(torch.cat([contents, contents + 5, contents - 5]), 2, styles=3)  # style moves the mean alone
    assert style.mean_kept.max() < 0.3 and style.level_kept[0, 2:].min() > 0.9  # below, no bins


def test_styles_are_the_same_by_what_they_do():
    one = fitted(features())
    assert same(one, copy.deepcopy(one)) and same(None, None)
    assert (
        not same(one, None) and not same(one, fitted(features(3))) and not same(one, fitted(features(), edges=(1.0,)))
    )


def experiment(refiner="set-style", *options):
    return Experiment.build("smoke", overrides=[f"model.refiner={refiner}", "train.steps=3", *options])


@pytest.mark.parametrize("refiner", ["style", "style-gains", "set-style", "set-style-placebo"])
def test_a_style_is_fitted_saved_and_loaded_and_kept_features_have_it(refiner, tmp_path):
    run = Run.open(tmp_path, experiment(refiner))
    model, _ = train(run, progress=False)
    assert model.refiner.style.fitted.all() and model.refiner.style.mean.abs().max() > 0
    again = load_segmenter(tmp_path)
    assert same(again.refiner.style, model.refiner.style)
    images = torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        kept = SharedFeatures([model])(images)
        torch.testing.assert_close(model(images, kept), model(images), atol=1e-5, rtol=1e-5)
        plain = build_segmenter(experiment("none"), model.backbone).eval()
        torch.testing.assert_close(plain(images, kept), plain(images))  # left aside: of another style


def test_seeds_share_a_style_and_every_refiner_begins_with_it():
    source = domains.load("scenes:game", experiment().data, role="source")
    models = [build_segmenter(experiment("set-style", f"seed={seed}")) for seed in (0, 1)]
    keep_crops(models, RandomCrops(source, experiment()), progress=False)
    assert same(models[0].refiner.style, models[1].refiner.style)
    alone = build_segmenter(experiment("style"))
    fit_style(alone, RandomCrops(source, experiment()))
    images = torch.rand(1, 3, 64, 128)
    maps = [m.backbone(images, m.refiner, (4,))[4] for m in (alone, models[0])]
    torch.testing.assert_close(*maps, atol=1e-4, rtol=1e-4)  # SET changes nothing at the start


def test_layers_of_the_style_are_an_option_and_must_exist():
    assert build_refiner("rein-style", (4,), 8, style_layers=(1, 2)).style.layers == (1, 2)
    with pytest.raises(ValueError, match=r"model.style_layers names \(1, 5\), but tiny-random has the layers 1 to 4"):
        build_segmenter(experiment("style", "model.style_layers=1,5"))
    build_segmenter(experiment("set", "model.style_layers=1,5"))  # it has none
