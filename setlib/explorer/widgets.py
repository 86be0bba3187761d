"""The explorer's widgets: thin, over the pure views of `studio.py`. What a widget shows, one line of Python shows too.

A second line holds its state, from which it opens again. Under papermill, where nobody moves a slider, the same cells
show the chosen state as a picture.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import ipywidgets
import numpy as np
import traitlets
from IPython.display import HTML, display

from setlib.analysis.spectra import PARTS
from setlib.analysis.transplant import SPANS
from setlib.explorer.controls import NOTES, WIDE, Picture, Upload, buttons, offer, sentence, titled, with_own_keys
from setlib.explorer.guess import Guess  # noqa: F401  (notebooks name it so)
from setlib.explorer.material import find_folder
from setlib.explorer.studio import ALL, HIGHEST, MEASURES, Studio
from setlib.files import PROJECT, STATIC, shown
from setlib.plots import WIDTH, Board

DOMAINS = ("content", "style", "first", "second", "domain")  # controls that name one


class Explorer:
    """Base of all: controls, made by `build`, whose values are the arguments of one view, and what the view shows.

    `show` displays the widgets, which draw again on every change. A front end sends a slider's next position once the
    last one is drawn, so positions in between are dropped, not queued. A problem is a sentence above the picture, which
    stays as it was.
    """

    view = ""  # the method of `Studio`
    unsaid = ""  # of a layer's name, among the choices

    def __init__(self, studio: Studio, **state: Any) -> None:
        self.studio, self.controls, self.rows = studio, {}, []
        self.picture, self.shown = Picture(partial(self._guarded, self._click), WIDTH), Board([], 1)
        self.message, self.words, self.note = (ipywidgets.HTML() for _ in range(3))
        self.code, self.kept = (
            ipywidgets.Text(description=name, style=WIDE["style"], layout={"width": "780px"})
            for name in ("as Python", "as parameter")
        )
        self.save = ipywidgets.Button(description="save", tooltip="Saves the picture as PNG, and this line of Python")
        self.save.on_click(lambda _: self._guarded(self._save))
        self._is_busy = False
        self.build()
        for widget in self.controls.values():
            widget.observe(self.update, names="value")
        controls = ipywidgets.Box(self.rows, layout={"flex_flow": "row wrap"})
        code = ipywidgets.HBox([self.code, self._help("code"), self.save])
        kept = ipywidgets.HBox([self.kept, self._help("state")])
        self.box = with_own_keys(controls, self.note, self.message, self.words, self.picture, code, kept)
        self.box.layout.max_width = "980px"
        self.box.add_class(f"setlib-{self.view}")
        self.set(**state)

    # Subclasses

    def follow(self) -> None:
        """Fits the controls' choices to each other's values and to what is known by now, before a drawing."""
        for name in DOMAINS:
            if name in self.controls:
                offer(self.controls[name], self.studio.choices)
                self.controls[_index_of(name)].max = len(self.studio.domain(self.controls[name].value)) - 1
        if "space" in self.controls:
            spaces = self.studio.spaces(self.arguments()["run"])
            offer(self.controls["space"], {space.removeprefix(self.unsaid): space for space in spaces})

    def state(self) -> dict[str, Any]:
        """What the controls say, for JSON: as keywords it makes the explorer again."""
        said = {name: widget.value for name, widget in self.controls.items()}
        for name, value in said.items():
            if isinstance(value, float | tuple):
                said[name] = np.round(value, 3).tolist()
        if "run" in said:
            run = said["run"].strip().strip("'\"")  # as it is pasted
            said["run"] = run and shown(find_folder(run), PROJECT)
        return said

    def arguments(self) -> dict[str, Any]:
        """What the controls say, as the view's arguments."""
        return self.state()

    def choose(self, box: int, cell: int) -> None:
        """What a click on a cell does; box: which of a panel's `cells`."""

    # What all share

    def board(self) -> Board:
        """The view at what the controls say."""
        return getattr(self.studio, self.view)(**self.arguments())

    def set(self, **state: Any) -> None:
        """Sets controls by name, and draws. Raises ValueError for an unknown one, or a value that cannot be."""
        if unknown := set(state) - set(self.controls):
            raise ValueError(f"Unknown {unknown.pop()}: the controls are {', '.join(self.controls)}.")
        with self._quietly():
            for name in sorted(state, key=["run", *self.controls].index):  # a run brings choices
                value = tuple(state[name]) if isinstance(state[name], list) else state[name]
                try:
                    if name in DOMAINS:
                        self.studio.add_domain(value)
                    self._guarded(self.follow)
                    self.controls[name].value = value
                except (traitlets.TraitError, ValueError) as error:
                    raise ValueError(f"The control {name} cannot be {state[name]!r} ({error}).") from None
        self.update()

    def line(self) -> str:
        """One line of Python that makes the picture shown."""
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments().items())
        return f"from setlib import Studio; Studio.open({shown(self.studio.run.path, PROJECT)!r}).{self.view}({given})"

    def update(self, _: Any = None) -> None:
        """Draws what the controls say."""
        if not self._is_busy:
            self._guarded(self._draw)

    def show(self) -> None:
        """Displays the widgets; the picture alone where SETLIB_STATIC is set (under papermill)."""
        if not os.environ.get(STATIC):
            display(self.box)
            return
        if self.message.value:
            display(HTML(self.message.value))
        if self.picture.value:
            display(self.board())

    def say(self, text: str, is_problem: bool = False) -> None:
        """A sentence above the picture."""
        self.message.value = sentence(f"⚠ {text}" if is_problem else text, is_bold=True)

    def _draw(self) -> None:
        with self._quietly():
            self.follow()
        self.shown, given = self.board(), self.arguments()
        self.picture.value, self.words.value = self.shown.jpeg(), sentence(self.shown.words)
        self.code.value, self.kept.value = self.line(), f"{self.view.upper()} = {self.state()!r}"
        if "space" in given and not given["run"] and self.studio.missing:
            self.say(f"Only pixels can be looked at: {self.studio.missing}", is_problem=True)

    def _click(self, x: float, y: float) -> None:
        """A click into the picture, in fractions of it."""
        found = self.shown.locate(x, y)
        for number, cells in enumerate(found[0].cells if found else ()):
            if (cell := cells.at(*found[1:])) is not None:
                self.choose(number, cell)

    def _save(self) -> None:
        names = (f"saved/{self.view}-{number}" for number in count(1))
        name = next(name for name in names if not (self.studio.run.path / f"{name}.png").exists())
        path = self.studio.keep(f"{name}.png", self.board().png(self.line()))
        self.studio.keep(f"{name}.py", f"{self.line()}.savefig({path.name!r})\n{self.kept.value}\n")
        self.say(f"Saved {shown(path, PROJECT)}, and the lines of Python that make it beside it.")

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """Controls that change meanwhile draw nothing."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    def _guarded(self, action: Callable[..., object], *given: Any) -> None:
        """Does it; a problem becomes the message, since a widget's callback has nowhere else to say it."""
        with self.message.hold_sync():  # a browser sees the last message alone
            self.message.value = ""
            try:
                action(*given)
            except Exception as problem:
                kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__} "
                self.say(f"{kind}{problem}", is_problem=True)

    # Controls

    def add(self, name: str, widget: Any, note: str = "", title: str = "") -> None:
        """A control of the view's argument `name`; title: where it has none itself."""
        self.controls[name] = widget
        self.add_row(*([titled(title)] if title else []), widget, note=note or name)

    def add_row(self, *widgets: Any, note: str) -> None:
        """Widgets beside each other, with a "?" that shows a note."""
        row = ipywidgets.HBox([*widgets, self._help(note)], layout=ipywidgets.Layout(min_width="475px"))
        self.rows.append(row.add_class("setlib-control"))

    def add_picture(self, name: str, value: str | None = None) -> None:
        """A domain and a picture's number."""
        options = tuple(self.studio.choices.items())
        self.add(name, ipywidgets.Dropdown(options=options, value=value or options[0][1], description=name, **WIDE))
        self.add(_index_of(name), ipywidgets.IntSlider(0, 0, 0, description="picture", **WIDE), name)

    def add_run(self, value: str = "", note: str = "run") -> None:
        """The folder of a trained run."""
        options = {"options": self.studio.runs(), "placeholder": "none; for example runs/quick"}
        widget = ipywidgets.Combobox(value=value, description="trained run", continuous_update=False, **options, **WIDE)
        self.add("run", widget, note)

    def add_upload(self, control: str) -> None:
        """A button that brings a picture into the choices of every view; the control of this name then shows it."""

        def receive(content: bytes, name: str) -> None:
            domain, done = self.studio.add_upload(content, name)
            self._choose(control, domain)
            self.say(f"Uploaded '{name}'{f' ({done})' if done else ''} as {control}.")

        self.upload = Upload(partial(self._guarded, receive), partial(self.say, is_problem=True))
        self.add_row(titled("upload"), self.upload, note="upload")

    def _choose(self, control: str, domain: str) -> None:
        """Makes a domain a choice, if it is none, and shows it."""
        if not domain:  # a field was emptied
            return
        self.studio.add_domain(domain)
        with self._quietly():
            self.follow()
            self.controls[control].value = domain
        self._draw()

    def _help(self, name: str) -> ipywidgets.Button:
        """The "?" that shows a note and hides it again."""
        button = ipywidgets.Button(description="?", tooltip=NOTES[name], layout={"width": "30px"})
        note = sentence(NOTES[name])

        def toggle(_: Any) -> None:
            self.note.value = "" if self.note.value == note else note

        button.on_click(toggle)
        return button


