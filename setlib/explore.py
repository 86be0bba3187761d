"""The explorer's widgets: thin, over the pure views of `views.py`. What a widget shows, one line of Python shows too.

Under papermill, where nobody moves a slider, the same cells show the chosen state as a picture.
"""

from __future__ import annotations

import html
import os
import random
from collections.abc import Callable
from typing import Any

import anywidget
import ipywidgets
import traitlets
from IPython.display import HTML, display

from setlib.analysis import PARTS
from setlib.boards import WIDTH, Board
from setlib.files import write_atomic
from setlib.material import shown
from setlib.views import ALL, HIGHEST, Studio

STATIC = "SETLIB_STATIC"  # environment variable: show pictures, no widgets
MOST_BYTES, CHUNK = 200_000_000, 4_000_000  # of an uploaded file, and of a message: servers refuse long ones
NOTES = {  # what each control means
    "content": "The picture whose spectrum is changed: a domain, then one of its pictures.",
    "style": "The picture that lends a part of its spectrum; it is cut to the content's size.",
    "part": "A Fourier transform writes a picture as a sum of waves: amplitude is how strong each wave is, phase where "
    "its crests lie. The method rests on the idea that the first carries style and the second content.",
    "space": "Where the swap happens: in the pixels, or in what the backbone has made of them after one of its layers. "
    "Features are shown by their three strongest components, as red, green and blue: equal colours, similar features.",
    "band": "Which waves move. 0 is the mean of the picture, 1 the finest stripes along an axis, 1.5 everything. The "
    "rings in the spectra show the band; zero frequency is in their middle.",
    "weight": "How far the content goes towards the style: 0 changes nothing, 1 takes the style's part as it is.",
    "run": "The folder of a trained run, such as runs/quick: its model says what it sees before and after. mIoU is the "
    "overlap of prediction and label, 100 % = equal, averaged over the classes. Empty: no model.",
    "upload": "A picture of yours: press the button, or drag a file onto it. It stays in the run folder.",
    "first": "A domain and one of its pictures. Rendered streets have the same number in every style.",
    "second": "What it is compared with: the same number of another style changes style alone, another number content.",
    "layer": "What is looked at: the pixels, or the features after one of the backbone's layers.",
    "domain": "A set of pictures of one kind, such as night or fog; then one of its pictures.",
    "place": "The refiner stands behind some layers; here is where its tokens are read.",
    "branch": "The part that these tokens refine: amplitude, phase, or the patches themselves.",
    "token": "A learned vector that features attend to; sorted by influence: mean share of the attention times what it "
    "adds.",
    "opacity": "How strongly the label's colours cover the picture.",
    "only": "Colours one class alone; next, previous and random then stop at pictures that hold it.",
    "code": "This line makes the same picture without widgets: copy it into a script or a cell.",
}
WIDE = {"style": {"description_width": "92px"}, "layout": ipywidgets.Layout(width="410px")}


class Upload(anywidget.AnyWidget):
    """A button for a picture file that also takes a dropped one. The file comes in pieces; `receive(bytes, name)`."""

    _esm = """
    export default { render({ model, el }) {
      const input = document.createElement("input");
      Object.assign(input, { type: "file", accept: "image/*", title: model.get("note") });
      input.setAttribute("aria-label", "picture of yours");
      input.style.width = "100%";
      input.addEventListener("change", async () => {
        const file = input.files[0];
        if (!file) return;
        const most = model.get("most"), size = model.get("chunk");
        if (file.size > most) { model.send({ name: file.name, refused: file.size }); return; }
        for (let at = 0; at === 0 || at < file.size; at += size) {
          const part = await file.slice(at, at + size).arrayBuffer();
          model.send({ name: file.name, first: at === 0, last: at + size >= file.size }, undefined, [part]);
        }
        input.value = "";
      });
      el.appendChild(input);
    } };
    """
    note = traitlets.Unicode(NOTES["upload"]).tag(sync=True)
    most = traitlets.Int(MOST_BYTES).tag(sync=True)
    chunk = traitlets.Int(CHUNK).tag(sync=True)

    def __init__(self, receive: Callable[[bytes, str], None], refuse: Callable[[str], None]) -> None:
        super().__init__(layout=ipywidgets.Layout(width="310px"))
        self.receive, self.refuse, self.parts = receive, refuse, b""
        self.on_msg(self._take)

    def _take(self, _: Any, content: dict, buffers: list) -> None:
        if "refused" in content:
            megabytes = content["refused"] / 1e6
            self.refuse(
                f"'{content['name']}' has {megabytes:.0f} MB: choose a file of under {MOST_BYTES / 1e6:.0f} MB."
            )
            return
        self.parts = (b"" if content["first"] else self.parts) + bytes(buffers[0])
        if content["last"]:
            whole, self.parts = self.parts, b""
            self.receive(whole, content["name"])


