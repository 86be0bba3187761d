"""The explorer's widgets without a browser: each control reaches its view, and a problem is a sentence."""

from __future__ import annotations

import io
import json

import nbformat
import pytest
import torch
from PIL import Image

from setlib.analysis.spectra import PARTS
from setlib.analysis.transplant import SPANS
from setlib.checkpoint import build_segmenter, save_segmenter
from setlib.experiment import Experiment
from setlib.explorer import material, widgets
from setlib.explorer.controls import NOTES
from setlib.explorer.studio import Studio
from setlib.explorer.widgets import (
    VIEWS,
    AtlasExplorer,
    DomainBrowser,
    LayerExplorer,
    LensExplorer,
    SwapExplorer,
    Tabs,
    TokenExplorer,
)
from setlib.plots import WIDTH
from setlib.run import Run
from setlib.workbook import serve as workbook

OPTIONS = ["data.eval_images=3", "data.long_edge=64", "data.height=32", "data.width=64"]
GAME, NIGHT = "scenes:game", "scenes:night"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = Run.open(tmp_path_factory.mktemp("explore") / "run", Experiment.build("smoke", overrides=OPTIONS))
    model = build_segmenter(run.experiment)
    torch.manual_seed(1)
    for branch in model.refiner.branches().values():
        torch.nn.init.normal_(branch.delta_map.weight, std=0.3)
    save_segmenter(model, run.path / "model")
    return run


@pytest.fixture
def studio(run) -> Studio:
    return Studio(run)


def upload(explorer, name: str, content: bytes | Image.Image) -> str:
    """What the button sends: the file in pieces. Returns the content that is shown then."""
    if isinstance(content, Image.Image):
        kept = io.BytesIO()
        content.save(kept, "PNG")
        content = kept.getvalue()
    for at in range(0, max(len(content), 1), 100):
        piece = {"name": name, "first": at == 0, "last": at + 100 >= len(content)}
        explorer.upload._take(None, piece, [memoryview(content[at : at + 100])])
    return explorer.controls["content"].value


def write_atlas(run: Run) -> None:
    """A study of two places, made up."""
    rows = [
        {"layer": layer, "part": part, "band": band, "closed": 0.3, "closed low": 0.2, "closed high": 0.4, "streets": 6}
        | {"placebo": 0.1, "gain low": -0.1, "content kept": 0.9}
        for layer in (0, 2)
        for part in PARTS
        for band in SPANS
    ]
    kept = {"shares": [], "yardstick": [], "atlas": rows, "about": {"done": [0, 1, 2], "readout": 3}}
    for name, content in kept.items():
        run.write_json(f"premise/{name}.json", content)


def click(explorer, panel, right: float, down: float) -> None:
    """What the browser sends for a click on a place of a panel's picture."""
    height = explorer.shown.image(with_words=False).height
    for piece, x, y, one in explorer.shown._pieces(with_words=False):
        if one is panel:
            told = {"x": (x + right * piece.width) / WIDTH, "y": (y + down * piece.height) / height}
            explorer.picture._handle_custom_msg(told, [])


# Controls


CHANGES = {
    SwapExplorer: {"content": NIGHT, "content_index": 1, "style": GAME, "style_index": 2, "part": "phase"}
    | {"space": "layer 2", "band": (0.1, 0.6), "weight": 0.5, "patch": 3, "run": "its own"},
    LensExplorer: {"content": NIGHT, "content_index": 1, "style": GAME, "style_index": 2, "part": "phase"}
    | {"space": "layer 2", "band": (0.1, 0.6), "weight": 0.5, "run": "its own"},
    AtlasExplorer: {"measure": "content kept", "part": "phase", "layer": 2, "band": "low"},
    LayerExplorer: {"first": NIGHT, "first_index": 2, "second": GAME, "second_index": 1, "space": "layer 3"}
    | {"run": "its own"},
    TokenExplorer: {"domain": NIGHT, "index": 1, "layer": 3, "branch": "phase", "token": 5},
    DomainBrowser: {"domain": NIGHT, "index": 1, "opacity": 0.2, "only": "road"},
}


