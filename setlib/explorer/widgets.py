"""The explorer's widgets: thin, over the pure views of `views.py`. What a widget shows, one line of Python shows too.

Under papermill, where nobody moves a slider, the same cells show the chosen state as a picture.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets
import traitlets
from IPython.display import HTML, display

from setlib.analysis.spectra import PARTS
from setlib.explorer.board import WIDTH, Board
from setlib.explorer.controls import NOTES, WIDE, Upload, buttons, offer, sentence, titled, with_own_keys
from setlib.explorer.material import find_folder, shown
from setlib.explorer.studio import ALL, HIGHEST, Studio
from setlib.files import STATIC, write_atomic


class Explorer:
    """Base of the four: controls whose values are the arguments of one view, and what the view shows.

    `render` is the view; `show` displays the widgets, which draw again on every change. A front end sends a slider's
    next position once the last one is drawn, so positions in between are dropped, not queued. A problem is a sentence
    above the picture, which stays as it was.
    """

    view = ""

    def __init__(self, studio: Studio, **state: Any) -> None:
        self.studio, self.controls, self.rows = studio, {}, []
        exact = ipywidgets.Layout(width=f"{WIDTH}px", max_width="100%")
        self.picture, self.message = ipywidgets.Image(format="jpeg", layout=exact), ipywidgets.HTML()
        self.words, self.note = ipywidgets.HTML(), ipywidgets.HTML()
        self.code = ipywidgets.Text(
            description="as Python", style=WIDE["style"], layout=ipywidgets.Layout(width="780px")
        )
        self.save = ipywidgets.Button(description="save", tooltip="Saves the picture as PNG, and this line of Python")
        self.save.on_click(lambda _: self._guarded(self._save))
        self._busy, self._noted, self._said, self._missing = True, "", "", ""
        self.build()
        self._busy = False
        for widget in self.controls.values():
            widget.observe(self.update, names="value")
        bottom = [ipywidgets.HBox([self.code, self._help("code"), self.save])]
        wrapped = ipywidgets.Box(self.rows, layout=ipywidgets.Layout(flex_flow="row wrap"))
        status = [self.note, self.message, self.words]
        self.box = with_own_keys(wrapped, *status, self.picture, *bottom)
        self.box.layout.max_width = "980px"
        self.box.add_class(f"setlib-{self.view}")
        self.set(**state)

    # Subclasses

    def build(self) -> None:
        """Makes the controls, with `add`."""
        raise NotImplementedError

    def follow(self) -> None:
        """Fits the controls' choices to each other's values and to what is known by now, before a drawing."""
        for name in ("content", "style", "first", "second", "domain"):
            if name in self.controls:
                offer(self.controls[name], self.studio.choices)
                index = self.controls["index" if name == "domain" else f"{name}_index"]
                index.max = len(self.studio.domain(self.controls[name].value)) - 1
        if "space" in self.controls:
            offer(self.controls["space"], {self.named(space): space for space in self._spaces()})

    def named(self, space: str) -> str:
        """How a layer is called among the choices."""
        return space

    def arguments(self) -> dict[str, Any]:
        """What the controls say, as the view's arguments."""
        given = {name: widget.value for name, widget in self.controls.items()}
        run = given.get("run", "").strip().strip("'\"")
        return given | ({"run": run and shown(find_folder(run))} if "run" in given else {})

    # What all share

    def render(self, **arguments: Any) -> Board:
        """The view itself; see `Studio`."""
        return getattr(self.studio, self.view)(**arguments)

    def board(self) -> Board:
        """The view at what the controls say."""
        return self.render(**self.arguments())

    def set(self, **state: Any) -> None:
        """Sets controls by name, and draws. Raises ValueError for an unknown one, or a value that is no choice."""
        if unknown := set(state) - set(self.controls):
            raise ValueError(f"Unknown {unknown.pop()}: the controls are {', '.join(self.controls)}.")
        with self._quietly():
            for name in (name for name in self.controls if name in state):
                self._guarded(self.follow)
                try:
                    self.controls[name].value = state[name]
                except traitlets.TraitError as error:
                    raise ValueError(f"The control {name} cannot be {state[name]!r} ({error}).") from None
        self.update()

    def line(self) -> str:
        """One line of Python that makes the picture shown."""
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments().items())
        return f"from setlib import Studio; Studio.open({shown(self.studio.run.path)!r}).{self.view}({given})"

    def update(self, _: Any = None) -> None:
        """Draws what the controls say."""
        if not self._busy:
            with self._quietly():
                self._guarded(self._draw)

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """Controls that change meanwhile draw nothing."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def show(self) -> None:
        """Displays the widgets; the picture alone where SETLIB_STATIC is set (under papermill)."""
        if not os.environ.get(STATIC):
            display(self.box)
            return
        if self.message.value:
            display(HTML(self.message.value))
        if self.picture.value:
            display(self.board())

    def _draw(self) -> None:
        self.follow()
        board = self.board()
        self.picture.value, self.words.value = board.jpeg(), sentence(board.words)
        self.code.value = self.line()

    def _save(self) -> None:
        folder, board = self.studio.run.path / "saved", self.board()
        if not self.studio.run.path.is_dir():
            raise ValueError(f"The run folder {self.studio.run.path} is gone: open the explorer anew.")
        ends = [path.stem.removeprefix(f"{self.view}-") for path in folder.glob(f"{self.view}-*.png")]
        number = 1 + max((int(end) for end in ends if end.isdecimal()), default=0)
        path = folder / f"{self.view}-{number}.png"
        write_atomic(path.with_suffix(".py"), f"{self.line()}.savefig({path.name!r})\n")
        try:
            write_atomic(path, board.png(self.line()))
        except ValueError:
            path.with_suffix(".py").unlink()
            raise
        self.say(f"Saved {shown(path)}, and the line of Python that makes it beside it.")

    def _guarded(self, action: Callable[[], object]) -> None:
        """Does it; a problem becomes the message, since a widget's callback has nowhere else to say it."""
        self._said = ""
        try:
            action()
        except Exception as problem:
            self.say(f"{type(problem).__name__ * (not isinstance(problem, ValueError))} {problem}".strip(), True)
        if not self._said:
            self.message.value = ""
            if self._missing and self.controls["space"].options[1:] == ():
                self.say(self._missing, True)

    def say(self, text: str, is_problem: bool = False) -> None:
        """A sentence above the picture."""
        self._said = ("⚠ " if is_problem else "") + text
        self.message.value = sentence(self._said, bold=True)

    def add(self, name: str, widget: Any, note: str = "", title: str = "") -> None:
        """A control of the view's argument `name`, with a "?" that shows its note; title: where it has none itself."""
        self.controls[name] = widget
        row = [*([titled(title)] if title else []), widget, self._help(note or name)]
        self.rows.append(ipywidgets.HBox(row, layout=ipywidgets.Layout(min_width="475px")).add_class("setlib-control"))

    def add_picture(self, name: str, title: str = "", index: str = "", value: str | None = None) -> None:
        """A domain and a picture's number."""
        options = tuple(self.studio.choices.items())
        choice = ipywidgets.Dropdown(options=options, value=value or options[0][1], description=title or name, **WIDE)
        self.add(name, choice)
        slider = ipywidgets.IntSlider(0, 0, 0, description="picture", **WIDE)
        self.add(index or f"{name}_index", slider, name)

    def _spaces(self) -> list[str]:
        """The pixels and the layers of the chosen run; the pixels alone where the backbone is missing."""
        run = Explorer.arguments(self)["run"] if "run" in self.controls else ""
        if self._missing and not run:
            return ["pixels"]
        try:
            return self.studio.spaces(run)
        except (ValueError, OSError) as problem:
            if run:
                raise
            self._missing = f"Only pixels can be looked at: {problem}"
            return ["pixels"]

    def add_run(self, value: str = "", note: str = "run") -> None:
        """The folder of a trained run."""
        options = {"options": self.studio.runs(), "placeholder": "none; for example runs/quick"}
        widget = ipywidgets.Combobox(value=value, description="trained run", continuous_update=False, **options, **WIDE)
        self.add("run", widget, note)

    def add_upload(self, control: str) -> None:
        """A button that brings a picture into the choices of every view; the control of this name then shows it."""

        def receive(content: bytes, name: str) -> None:
            self._guarded(lambda: take(content, name))

        def take(content: bytes, name: str) -> None:
            """Shows it as the control, and says so."""
            domain, done = self.studio.add_upload(content, name)
            self._choose(control, domain)
            self.say(f"Uploaded '{name}'{f' ({done})' if done else ''} as {control}.")

        self.upload = Upload(receive, lambda text: self.say(text, True))
        self.rows.append(ipywidgets.HBox([titled("upload"), self.upload, self._help("upload")]))

    def _choose(self, control: str, domain: str) -> None:
        """Shows a domain that has just become a choice."""
        with self._quietly():
            self.follow()
            self.controls[control].value = domain
            self._draw()

    def _help(self, name: str) -> ipywidgets.Button:
        """The "?" that shows a note and hides it again."""
        button = ipywidgets.Button(description="?", tooltip=NOTES[name], layout=ipywidgets.Layout(width="30px"))

        def toggle(_: Any) -> None:
            self._noted = "" if self._noted == name else name
            self.note.value = sentence(NOTES[name]) if self._noted else ""

        button.on_click(toggle)
        return button