def _index_of(name: str) -> str:
    """The control of a picture's number, by that of its domain."""
    return "index" if name == "domain" else f"{name}_index"


class LensExplorer(Explorer):
    """What a linear head says after each layer, before and after a swap (`Studio.lens`)."""

    view = "lens"

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("content")
        self.add_picture("style", value=self.studio.names[-1])
        self.add("part", buttons(PARTS, "100px"), title="what moves")
        self.add("space", ipywidgets.Dropdown(options=["pixels"], description="where", **WIDE))
        ends = {"value": (0, HIGHEST), "min": 0, "max": HIGHEST, "step": 0.001, "readout_format": ".3f"}
        self.add("band", ipywidgets.FloatRangeSlider(description="frequencies", **ends, **WIDE))
        self.add("weight", ipywidgets.FloatSlider(1, min=0, max=1, step=0.05, description="weight", **WIDE))
        self.add_run()
        self.add_upload("content")

    def arguments(self) -> dict[str, Any]:
        """The band as its two ends."""
        given = self.state()
        given["low"], given["high"] = given.pop("band")
        return given


class SwapExplorer(LensExplorer):
    """Moves amplitude or phase of one picture towards another's, in its pixels or after a layer (`Studio.swap`)."""

    view = "swap"

    def build(self) -> None:
        """Makes the controls."""
        super().build()
        self.add("patch", ipywidgets.IntSlider(-1, -1, -1, description="patch", **WIDE))

    def follow(self) -> None:
        """The patches to choose from are the content's."""
        super().follow()
        given = self.arguments()
        rows, columns = self.studio.grid(given["run"], given["content"], given["content_index"])
        self.controls["patch"].max = rows * columns - 1

    def choose(self, box: int, cell: int) -> None:
        """The patch that is clicked."""
        self.controls["patch"].value = cell