@pytest.mark.parametrize("view", CHANGES, ids=lambda view: view.__name__)
def test_every_control_changes_the_picture_and_the_line_makes_it_again(studio, view, run, tmp_path, monkeypatch):
    own = str(run.path)
    write_atlas(run)
    explorer = view(studio)
    assert set(CHANGES[view]) | ({"run"} if view is TokenExplorer else set()) == set(explorer.controls)
    seen = {explorer.picture.value}
    for number, (name, value) in enumerate(CHANGES[view].items(), start=2):
        explorer.controls[name].value = own if name == "run" else value
        seen.add(explorer.picture.value)
        assert len(seen) == number and explorer.message.value == "", name
    assert "\n" not in explorer.code.value
    monkeypatch.chdir(tmp_path)
    again: dict = {}
    exec(explorer.code.value.replace("; ", "; board = ", 1), again)
    assert again["board"].png() == explorer.board().png()


@pytest.mark.parametrize("view", VIEWS.values())
def test_every_control_has_a_note_in_words(studio, view):
    explorer = view(studio)
    marks = [w for row in explorer.rows for w in row.children if getattr(w, "description", "") == "?"]
    assert len(marks) >= len(explorer.controls)
    assert all(len(mark.tooltip.split()) > 6 for mark in marks) and all(note.endswith(".") for note in NOTES.values())
    marks[0].click()
    assert marks[0].tooltip.split("'")[0] in explorer.note.value
    marks[0].click()
    assert explorer.note.value == ""


def test_controls_at_the_start_are_the_state_that_is_asked_for(studio):
    explorer = SwapExplorer(studio, style=NIGHT, style_index=2, band=(0.0, 0.1), weight=0.8)
    given = explorer.arguments()
    assert (given["style"], given["style_index"], given["high"], given["weight"]) == (NIGHT, 2, 0.1, 0.8)
    with pytest.raises(ValueError, match="Unknown colour: the controls are content"):
        explorer.set(colour="red")


@pytest.mark.parametrize(
    "state", [{"content": "scenes:dawn"}, {"space": "layer 99"}, {"band": (0.9, 0.2)}, {"part": "colour"}]
)
def test_a_value_that_is_no_choice_is_a_sentence_and_the_explorer_lives(studio, state):
    explorer = SwapExplorer(studio)
    with pytest.raises(ValueError, match=f"The control {next(iter(state))} cannot be "):
        explorer.set(**state)
    before = explorer.picture.value
    explorer.controls["weight"].value = 0.3
    assert explorer.picture.value != before


def test_tokens_without_a_run_are_a_sentence_and_start_with_the_strongest(studio, run):
    explorer = TokenExplorer(studio)
    assert explorer.controls["run"].value == str(run.path)  # its own
    explorer.controls["run"].value = ""
    assert "Tokens learn: choose a trained run" in explorer.message.value
    explorer.controls["run"].value = str(run.path)
    assert explorer.message.value == ""
    given = explorer.arguments()
    ranking = studio.ranking(given["run"], given["domain"], given["index"], given["layer"], given["branch"])
    labels = [label for label, _ in explorer.controls["token"].options]
    assert given["token"] == ranking[0][0] and labels[0].startswith(f"token {ranking[0][0]} (influence ")
    third = explorer.controls["token"].value = ranking[2][0]
    explorer.controls["index"].value = 1  # another picture: the same token
    assert explorer.controls["token"].value == third
    explorer.controls["branch"].value = "phase"  # other tokens
    given = explorer.arguments()
    assert given["token"] == studio.ranking(str(run.path), given["domain"], 1, given["layer"], "phase")[0][0]