class SwapExplorer(Explorer):
    """Moves amplitude or phase of one picture towards another's, in its pixels or after a layer (`Studio.swap`)."""

    view = "swap"

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("content")
        self.add_picture("style", value=self.studio.names[-1])
        self.add("part", buttons(PARTS, "100px"), title="what moves")
        self.add("space", ipywidgets.Dropdown(options=["pixels"], description="where", **WIDE))
        band = ipywidgets.FloatRangeSlider(
            value=(0, HIGHEST), min=0, max=HIGHEST, step=0.01, description="frequencies", **WIDE
        )
        self.add("band", band)
        self.add("weight", ipywidgets.FloatSlider(1, min=0, max=1, step=0.05, description="weight", **WIDE))
        self.add_run()
        self.add_upload("content")

    def arguments(self) -> dict[str, Any]:
        """The band as its two ends."""
        given = super().arguments()
        low, high = given.pop("band")
        return given | {"low": round(low, 2), "high": round(high, 2), "weight": round(given["weight"], 2)}


class LayerExplorer(Explorer):
    """How far two pictures lie apart in amplitude and phase, layer by layer, and where (`Studio.layers`)."""

    view = "layers"

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("first")
        self.add_picture("second", value=self.studio.names[-1])
        self.add_run(note="features")
        self.add_upload("second")
        self.add("space", buttons({"pixels": "pixels"}, "59px"), "layer", "layer")

    def named(self, space: str) -> str:
        """The number alone: there are many."""
        return space.removeprefix("layer ")


