"""The explorer: a pure render, and widgets that draw it again on every change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from setlib import domains, spectral
from setlib.backbone import FrozenBackbone
from setlib.experiment import Experiment
from setlib.explore import SwapExplorer, swap

SIZES = {"wide": (40, 80), "tall": (48, 40)}


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> dict[str, domains.Domain]:
    """Two folder domains of random pictures of different sizes."""
    random, found = np.random.default_rng(0), {}
    for name, size in SIZES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "images").mkdir()
        for i in range(3):
            Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        found[name] = domains.load(f"folder@{folder}", Experiment.build("smoke").data)
    return found


@pytest.fixture(scope="module")
def explorer(used) -> SwapExplorer:
    return SwapExplorer(used, FrozenBackbone.load("tiny-random"), long_edge=64)


def drawn(figure, place: int) -> np.ndarray:
    return np.asarray(figure.axes[place].images[0].get_array())


def test_render_is_pure_and_shows_the_swap(explorer):
    arguments = ("wide", 0, "tall", 2, "amplitude", 0.0, 0.5, 0.5)
    before = [widget.value for widget in explorer.controls]
    one, again = explorer.render(*arguments), explorer.render(*arguments)
    assert one.png() == again.png()
    assert [widget.value for widget in explorer.controls] == before
    content, style = explorer.pair("wide", 0, "tall", 2)
    assert content.shape == style.shape
    mixed = spectral.mix_amplitude(content, style, 0.5, 0.0, 0.5, spectral.PIXELS)
    assert drawn(one, 2) == pytest.approx((mixed[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy(), abs=1)
    assert not np.array_equal(drawn(one, 2), drawn(one, 0))


@pytest.mark.parametrize("space", ["pixels", "layer 3", 3])
@pytest.mark.parametrize("part", ["amplitude", "phase"])
def test_weight_0_changes_nothing_and_weight_1_does(explorer, space, part):
    content, mixed = (0, 2) if space == "pixels" else (3, 5)
    still = explorer.render("wide", 0, "tall", 0, part, weight=0.0, space=space)
    assert drawn(still, mixed) == pytest.approx(drawn(still, content), abs=1 if space == "pixels" else 1e-3)
    moved = explorer.render("wide", 0, "tall", 0, part, weight=1.0, space=space)
    assert np.abs(drawn(moved, mixed).astype(float) - drawn(moved, content)).max() > 0.05


def test_swap_exchanges_the_parts():
    x, y = torch.rand(2, 1, 3, 8, 12, generator=torch.Generator().manual_seed(0)).unbind()
    assert swap(x, y, "phase", 0, 1.5, 1, spectral.PIXELS) == pytest.approx(
        swap(y, x, "amplitude", 0, 1.5, 1, spectral.PIXELS), abs=1e-5
    )


def test_unknown_choices_are_one_sentence(explorer):
    for arguments, sentence in (
        (("deep", 0, "tall", 0), "Unknown domain 'deep': expected one of wide, tall"),
        (("wide", 3, "tall", 0), "wide has the pictures 0 to 2, not 3"),
        (("wide", 0, "tall", 0, "colour"), "Unknown part 'colour': expected one of amplitude, phase"),
        (
            ("wide", 0, "tall", 0, "phase", 0, 1, 1, "layer 9"),
            "Unknown space 'layer 9': expected one of pixels, layer 1",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            explorer.render(*arguments)


def test_every_widget_changes_the_picture(used):
    explorer = SwapExplorer(used, FrozenBackbone.load("tiny-random"), long_edge=64)
    explorer.update()
    seen = {explorer.view.value}
    for number, (widget, value) in enumerate(
        (
            (explorer.content_index, 1),
            (explorer.style_index, 2),
            (explorer.part, "phase"),
            (explorer.weight, 0.5),
            (explorer.band, (0.0, 0.3)),
            (explorer.space, "layer 3"),
            (explorer.content, "tall"),
            (explorer.style, "wide"),
        ),
        start=2,
    ):
        widget.value = value
        seen.add(explorer.view.value)
        assert len(seen) == number and explorer.message.value == ""


def test_a_problem_is_shown_in_the_view_and_goes_away(used, monkeypatch):
    explorer = SwapExplorer(used)
    assert explorer.space.options == ("pixels",)
    explorer.update()
    before = explorer.view.value

    def broken(self, *arguments):
        raise ValueError("picture '1' cannot be decoded: export it again.")

    with monkeypatch.context() as patch:
        patch.setattr(SwapExplorer, "pair", broken)
        explorer.content_index.value = 1
    assert explorer.message.value == "picture '1' cannot be decoded: export it again."
    assert explorer.view.value == before
    explorer.weight.value = 0.5
    assert explorer.message.value == "" and explorer.view.value != before


def test_show_displays_the_controls_with_a_picture(used, monkeypatch):
    shown = []
    monkeypatch.setattr("setlib.explore.display", shown.append)
    explorer = SwapExplorer(used)
    explorer.show()
    assert shown == [explorer.box] and bytes(explorer.view.value).startswith(b"\x89PNG")