def test_tokens_of_a_run_that_is_trained_anew_are_ranked_anew(run, tmp_path):
    again = Run.open(tmp_path / "run", run.experiment)
    model = build_segmenter(again.experiment)
    torch.nn.init.normal_(model.refiner.amplitude.delta_map.weight, std=0.3)
    save_segmenter(model, again.path / "model")
    explorer = TokenExplorer(Studio(again))
    before = explorer.controls["token"].options
    torch.nn.init.normal_(model.refiner.amplitude.token_map.weight, std=2)
    save_segmenter(model, again.path / "model")
    explorer.update()
    assert explorer.controls["token"].options != before and explorer.message.value == ""


def test_previous_next_random_and_the_class(studio):
    explorer = DomainBrowser(studio)
    explorer.steps["previous"].click()
    assert explorer.controls["index"].value == 2
    explorer.steps["next"].click()
    assert explorer.controls["index"].value == 0
    twin = DomainBrowser(Studio(studio.run))
    for one in (explorer, twin):
        one.steps["random"].click()
    assert explorer.controls["index"].value == twin.controls["index"].value != 0  # seeded
    classes = studio.domain(GAME).class_set.classes
    absent = [c for i, c in enumerate(classes) if not any((studio.label(GAME, k) == i).any() for k in range(3))]
    explorer.controls["only"].value = absent[0]
    explorer.steps["next"].click()
    assert f"No picture of {GAME} holds the class {absent[0]}" in explorer.message.value


# Clicks and states


def test_a_click_on_a_panel_chooses_its_patch(studio):
    explorer = SwapExplorer(studio, space="layer 2")
    rows, columns = studio.grid("", explorer.controls["content"].value, 0)
    middle = rows // 2 * columns + columns // 2
    for title in ("content", "features after layer 2, mixture"):
        for (right, down), patch in {(0.01, 0.02): 0, (0.98, 0.97): rows * columns - 1, (0.52, 0.54): middle}.items():
            panel = next(panel for panel in explorer.shown.panels if panel.title.startswith(title))
            click(explorer, panel, right, down)
            assert explorer.controls["patch"].value == patch and explorer.message.value == ""
            assert explorer.shown.panel(f"similarity to patch {patch} before").any()
    style = next(panel for panel in explorer.shown.panels if panel.title.startswith("style"))
    click(explorer, style, 0.1, 0.1)
    assert explorer.controls["patch"].value == middle  # not the content's
    explorer.controls["patch"].value = -1
    assert not any(panel.title.startswith("similarity") for panel in explorer.shown.panels)


def test_a_click_on_the_atlas_opens_that_swap(studio, run):
    write_atlas(run)
    tabs = Tabs(studio)
    tabs.tab.selected_index = list(VIEWS).index("Atlas")
    atlas, bands = tabs.made[tabs.tab.selected_index], list(SPANS)
    (panel,) = atlas.shown.panels
    left, top, width, height = panel.cells[1].box
    click(atlas, panel, left + width * (2.5 / len(bands)), top + height * 0.75)  # the third band, the second layer
    assert list(VIEWS)[tabs.tab.selected_index] == "Swap"
    given, (low, high) = tabs.made[0].arguments(), SPANS[bands[2]]
    assert (given["part"], given["space"], given["weight"]) == ("phase", "layer 2", 1.0)
    assert (given["low"], given["high"]) == (low, min(high, 1.5))
    assert (atlas.controls["layer"].value, atlas.controls["band"].value) == (2, bands[2])
    assert "Notebook 02 found, over 6 streets" in tabs.made[0].words.value
    alone = AtlasExplorer(studio, part="amplitude", layer=0, band=bands[-1])  # by keyboard, and without tabs
    next(w for row in alone.rows for w in row.children if getattr(w, "description", "") == "open this swap").click()
    given = alone.swap.arguments()
    assert (given["part"], given["space"], given["high"]) == ("amplitude", "pixels", 1.5)
    assert alone.box.children[-1] is alone.swap.box


def test_an_atlas_that_has_not_been_made_is_a_sentence(run, tmp_path):
    explorer = AtlasExplorer(Studio(Run.open(tmp_path / "run", run.experiment)))
    assert "no atlas yet: notebook 02" in explorer.message.value and not explorer.picture.value