class OwnKeys(anywidget.AnyWidget):
    """Keeps JupyterLab's one-letter commands and arrows away from whatever has the focus in the box around it."""

    _esm = """
    export default { render({ el }) {
      const own = (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true");
      const attach = () => {
        const box = el.closest(".setlib-keys");
        if (box) box.addEventListener("focusin", own); else setTimeout(attach, 50);
      };
      attach();
    } };
    """


def with_own_keys(*children: Any) -> ipywidgets.VBox:
    """A box whose widgets get every key that is pressed in them."""
    box = ipywidgets.VBox([*children, OwnKeys(layout=ipywidgets.Layout(display="none"))])
    box.add_class("setlib-keys")
    return box


class Explorer:
    """Base of the four: controls whose values are the arguments of one view, and what the view shows.

    `render` is the view; `show` displays the widgets, which draw again on every change. A front end sends a slider's
    next position once the last one is drawn, so positions in between are dropped, not queued. A problem is a sentence
    above the picture, which stays as it was.
    """

    view = ""

    def __init__(self, studio: Studio, **state: Any) -> None:
        self.studio, self.controls, self.rows = studio, {}, []
        self.options = {name: name for name in studio.names}  # of domains: as shown -> name
        exact = ipywidgets.Layout(width=f"{WIDTH}px", max_width="100%")
        self.picture, self.message = ipywidgets.Image(format="jpeg", layout=exact), ipywidgets.HTML()
        self.words, self.note = ipywidgets.HTML(), ipywidgets.HTML()
        self.code = ipywidgets.Text(
            description="as Python", style=WIDE["style"], layout=ipywidgets.Layout(width="780px")
        )
        self.save = ipywidgets.Button(description="save", tooltip="Saves the picture as PNG, and this line of Python")
        self.save.on_click(lambda _: self._guarded(self._save))
        self._busy, self._noted, self.lasting = True, "", ""  # lasting: a problem that stays
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
        """Fits the controls' choices to each other's values, before a drawing."""
        for name in ("content", "style", "first", "second", "domain"):
            if name in self.controls:
                index = self.controls["index" if name == "domain" else f"{name}_index"]
                index.max = len(self.studio.domain(self.controls[name].value)) - 1

    def arguments(self) -> dict[str, Any]:
        """What the controls say, as the view's arguments."""
        return {name: widget.value for name, widget in self.controls.items()}

    # What all share

    def render(self, **arguments: Any) -> Board:
        """The view itself; see `Studio`."""
        return getattr(self.studio, self.view)(**arguments)

    def board(self) -> Board:
        """The view at what the controls say."""
        return self.render(**self.arguments())

    def set(self, **state: Any) -> None:
        """Sets controls by name, and draws. Raises ValueError for an unknown one."""
        if unknown := set(state) - set(self.controls):
            raise ValueError(f"Unknown {unknown.pop()}: the controls are {', '.join(self.controls)}.")
        self._busy = True
        for name in (name for name in self.controls if name in state):
            self._guarded(self.follow)
            self.controls[name].value = state[name]
        self._busy = False
        self.update()

    def line(self) -> str:
        """One line of Python that makes the picture shown."""
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments().items())
        return f"from setlib.views import Studio; Studio.open({shown(self.studio.run.path)!r}).{self.view}({given})"

    def update(self, _: Any = None) -> None:
        """Draws what the controls say."""
        if not self._busy:
            self._busy = True
            self._guarded(self._draw)
            self._busy = False

    def show(self) -> None:
        """Displays the widgets; the picture alone where SETLIB_STATIC is set (under papermill)."""
        if not os.environ.get(STATIC):
            display(self.box)
        elif self.message.value:
            display(HTML(self.message.value))
        else:
            display(self.board())

    def _draw(self) -> None:
        self.follow()
        board = self.board()
        self.picture.value, self.words.value = board.jpeg(), _sentence(board.words)
        self.code.value = self.line()

    def _save(self) -> None:
        folder, board = self.studio.run.path / "saved", self.board()
        number = 1 + max((int(p.stem.rpartition("-")[2]) for p in folder.glob(f"{self.view}-*.png")), default=0)
        path = write_atomic(folder / f"{self.view}-{number}.png", board.png(self.line()))
        write_atomic(path.with_suffix(".py"), f"{self.line()}.savefig({path.name!r})\n")
        self.say(f"Saved {shown(path)}, and the line of Python that makes it beside it.")

    def _guarded(self, action: Callable[[], object]) -> None:
        """Does it; a problem becomes the message, since a widget's callback has nowhere else to say it."""
        try:
            self.message.value = _sentence(self.lasting, bold=True)
            action()
        except Exception as problem:
            self.say(f"{type(problem).__name__ * (not isinstance(problem, ValueError))} {problem}".strip(), True)

    def say(self, text: str, is_problem: bool = False) -> None:
        """A sentence above the picture."""
        self.message.value = _sentence(("⚠ " if is_problem else "") + text, bold=True)

    def add(self, name: str, widget: Any, note: str = "", title: str = "") -> None:
        """A control of the view's argument `name`, with a "?" that shows its note; title: where it has none itself."""
        self.controls[name] = widget
        row = [*([_title(title)] if title else []), widget, self._help(note or name)]
        self.rows.append(ipywidgets.HBox(row, layout=ipywidgets.Layout(min_width="475px")).add_class("setlib-control"))

    def add_picture(self, name: str, title: str = "", index: str = "", value: str | None = None) -> None:
        """A domain and a picture's number."""
        choice = ipywidgets.Dropdown(
            options=dict(self.options), value=value or self.studio.names[0], description=title or name, **WIDE
        )
        self.add(name, choice)
        slider = ipywidgets.IntSlider(0, 0, 0, description="picture", **WIDE)
        self.add(index or f"{name}_index", slider, name)

    def known_spaces(self) -> list[str]:
        """The pixels and the layers; the pixels alone, with a sentence, where the backbone is missing."""
        try:
            return self.studio.spaces()
        except (ValueError, OSError) as problem:
            self.lasting = f"Only pixels can be looked at: {problem}"
            return ["pixels"]

    def add_run(self, value: str = "") -> None:
        """The folder of a trained run."""
        options = {"options": self.studio.runs(), "placeholder": "none; for example runs/quick"}
        widget = ipywidgets.Combobox(value=value, description="trained run", continuous_update=False, **options, **WIDE)
        self.add("run", widget)

    def add_upload(self, *names: str) -> None:
        """A button that brings a picture into the choices of the domains `names`; the first one then shows it."""

        def receive(content: bytes, name: str) -> None:
            self._guarded(lambda: take(content, name))

        def take(content: bytes, name: str) -> None:
            domain, done = self.studio.add_upload(content, name)
            self.options[f"uploaded: {name}"] = domain
            self._busy = True
            for control in names:
                kept = self.controls[control].value
                self.controls[control].options = dict(self.options)
                self.controls[control].value = domain if control == names[0] else kept
            self._busy = False
            self._draw()
            self.say(f"Uploaded '{name}'{f' ({done})' if done else ''} as {names[0]}.")

        self.upload = Upload(receive, lambda text: self.say(text, True))
        self.rows.append(ipywidgets.HBox([_title("upload"), self.upload, self._help("upload")]))

    def _help(self, name: str) -> ipywidgets.Button:
        """The "?" that shows a note and hides it again."""
        button = ipywidgets.Button(description="?", tooltip=NOTES[name], layout=ipywidgets.Layout(width="30px"))

        def toggle(_: Any) -> None:
            self._noted = "" if self._noted == name else name
            self.note.value = _sentence(NOTES[name]) if self._noted else ""

        button.on_click(toggle)
        return button