class LayerExplorer(Explorer):
    """How far two pictures lie apart in amplitude and phase, layer by layer, and where (`Studio.layers`)."""

    view, unsaid = "layers", "layer "

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("first")
        self.add_picture("second", value=self.studio.names[-1])
        self.add_run(note="features")
        self.add_upload("second")
        self.add("space", buttons({"pixels": "pixels"}, "59px"), "layer", "layer")


class TokenExplorer(Explorer):
    """Where a token attends over spectrum and picture, and what changes without it (`Studio.tokens`)."""

    view = "tokens"
    place: tuple | None = None  # run, layer and branch whose tokens are shown

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("domain")
        self.add_run(self.studio.own())
        self.add("layer", ipywidgets.Dropdown(description="after layer", **WIDE), "place")
        self.add("branch", ipywidgets.Dropdown(description="branch", **WIDE))
        self.add("token", ipywidgets.Dropdown(description="token", **WIDE))

    def follow(self) -> None:
        """The choices of layer, branch and token are those of the run; tokens are sorted by influence."""
        super().follow()
        given = self.arguments()
        picture = given["run"], given["domain"], given["index"]
        known = self.studio.places(*picture)
        layer = offer(self.controls["layer"], {f"layer {n}": n for n in known}, last=True)
        branch = offer(self.controls["branch"], {name: name for name in known[layer]})
        ranking = self.studio.ranking(*picture, layer, branch)
        offer(self.controls["token"], {f"token {m} (influence {value:.3g})": m for m, value in ranking})
        if self.place != (given["run"], layer, branch):  # other tokens: the strongest of them
            self.place = given["run"], layer, branch
            self.controls["token"].value = ranking[0][0]


