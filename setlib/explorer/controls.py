"""The explorer's parts: notes on controls, a picture to click, a file button, a box that keeps its keys, choices."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import traitlets

NOTES = {  # what each control means
    "content": "The picture whose spectrum is changed: a domain, then one of its pictures.",
    "style": "The picture that lends a part of its spectrum; it is cut to the content's size.",
    "part": "A Fourier transform writes a picture as a sum of waves: amplitude is how strong each wave is, phase where "
    "its crests lie. The method rests on the idea that the first carries style and the second content. The phase "
    "shown is that of one channel.",
    "space": "Where the swap happens: in the pixels, or in the features, what the backbone (the frozen vision model) "
    "has made of each patch (a square of pixels) after one of its layers; with a trained run, after its tokens too. "
    "Features are shown by their three strongest components, as red, green and blue: equal colours, similar features.",
    "patch": "A patch of the content by its number, row by row: click on it in a picture; -1 is none. All patches are "
    "then coloured by how similar their features are to this one's, before and after the swap: by the cosine in the "
    "32 strongest components of both together. A swap in the pixels is looked at after the last layer but one, one in "
    "the features after its own layer.",
    "band": "Which waves move. 0 is the mean of the picture, 1 the finest stripes along an axis, 1.5 everything. The "
    "rings in the spectra show the band; zero frequency is in their middle. Spectra show log(1 + amplitude): "
    "each step in brightness is a factor.",
    "weight": "How far the content goes towards the style: 0 changes nothing, 1 takes the style's part as it is.",
    "run": "The folder of a trained run, such as runs/quick: its model says what it sees before and after; ground "
    "truth is the label. mIoU is the overlap of the two, 100 % = equal, averaged over the classes that occur in this "
    "picture, at the size shown and in one piece; notebook 04 scores whole domains. Empty: no model.",
    "features": "The folder of a trained run: the features are then those that its tokens leave. Empty: the frozen "
    "backbone's.",
    "upload": "A picture of yours: press the button, or drag a file onto it. It stays in the run folder.",
    "first": "A domain and one of its pictures. Rendered streets have the same number in every style.",
    "second": "What it is compared with: the same number of another style changes style alone, another number content.",
    "layer": "What is looked at: the pixels, or the features, what the backbone (the frozen vision model) has made of "
    "each patch (a square of pixels) after one of its layers. Lengths are those of a patch's features as a vector.",
    "domain": "A set of pictures of one kind, such as night or fog; then one of its pictures.",
    "other": "Any domain by its name, such as acdc:night-val@FOLDER or folder@FOLDER; it then is a choice everywhere.",
    "place": "Tokens stand behind some layers of the backbone; here is where they are read.",
    "branch": "The part that these tokens refine: amplitude, phase, or the patches themselves.",
    "token": "A learned vector that features attend to; sorted by influence: mean share of the attention times what it "
    "adds. Without it: its value is zero after this layer (a query made of it for a mask head stays).",
    "opacity": "How strongly the label's colours cover the picture.",
    "only": "Colours one class alone; next, previous and random then stop at pictures that hold it.",
    "steps": "The picture before, the one behind, or one by chance (the same ones after every start).",
    "measure": "How much of the way to the same street in the other style a swap closes on average, how much its "
    "placebo closes (the same swap in a random basis, which knows nothing of waves), or how often the content stays.",
    "cell": "The cell of the atlas that is framed; a click on a cell chooses it and opens its swap.",
    "open": "Opens the framed cell as a swap of two pictures of yours, with the same part, place and frequencies.",
    "state": "This line holds all controls: as a parameter of notebook 02 it opens the view as it is now.",
    "code": "This line makes the same picture without widgets: copy it into a script or a cell.",
}
WIDE = {"style": {"description_width": "92px"}, "layout": ipywidgets.Layout(width="410px")}


class Picture(anywidget.AnyWidget):
    """A picture, JPEG, that tells where it is clicked: `clicked(x, y)`, fractions from its upper left corner."""

    _esm = Path(__file__).with_name("picture.js")
    value = traitlets.Bytes().tag(sync=True)

    def __init__(self, clicked: Callable[[float, float], None], width: int) -> None:
        super().__init__(layout=ipywidgets.Layout(width=f"{width}px", max_width="100%"))
        self.on_msg(lambda _, told, __: clicked(told["x"], told["y"]))


class Upload(anywidget.AnyWidget):
    """A button for a picture file that also takes a dropped one: `receive(bytes, name)`, or `refuse(sentence)`."""

    _esm = Path(__file__).with_name("upload.js")
    note = traitlets.Unicode(NOTES["upload"]).tag(sync=True)

    def __init__(self, receive: Callable[[bytes, str], None], refuse: Callable[[str], None]) -> None:
        super().__init__(layout=ipywidgets.Layout(width="310px"))
        self.receive, self.refuse, self.content = receive, refuse, b""
        self.on_msg(self._take)

    def _take(self, _: Any, told: dict, buffers: list) -> None:
        """One piece of the file, or why there is none."""
        if "refused" in told:
            self.refuse(f"'{told['name']}' {told['refused']}.")
            return
        self.content = (b"" if told["first"] else self.content) + bytes(buffers[0])
        if told["last"]:
            whole, self.content = self.content, b""
            self.receive(whole, told["name"])


class OwnKeys(anywidget.AnyWidget):
    """Keeps JupyterLab's one-letter commands and arrows away from whatever has the focus in the box around it."""

    _esm = Path(__file__).with_name("keys.js")


def with_own_keys(*children: Any) -> ipywidgets.VBox:
    """A box whose widgets get every key that is pressed in them."""
    box = ipywidgets.VBox([*children, OwnKeys(layout=ipywidgets.Layout(display="none"))])
    return box.add_class("setlib-keys")


def titled(text: str) -> ipywidgets.Label:
    """The name of a control, as wide as the others'."""
    width = WIDE["style"]["description_width"]
    return ipywidgets.Label(text, layout={"width": width, "display": "flex", "justify_content": "flex-end"})


def buttons(options: Any, width: str) -> ipywidgets.ToggleButtons:
    """A choice of which all options are seen at once."""
    return ipywidgets.ToggleButtons(options=options, style={"button_width": width}, layout={"width": "auto"})


def offer(widget: Any, options: Mapping[str, Any], last: bool = False) -> Any:
    """Gives a choice these options, keeping its value where it is among them; returns its value."""
    if widget.options != tuple(options.items()):
        kept = widget.value
        widget.options = tuple(options.items())
        values = list(options.values())
        widget.value = kept if kept in values else values[-1 if last else 0]
    return widget.value


def sentence(text: str, is_bold: bool = False) -> str:
    """Text as HTML that a screen reader reads out when it changes."""
    if not text:
        return ""
    style = f"line-height:1.4;white-space:normal;font-weight:{600 if is_bold else 400}"
    return f'<div role="status" style="{style}">{html.escape(text, quote=False)}</div>'
