"""The explorer's widgets without a browser: each control reaches its view, and a problem is a sentence."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from setlib.model import Segmenter

from setlib.experiment import Experiment
from setlib.explorer import widgets as explore
from setlib.explorer.controls import NOTES
from setlib.explorer.studio import Studio
from setlib.explorer.widgets import VIEWS, DomainBrowser, LayerExplorer, SwapExplorer, TokenExplorer
from setlib.run import Run
from setlib.workbook import serve as workbook

OPTIONS = ["data.eval_images=3", "data.long_edge=64", "data.height=32", "data.width=64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = Run.open(tmp_path_factory.mktemp("explore") / "run", Experiment.build("smoke", overrides=OPTIONS))
    model = Segmenter(run.experiment)
    torch.manual_seed(1)
    for branch in model.refiner.branches().values():
        torch.nn.init.normal_(branch.delta_map.weight, std=0.3)
    model.save(run.path / "model")
    return run


@pytest.fixture
def studio(run) -> Studio:
    return Studio(run)


CHANGES = {
    SwapExplorer: [
        ("content", "scenes:night"),
        ("content_index", 1),
        ("style", "scenes:game"),
        ("style_index", 2),
        ("part", "phase"),
        ("space", "layer 2"),
        ("band", (0.1, 0.6)),
        ("weight", 0.5),
        ("run", "its own"),
    ],
    LayerExplorer: [
        ("first", "scenes:night"),
        ("first_index", 2),
        ("second", "scenes:game"),
        ("second_index", 1),
        ("space", "layer 3"),
        ("run", "its own"),
    ],
    TokenExplorer: [
        ("domain", "scenes:night"),
        ("index", 1),
        ("layer", 3),
        ("branch", "phase"),
        ("token", 5),
    ],
    DomainBrowser: [("domain", "scenes:night"), ("index", 1), ("opacity", 0.2), ("only", "road")],
}


@pytest.mark.parametrize("view", CHANGES, ids=lambda view: view.__name__)
def test_every_control_changes_the_picture_and_the_line_makes_it_again(studio, view, run, tmp_path, monkeypatch):
    own = str(run.path)
    explorer = view(studio, **({"run": own} if view is TokenExplorer else {}))
    changes = [(name, own if value == "its own" else value) for name, value in CHANGES[view]]
    assert {name for name, _ in changes} | ({"run"} if view is TokenExplorer else set()) == set(explorer.controls)
    seen = {explorer.picture.value}
    for number, (name, value) in enumerate(changes, start=2):
        explorer.controls[name].value = value
        seen.add(explorer.picture.value)
        assert len(seen) == number and explorer.message.value == "", name
    assert explorer.arguments() == explorer.arguments() and "\n" not in explorer.code.value
    monkeypatch.chdir(tmp_path)
    again: dict = {}
    exec(f"{explorer.code.value.replace('; ', '; board = ', 1)}", again)
    assert again["board"].png() == explorer.board().png()


def test_every_control_has_a_note_in_words(studio):
    for view in VIEWS.values():
        explorer = view(studio)
        marks = [w for row in explorer.rows for w in row.children if getattr(w, "description", "") == "?"]
        assert len(marks) >= len(explorer.controls)
        assert all(len(mark.tooltip.split()) > 6 for mark in marks)
        marks[0].click()
        assert marks[0].tooltip.split("'")[0] in explorer.note.value
        marks[0].click()
        assert explorer.note.value == ""
    assert all(note.endswith(".") for note in NOTES.values())


def test_controls_at_the_start_are_the_state_that_is_asked_for(studio):
    explorer = SwapExplorer(studio, style="scenes:night", style_index=2, band=(0.0, 0.1), weight=0.8)
    given = explorer.arguments()
    assert (given["style"], given["style_index"], given["high"], given["weight"]) == ("scenes:night", 2, 0.1, 0.8)
    with pytest.raises(ValueError, match="Unknown colour: the controls are content"):
        explorer.set(colour="red")


def test_a_problem_is_shown_in_the_view_and_goes_away(studio):
    explorer = SwapExplorer(studio)
    before = explorer.picture.value
    explorer.controls["run"].value = "no/such/run"
    assert "holds no saved model" in explorer.message.value and explorer.picture.value == before
    explorer.controls["run"].value = ""
    assert explorer.message.value == ""

    def broken(**_):
        raise RuntimeError("the disk is <gone>")

    explorer.render = broken
    explorer.controls["weight"].value = 0.5
    assert "RuntimeError the disk is &lt;gone&gt;" in explorer.message.value
    del explorer.render
    explorer.controls["weight"].value = 0.4
    assert explorer.message.value == "" and explorer.picture.value != before


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


def test_a_missing_backbone_is_said_and_the_pixels_remain(run, tmp_path):
    gone = Run.open(tmp_path / "run", run.experiment.override(f"model.backbone={tmp_path / 'gone'}"))
    explorer = SwapExplorer(Studio(gone))
    assert explorer.controls["space"].options == (("pixels", "pixels"),)
    assert "Only pixels can be looked at" in explorer.message.value and explorer.picture.value
    explorer.controls["weight"].value = 0.5
    assert "Only pixels can be looked at" in explorer.message.value
    other = Run.open(tmp_path / "other", run.experiment)
    Segmenter(other.experiment).save(other.path / "model")
    text = (other.path / "model" / "config.json").read_text()
    (other.path / "model" / "config.json").write_text(text.replace("tiny-random", "facebook/not-here"))
    explorer = SwapExplorer(Studio(run))
    before = explorer.picture.value
    explorer.controls["run"].value = str(other.path)
    assert "not-here" in explorer.message.value and explorer.picture.value == before


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
    classes = studio.domain("scenes:game").class_set.classes
    absent = [
        c for i, c in enumerate(classes) if not any((studio.label("scenes:game", k) == i).any() for k in range(3))
    ]
    explorer.controls["only"].value = absent[0]
    explorer.steps["next"].click()
    assert f"No picture of scenes:game holds the class {absent[0]}" in explorer.message.value


def message(name: str, content: bytes, size: int = 7):
    """What the button sends: the file in pieces."""
    for at in range(0, max(len(content), 1), size):
        yield {"name": name, "first": at == 0, "last": at + size >= len(content)}, [memoryview(content[at : at + size])]


def test_an_upload_becomes_a_choice(studio):
    explorer = SwapExplorer(studio, style="scenes:night")
    before, content = explorer.picture.value, io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(content, "PNG")
    for words, buffers in message("mine.png", content.getvalue(), 1000):
        explorer.upload._take(None, words, buffers)
    assert "Uploaded 'mine.png' as content" in explorer.message.value and explorer.picture.value != before
    assert explorer.arguments()["content"].startswith("folder@") and explorer.arguments()["style"] == "scenes:night"
    assert "uploaded: mine.png" in dict(explorer.controls["style"].options)
    for words, buffers in message("bad.png", b"no picture"):
        explorer.upload._take(None, words, buffers)
    assert "'bad.png' is no picture" in explorer.message.value
    explorer.upload._take(None, {"name": "film.mov", "refused": "has 3000 MB: choose another"}, [])
    assert "'film.mov' has 3000 MB" in explorer.message.value
    explorer.controls["weight"].value = 0.5
    assert explorer.message.value == ""


def test_save_writes_the_picture_and_its_line(studio):
    explorer = LayerExplorer(studio)
    for number in (1, 2):
        explorer.save.click()
        path = studio.run.path / "saved" / f"layers-{number}.png"
        assert path.is_file() and f"layers-{number}.png" in explorer.message.value
        with Image.open(path) as opened:
            assert opened.text["Source"] == explorer.line()
        assert path.with_suffix(".py").read_text() == f"{explorer.line()}.savefig('{path.name}')\n"


def test_show_is_the_widgets_or_under_papermill_a_picture(studio, monkeypatch):
    shown = []
    monkeypatch.setattr(explore, "display", shown.append)
    explorer = SwapExplorer(studio, weight=0.5)
    explorer.show()
    assert shown == [explorer.box]
    monkeypatch.setenv(explore.STATIC, "1")
    explorer.show()
    assert shown[1].png() == explorer.board().png()
    TokenExplorer(studio, run="").show()
    assert "choose a trained run" in str(getattr(shown[2], "data", shown[2]))


def test_tabs_open_a_view_when_it_is_looked_at(studio):
    tabs = explore.Tabs(studio)
    assert list(tabs.made) == [0] and tabs.tab.titles == tuple(VIEWS)
    tabs.tab.selected_index = 3
    assert isinstance(tabs.made[3], DomainBrowser) and tabs.tab.children[3].children == (tabs.made[3].box,)


def test_the_explorers_own_notebook_runs(run, tmp_path, monkeypatch):
    path = workbook.write_explorer(run, ["scenes:fog"])
    names: dict = {}
    import nbformat

    (cell,) = nbformat.read(path, as_version=4).cells
    shown = []
    monkeypatch.setattr(explore, "display", shown.append)
    exec(cell.source.replace("Tabs(Studio", "tabs = Tabs(Studio"), names)
    assert names["tabs"].studio.names[-1] == "scenes:fog"
    names["tabs"]._ipython_display_()
    assert shown == [names["tabs"].box]


def upload(explorer, name: str, picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG")
    for words, buffers in message(name, content.getvalue(), 1000):
        explorer.upload._take(None, words, buffers)
    return explorer.controls["content"].value


def test_two_uploads_of_one_name_are_two_choices_everywhere(studio):
    explorer = SwapExplorer(studio)
    first = upload(explorer, "image.png", Image.new("RGB", (40, 30), "red"))
    explorer.controls["style"].value = first
    second = upload(explorer, "image.png", Image.new("RGB", (40, 30), "blue"))
    assert first != second and explorer.controls["style"].value == first
    labels = dict(explorer.controls["content"].options)
    assert labels["uploaded: image.png"] == first and labels["uploaded: image.png (2)"] == second
    assert upload(explorer, "image.png", Image.new("RGB", (40, 30), "red")) == first  # the same one once more
    assert dict(explorer.controls["content"].options) == labels
    explorer.controls["weight"].value = 0.5
    assert explorer.message.value == ""
    assert "uploaded: image.png (2)" in dict(DomainBrowser(studio).controls["domain"].options)


def test_another_domain_is_a_choice_in_every_view(studio, tmp_path):
    swap, browser = SwapExplorer(studio), DomainBrowser(studio)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    browser.other.value = f" folder@{tmp_path} "
    assert browser.controls["domain"].value == f"folder@{tmp_path}" and "no labels" in browser.words.value
    swap.controls["content"].value = "scenes:night"
    assert f"folder@{tmp_path}" in dict(swap.controls["style"].options)
    browser.other.value = "scenes:dawn"
    assert "Unknown style 'dawn'" in browser.message.value
    browser.controls["opacity"].value = 0.1
    assert browser.message.value == ""


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


def test_an_interrupt_leaves_the_explorer_alive(studio):
    explorer = SwapExplorer(studio)

    def interrupted(**_):
        raise KeyboardInterrupt

    explorer.render = interrupted
    with pytest.raises(KeyboardInterrupt):
        explorer.controls["weight"].value = 0.5
    del explorer.render
    before = explorer.picture.value
    explorer.controls["weight"].value = 0.3
    assert explorer.picture.value != before


def test_layers_to_choose_are_those_of_the_run(studio, run, tmp_path):
    gone = Run.open(tmp_path / "gone", run.experiment.override(f"model.backbone={tmp_path / 'no-weights'}"))
    explorer = SwapExplorer(Studio(gone))
    assert len(explorer.controls["space"].options) == 1
    explorer.controls["run"].value = f"  '{run.path}' "  # as it is pasted
    assert len(explorer.controls["space"].options) == 5 and explorer.message.value == ""
    explorer.controls["space"].value = "layer 2"
    assert explorer.message.value == "" and f"run={str(run.path)!r}" in explorer.code.value


def test_tokens_of_a_run_that_is_trained_anew_are_ranked_anew(run, tmp_path):
    again = Run.open(tmp_path / "run", run.experiment)
    model = Segmenter(again.experiment)
    torch.nn.init.normal_(model.refiner.amplitude.delta_map.weight, std=0.3)
    model.save(again.path / "model")
    explorer = TokenExplorer(Studio(again))
    before = explorer.controls["token"].options
    torch.nn.init.normal_(model.refiner.amplitude.token_map.weight, std=2)
    model.save(again.path / "model")
    explorer.update()
    assert explorer.controls["token"].options != before and explorer.message.value == ""


def test_a_file_of_somebody_else_does_not_stop_save(studio):
    explorer = DomainBrowser(studio)
    (studio.run.path / "saved").mkdir(exist_ok=True)
    (studio.run.path / "saved" / "browse-mine.png").write_bytes(b"")
    explorer.save.click()
    assert "browse-1.png" in explorer.message.value


def test_nothing_is_saved_by_halves(studio, monkeypatch):
    explorer = SwapExplorer(studio)
    folder = studio.run.path / "saved"
    before = sorted(folder.glob("swap-*"))
    write = explore.write_atomic

    def full(path, content):
        if path.suffix == ".png":
            raise ValueError("Cannot write it: No space left on device.")
        return write(path, content)

    monkeypatch.setattr(explore, "write_atomic", full)
    explorer.save.click()
    assert "No space left" in explorer.message.value and sorted(folder.glob("swap-*")) == before