@pytest.mark.parametrize("view", CHANGES, ids=lambda view: view.__name__)
def test_a_state_survives_a_file(studio, view, run):
    write_atlas(run)
    changes = {name: str(run.path) if name == "run" else value for name, value in CHANGES[view].items()}
    explorer = view(studio, **changes)
    kept: dict = {}
    exec(explorer.kept.value, kept)
    state = kept[view.view.upper()]
    assert state == json.loads(json.dumps(state)) == explorer.state() and set(state) == set(explorer.controls)
    again = view(Studio(studio.run), **state)
    assert again.state() == state and again.picture.value == explorer.picture.value


def test_a_state_brings_its_own_domains(studio, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / "a.png")
    explorer = SwapExplorer(studio, content=f"folder@{tmp_path}", band=[0.0, 0.125])
    assert explorer.controls["content"].value == f"folder@{tmp_path}" and explorer.state()["band"] == [0.0, 0.125]


# Problems


def test_a_problem_is_shown_in_the_view_and_goes_away(studio):
    explorer = SwapExplorer(studio)
    before = explorer.picture.value
    explorer.controls["run"].value = "no/such/run"
    assert "holds no saved model" in explorer.message.value and explorer.picture.value == before
    explorer.controls["run"].value = ""
    assert explorer.message.value == ""

    def broken():
        raise RuntimeError("the disk is <gone>")

    explorer.board = broken
    explorer.controls["weight"].value = 0.5
    assert "RuntimeError the disk is &lt;gone&gt;" in explorer.message.value
    del explorer.board
    explorer.controls["weight"].value = 0.4
    assert explorer.message.value == "" and explorer.picture.value != before


def test_an_interrupt_leaves_the_explorer_alive(studio):
    explorer = SwapExplorer(studio)

    def interrupted():
        raise KeyboardInterrupt

    explorer.board = interrupted
    with pytest.raises(KeyboardInterrupt):
        explorer.controls["weight"].value = 0.5
    del explorer.board
    before = explorer.picture.value
    explorer.controls["weight"].value = 0.3
    assert explorer.picture.value != before


def test_a_missing_backbone_is_said_and_the_pixels_remain(run, tmp_path):
    gone = Run.open(tmp_path / "run", run.experiment.override(f"model.backbone={tmp_path / 'gone'}"))
    explorer = SwapExplorer(Studio(gone))
    for _ in range(2):
        assert explorer.controls["space"].options == (("pixels", "pixels"),)
        assert "Only pixels can be looked at" in explorer.message.value and explorer.picture.value
        explorer.controls["weight"].value = 0.5
    explorer.controls["run"].value = f"  '{run.path}' "  # as it is pasted; a run brings its own backbone
    assert len(explorer.controls["space"].options) == 5 and explorer.message.value == ""
    explorer.controls["space"].value = "layer 2"
    assert explorer.message.value == "" and f"run={str(run.path)!r}" in explorer.code.value


def test_a_run_whose_backbone_is_missing_is_a_sentence(run, tmp_path):
    other = Run.open(tmp_path / "other", run.experiment)
    save_segmenter(build_segmenter(other.experiment), other.path / "model")
    config = other.path / "model" / "config.json"
    config.write_text(config.read_text().replace("tiny-random", "facebook/not-here"))
    explorer = SwapExplorer(Studio(run))
    before = explorer.picture.value
    explorer.controls["run"].value = str(other.path)
    assert "not-here" in explorer.message.value and explorer.picture.value == before


# Pictures that are brought