class SwapExplorer(Explorer):
    """Moves amplitude or phase of one picture towards another's, in its pixels or after a layer (`Studio.swap`)."""

    view = "swap"

    def build(self) -> None:
        """Makes the controls."""
        self.add_picture("content")
        self.add_picture("style", value=self.studio.names[-1])
        self.add("part", _buttons(PARTS, "100px"), title="what moves")
        self.add("space", ipywidgets.Dropdown(options=self.known_spaces(), description="where", **WIDE))
        band = ipywidgets.FloatRangeSlider(
            value=(0, HIGHEST), min=0, max=HIGHEST, step=0.01, description="frequencies", **WIDE
        )
        self.add("band", band)
        self.add("weight", ipywidgets.FloatSlider(1, min=0, max=1, step=0.05, description="weight", **WIDE))
        self.add_run()
        self.add_upload("content", "style")

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
        self.add_run()
        self.add_upload("second", "first")
        layers = {name.removeprefix("layer "): name for name in self.known_spaces()}
        self.add("space", _buttons(layers, "56px"), "layer", "layer")


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
        run, domain, index = (self.controls[name].value for name in ("run", "domain", "index"))
        known = self.studio.places(run, domain, index)
        layer = _offer(self.controls["layer"], {f"layer {n}": n for n in known}, last=True)
        branch = _offer(self.controls["branch"], {name: name for name in known[layer]})
        ranking = self.studio.ranking(run, domain, index, layer, branch)
        _offer(self.controls["token"], {f"token {m} (influence {value:.3g})": m for m, value in ranking})
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
        self.rows.append(ipywidgets.HBox(list(self.steps.values()), layout=ipywidgets.Layout(min_width="475px")))
        self.add_upload("domain")

    def follow(self) -> None:
        """The classes to choose from are the domain's."""
        super().follow()
        domain = self.studio.domain(self.controls["domain"].value)
        names = (ALL, *domain.class_set.classes) if domain.has_labels else (ALL,)
        _offer(self.controls["only"], {name: name for name in names})

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


def _title(text: str) -> Any:
    """The name of a control, as wide as the others'."""
    width = WIDE["style"]["description_width"]
    return ipywidgets.Label(text, layout=ipywidgets.Layout(width=width, display="flex", justify_content="flex-end"))


def _buttons(options: Any, width: str) -> Any:
    """A choice of which all options are seen at once."""
    made = ipywidgets.ToggleButtons(options=options, layout=ipywidgets.Layout(width="auto"))
    made.style.button_width = width
    return made


def _offer(widget: Any, options: dict[str, Any], last: bool = False) -> Any:
    """Gives a choice these options, keeping its value where it is among them; returns its value."""
    if widget.options != tuple(options.items()):
        kept = widget.value
        widget.options = tuple(options.items())
        values = list(options.values())
        widget.value = kept if kept in values else values[-1 if last else 0]
    return widget.value


def _sentence(text: str, bold: bool = False) -> str:
    style = "line-height:1.4;white-space:normal" + ";font-weight:600" * bold
    return f'<div role="status" style="{style}">{html.escape(text, quote=False)}</div>' if text else ""