class TokenExplorer(Explorer):
    """Where a token attends over spectrum and picture, and what changes without it (`Studio.tokens`)."""

    view = "tokens"

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("domain", index="index")
        self.add_run(self.studio.own())
        self.add("layer", ipywidgets.Dropdown(description="after layer", **WIDE), "place")
        self.add("branch", ipywidgets.Dropdown(description="branch", **WIDE))
        self.add("token", ipywidgets.Dropdown(description="token", **WIDE))

    place: tuple | None = None  # run, layer and branch whose tokens are shown

    def follow(self) -> None:
        """The choices of layer, branch and token are those of the run; tokens are sorted by influence."""
        super().follow()
        given = self.arguments()
        run, domain, index = (given[name] for name in ("run", "domain", "index"))
        known = self.studio.places(run, domain, index)
        layer = offer(self.controls["layer"], {f"layer {n}": n for n in known}, last=True)
        branch = offer(self.controls["branch"], {name: name for name in known[layer]})
        ranking = self.studio.ranking(run, domain, index, layer, branch)
        offer(self.controls["token"], {f"token {m} (influence {value:.3g})": m for m, value in ranking})
        if self.place != (run, layer, branch):  # other tokens: the strongest of them
            self.place = run, layer, branch
            self.controls["token"].value = ranking[0][0]


class DomainBrowser(Explorer):
    """The pictures of a domain with their labels, filtered by class (`Studio.browse`)."""

    view = "browse"

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("domain", index="index")
        self.add("opacity", ipywidgets.FloatSlider(0.6, min=0, max=1, step=0.05, description="opacity", **WIDE))
        self.add("only", ipywidgets.Dropdown(options=[ALL], description="class", **WIDE))
        self.random = random.Random(self.studio.experiment.seed)
        steps = {"previous": lambda: -1, "next": lambda: 1, "random": self._far}
        self.steps = {name: ipywidgets.Button(description=name) for name in steps}
        for name, step in steps.items():
            self.steps[name].on_click(lambda _, step=step: self._guarded(lambda: self._go(step())))
        row = [*self.steps.values(), self._help("steps")]
        self.rows.append(ipywidgets.HBox(row, layout=ipywidgets.Layout(min_width="475px")))
        self.add_upload("domain")
        self.other = ipywidgets.Text(
            placeholder="acdc:night-val@FOLDER", description="other", continuous_update=False, **WIDE
        )
        self.other.observe(lambda change: self._guarded(lambda: self._add(change.new.strip())), names="value")
        self.rows.append(ipywidgets.HBox([self.other, self._help("other")]).add_class("setlib-control"))

    def arguments(self) -> dict[str, Any]:
        """The opacity to two digits."""
        given = super().arguments()
        return given | {"opacity": round(given["opacity"], 2)}

    def _add(self, domain: str) -> None:
        if domain:
            self.studio.add_domain(domain)
            self._choose("domain", domain)

    def follow(self) -> None:
        """The classes to choose from are the domain's."""
        super().follow()
        domain = self.studio.domain(self.controls["domain"].value)
        names = (ALL, *domain.class_set.classes) if domain.has_labels else (ALL,)
        offer(self.controls["only"], {name: name for name in names})

    def _far(self) -> int:
        """Some way ahead, before the next picture that fits is looked for."""
        count = self.controls["index"].max
        return self.random.randint(1, count) if count else 1

    def _go(self, step: int) -> None:
        domain, index, only = (self.controls[name].value for name in ("domain", "index", "only"))
        start, way = (index, step) if abs(step) == 1 else (index + step - 1, 1)
        self.controls["index"].value = self.studio.find(domain, start, way, only)


VIEWS = {
    "Swap": SwapExplorer,
    "Layers": LayerExplorer,
    "Tokens": TokenExplorer,
    "Domains": DomainBrowser,
}


class Tabs:
    """The four views under one roof; each is made when it is first looked at."""

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
            self.tab.children[place].children = (self.made[place].box,)

    def _ipython_display_(self) -> None:
        display(self.box)