def test_uploads_become_choices_everywhere_and_a_bad_one_is_a_sentence(studio):
    explorer = SwapExplorer(studio)
    red, blue, before = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue"), explorer.picture.value
    first = upload(explorer, "image.png", red)
    assert "Uploaded 'image.png' as content" in explorer.message.value and explorer.picture.value != before
    explorer.controls["style"].value = first
    second = upload(explorer, "image.png", blue)
    assert first != second and explorer.controls["style"].value == first
    labels = dict(explorer.controls["content"].options)
    assert labels["uploaded: image.png"] == first and labels["uploaded: image.png (2)"] == second
    assert upload(explorer, "image.png", red) == first  # the same one once more
    assert dict(explorer.controls["content"].options) == labels
    assert "uploaded: image.png (2)" in dict(DomainBrowser(studio).controls["domain"].options)
    assert upload(explorer, "bad.png", b"no picture") == first and "'bad.png' is no picture" in explorer.message.value
    explorer.upload._take(None, {"name": "film.mov", "refused": "has 3000 MB: choose another"}, [])
    assert "'film.mov' has 3000 MB" in explorer.message.value
    explorer.controls["weight"].value = 0.5
    assert explorer.message.value == ""


def test_another_domain_is_a_choice_in_every_view(studio, tmp_path):
    swap, browser = SwapExplorer(studio), DomainBrowser(studio)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    browser.other.value = f" folder@{tmp_path} "
    assert browser.controls["domain"].value == f"folder@{tmp_path}" and "no labels" in browser.words.value
    swap.controls["content"].value = NIGHT
    assert f"folder@{tmp_path}" in dict(swap.controls["style"].options)
    browser.other.value = "scenes:dawn"
    assert "Unknown style 'dawn'" in browser.message.value
    browser.controls["opacity"].value = 0.1
    assert browser.message.value == ""


# Saving and showing


def test_save_writes_the_picture_and_its_line(studio):
    explorer = LayerExplorer(studio)
    (studio.run.path / "saved").mkdir(exist_ok=True)
    (studio.run.path / "saved" / "layers-mine.png").write_bytes(b"")  # somebody else's
    for number in (1, 2):
        explorer.save.click()
        path = studio.run.path / "saved" / f"layers-{number}.png"
        assert path.is_file() and f"layers-{number}.png" in explorer.message.value
        with Image.open(path) as opened:
            assert opened.text["Source"] == explorer.line()
        assert (
            path.with_suffix(".py").read_text() == f"{explorer.line()}.savefig('{path.name}')\n{explorer.kept.value}\n"
        )


def test_nothing_is_saved_by_halves_or_where_the_run_is_gone(run, tmp_path, monkeypatch):
    explorer = SwapExplorer(Studio(Run.open(tmp_path / "run", run.experiment)))

    def full(path, content):
        raise ValueError("Cannot write it: No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(material, "write_atomic", full)
        explorer.save.click()
    assert "No space left" in explorer.message.value and not list(tmp_path.glob("run/saved/*"))
    (tmp_path / "run").rename(tmp_path / "moved")
    explorer.save.click()
    assert "is gone: open the explorer anew" in explorer.message.value and not (tmp_path / "run").exists()


def test_show_is_the_widgets_or_under_papermill_a_picture(studio, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "display", shown.append)
    explorer = SwapExplorer(studio, weight=0.5)
    explorer.show()
    assert shown == [explorer.box]
    monkeypatch.setenv(widgets.STATIC, "1")
    explorer.show()
    assert shown[1].png() == explorer.board().png()
    TokenExplorer(studio, run="").show()
    assert "choose a trained run" in str(getattr(shown[2], "data", shown[2]))


def test_the_explorers_own_notebook_opens_a_view_when_it_is_looked_at(run, monkeypatch):
    (cell,) = nbformat.read(workbook.write_explorer(run, ["scenes:fog"]), as_version=4).cells
    names, shown = {}, []
    monkeypatch.setattr(widgets, "display", shown.append)
    exec(cell.source.replace("Tabs(Studio", "tabs = Tabs(Studio"), names)
    tabs = names["tabs"]
    assert tabs.studio.names[-1] == "scenes:fog" and list(tabs.made) == [0] and tabs.tab.titles == tuple(VIEWS)
    tabs.tab.selected_index = 3
    assert isinstance(tabs.made[3], DomainBrowser) and tabs.tab.children[3].children == (tabs.made[3].box,)
    tabs._ipython_display_()
    assert shown == [tabs.box]