class DomainBrowser(Explorer):
    """The pictures of a domain with their labels, filtered by class (`Studio.browse`)."""

    view = "browse"

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("domain")
        self.add("opacity", ipywidgets.FloatSlider(0.6, min=0, max=1, step=0.05, description="opacity", **WIDE))
        self.add("only", ipywidgets.Dropdown(options=[ALL], description="class", **WIDE))
        self.random = random.Random(self.studio.experiment.seed)
        self.steps = {name: ipywidgets.Button(description=name) for name in ("previous", "next", "random")}
        for button in self.steps.values():
            button.on_click(lambda pressed: self._guarded(self._go, pressed.description))
        self.add_row(*self.steps.values(), note="steps")
        self.add_upload("domain")
        example = "acdc:night-val@FOLDER"
        self.other = ipywidgets.Text(placeholder=example, description="other", continuous_update=False, **WIDE)
        self.other.observe(lambda change: self._guarded(self._choose, "domain", change.new.strip()), names="value")
        self.add_row(self.other, note="other")

    def follow(self) -> None:
        """The classes to choose from are the domain's."""
        super().follow()
        domain = self.studio.domain(self.controls["domain"].value)
        names = (ALL, *domain.class_set.classes) if domain.has_labels else (ALL,)
        offer(self.controls["only"], {name: name for name in names})

    def _go(self, step: str) -> None:
        """To the picture before or behind that fits, or to the first that does some way ahead."""
        domain, index, only = (self.controls[name].value for name in ("domain", "index", "only"))
        if step == "random":
            index += self.random.randrange(max(1, self.controls["index"].max))
        self.controls["index"].value = self.studio.find(domain, index, -1 if step == "previous" else 1, only)


class AtlasExplorer(Explorer):
    """The swaps of the premise's study; a cell that is clicked opens as a swap of two pictures (`Studio.atlas`)."""

    view = "atlas"
    swap: SwapExplorer | None = None  # the one below

    def build(self) -> None:
        """Makes the controls."""
        self.add("measure", buttons(tuple(MEASURES), "110px"), title="shown")
        self.add("part", buttons(PARTS, "100px"), "cell", "what moves")
        self.add("layer", ipywidgets.Dropdown(options={"pixels": 0}, description="where", **WIDE), "cell")
        self.add("band", ipywidgets.Dropdown(options=tuple(SPANS), description="frequencies", **WIDE), "cell")
        button = ipywidgets.Button(description="open this swap")
        button.on_click(lambda _: self._guarded(self._open))
        self.add_row(titled(""), button, note="open")

    def follow(self) -> None:
        """The choices are what has been measured."""
        rows = self.studio.study().atlas
        layers = {f"layer {row['layer']}" if row["layer"] else "pixels": row["layer"] for row in rows}
        offer(self.controls["layer"], layers)
        offer(self.controls["band"], {row["band"]: row["band"] for row in rows})

    def choose(self, box: int, cell: int) -> None:
        """The cell that is clicked, opened."""
        layers, bands = ([value for _, value in self.controls[name].options] for name in ("layer", "band"))
        layer, band = divmod(cell, len(bands))
        self.set(part=PARTS[box], layer=layers[layer], band=bands[band])
        self._open()

    def _open(self) -> None:
        given = self.arguments()
        space = f"layer {given['layer']}" if given["layer"] else "pixels"
        swap = {"part": given["part"], "space": space, "band": SPANS[given["band"]]}
        self.opened(swap | {"weight": 1.0, "run": "", "content_index": 0, "style_index": 1})  # two streets, as there

    def opened(self, state: dict[str, Any]) -> None:
        """Shows a swap below; under the roof of `Tabs`, in its tab."""
        if self.swap is None:
            self.swap = SwapExplorer(self.studio)
            self.box.children += (self.swap.box,)
        self.swap.set(**state)


VIEWS = {"Swap": SwapExplorer, "Layers": LayerExplorer, "Tokens": TokenExplorer, "Domains": DomainBrowser}
VIEWS |= {"Lens": LensExplorer, "Atlas": AtlasExplorer}


class Tabs:
    """All views under one roof; each is made when it is first looked at."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.made = studio, {}
        self.tab = ipywidgets.Tab(children=[ipywidgets.VBox() for _ in VIEWS], titles=tuple(VIEWS), selected_index=0)
        self.tab.observe(self._open, names="selected_index")
        self.box = with_own_keys(self.tab)
        self._open()

    def _open(self, _: Any = None) -> None:
        place = self.tab.selected_index
        if place is not None and place not in self.made:
            self.made[place] = list(VIEWS.values())[place](self.studio)
            self.made[place].opened = self._swap
            self.tab.children[place].children = (self.made[place].box,)

    def _swap(self, state: dict[str, Any]) -> None:
        """Shows a swap."""
        self.tab.selected_index = list(VIEWS).index("Swap")
        self.made[self.tab.selected_index].set(**state)

    def _ipython_display_(self) -> None:
        display(self.box)
