"""The command line, `python -m setlib`: run, train, evaluate, predict, check, prepare, import, export and others.

Only the standard library is imported until a sub-command starts, so that help and usage errors come at once: the public
names of setlib are when they are used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import setlib
from setlib.files import PROJECT, cure, nearest, on_stop, shown, write_atomic

FREE = (  # after training
    *("data.eval_images", "data.content_seed", "data.eval_edges", "data.on_error", "data.exif_labels"),
    *("model.any_batch", "inference."),
)
SHARED = ("train", "evaluate")  # by several processes
PACKAGES = ("pydantic", "torch", "transformers", "datasets", "papermill")  # without which no command works
ENTER = "enter the environment first: 'source {}/.venv/bin/activate' or 'conda activate setlib' (README.md)"


class Parser(argparse.ArgumentParser):
    """Usage errors as one sentence, with the nearest names that exist."""

    def error(self, message: str) -> None:
        """Raises ValueError in place of printing the usage."""
        wrong = re.search(r"invalid choice: '?([^'\s]+)'?", message)
        known = [choice for action in self._actions for choice in action.choices or ()]
        message = f"unknown command '{wrong[1]}' ({nearest(wrong[1], known)})" if wrong else message
        if re.search("required: (?!COMMAND)[A-Z]", message):
            message += " (names stand first: -o and --target take all words that follow)"
        raise ValueError(f"{message}; see: {self.prog} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line taken apart. Raises ValueError for anything that is not known, naming what is near."""
    many = {"nargs": "+", "action": "extend"}
    base, profile, options, made, target = (Parser(add_help=False) for _ in range(5))
    base.add_argument("--debug", action="store_true", help="show the traceback of an error")
    profile.add_argument("--profile", default="quick", help="smoke, quick (default), gpu-10min, paper or paper-1024")
    text = "any field of the configuration, for example model.refiner=rein"
    options.add_argument("-o", dest="options", metavar="KEY=VALUE", default=[], help=text, **many)
    text = "domains to score on, name[:split][@folder]; default: the profile's or the run's"
    target.add_argument("--target", metavar="DOMAIN", help=text, **many)
    made.add_argument("--run", metavar="DIR", default="", help="run folder; default: runs/<profile>")
    made.add_argument("--source", metavar="DOMAIN", help="domain to train on, name[:split][@folder]")
    made.add_argument("--seed", metavar="N", type=int, help="of weights, order and augmentation; default 0")

    text = "Domain-generalised segmentation with spectral tokens."
    parser = Parser(prog="python -m setlib", description=text, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, call: Callable[[argparse.Namespace], int], *parents: Parser) -> Callable:
        """Adds a sub-command, a function whose docstring is its help, and returns what adds its arguments."""
        options = {"help": call.__doc__, "description": call.__doc__, "parents": [base, *parents]}
        added = commands.add_parser(name, allow_abbrev=False, **options)
        added.set_defaults(call=call)
        return added.add_argument

    everything = (profile, options, made, target)
    argument = add("run", run_command, *everything)
    argument("--only", metavar="NN", default=[], help="notebooks to run, for example 01 03", **many)
    dry = {"dest": "call", "action": "store_const", "const": dry_run, "help": "only say what it needs and what is here"}
    add("train", train_command, *everything)("--dry", **dry)
    add("evaluate", evaluate_command, options, target)("run", metavar="RUN")
    argument = add("predict", predict_command, options)
    argument("run", metavar="RUN", help="run folder")
    argument("images", metavar="IMAGE", nargs="+", type=Path)
    argument("--out", metavar="DIR", type=Path, required=True, help="folder for what is made")
    text = "also a PNG of the label ids of this data set, as test servers take them, and one in its colours: cityscapes"
    argument("--labels", metavar="NAME", default="", help=text)
    argument = add("check", check_command, profile, options)
    argument("domains", metavar="DOMAIN", nargs="+", help="name[:split][@folder]")
    argument("--deep", action="store_true", help="decode every file and count the pixels of the classes")
    argument("--json", metavar="FILE", type=Path, help="write what was found to a file too")
    argument = add("prepare", prepare_command, options)
    argument("domain", metavar="DOMAIN", help="name[:split]@folder")
    argument("--out", metavar="DIR", type=Path, required=True, help="folder for the copy")
    argument("--short-edge", metavar="N", type=int, required=True, help="pixels; smaller ones stay")
    add("ablate", ablate_command, *everything)("--dry", **dry)
    argument = add("premise", premise_command, *everything)
    argument("--layouts", metavar="N", type=int, default=64, help="streets, each in eight styles; default 64")
    argument("--places", metavar="N", type=int, default=10, help="places of swaps, from the pixels on; default 10")
    text = "default: the profile's; each is measured beside one of its shape with random weights"
    argument("--backbone", metavar="NAME", default=[], help=text, **many)
    argument = add("explore", explore_command, profile, target)
    argument("run", metavar="RUN", nargs="?", help="run folder; default: runs/<profile>")
    argument("--port", metavar="N", type=int, default=0, help="default: a free one")
    argument("--no-browser", action="store_true", help="print the address only")
    add("backbones", backbones_command)
    argument = add("import", import_command)
    argument("checkpoint", metavar="CHECKPOINT", type=Path, help=".pth, as released")
    argument("--out", metavar="RUN", type=Path, required=True, help="a new run folder")
    argument("--backbone", metavar="NAME", default="", help="default: the DINOv2 of its size")
    argument = add("export", export_command)
    argument("run", metavar="RUN", help="run folder with the refiner rein or set-released, or none")
    argument("--out", metavar="FILE.pth", type=Path, required=True)
    add("verify", verify_command)("files", metavar="FILE.npz", nargs="+", type=Path)
    argument = add("bench", bench_command)
    argument("--only", metavar="NAME", default=[], help="benches to run; default: all", **many)
    argument("--json", metavar="FILE", type=Path, help="write the rows to a file too")

    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
        if not name:
            parser.error(f"'{unknown[0]}' stands behind an option: {args.command} takes its names first")
        known = [option for action in commands.choices[args.command]._actions for option in action.option_strings]
        parser.error(f"unknown option '{name}' of {args.command} ({nearest(name, known)})")
    return args


def open_run(args: argparse.Namespace, folder: Path | None = None) -> setlib.Run:
    """The run folder of these options, or another one, after everything that can be checked at once is checked.

    Raises ValueError for an unknown backbone, a refiner that is unknown or lacks a package, a domain that cannot be
    used, and a folder of another configuration.
    """
    experiment = setlib.Experiment.build(args.profile, args.source, args.target, args.seed, args.options)
    from setlib.data import domains
    from setlib.data.check import check_labelled
    from setlib.weights.presets import check_name

    check_name(experiment.model.backbone)
    rates = [text.partition("=")[0] for text in experiment.train.refiner_rates]
    variants = [text.split()[0] for text in experiment.ablation.variants]
    for name in (experiment.model.refiner, *variants, *rates):
        setlib.build_refiner(name, (1,), channels=1, num_tokens=2, rank=1)

    domains.check_edges(experiment.data)
    pairs = experiment.transfers if args.command == "ablate" else [(experiment.data.source, experiment.data.targets)]
    for source, targets in pairs:
        specs = [domains.parse(name) for name in (source, *targets)]
        if specs[0].name != "scenes":  # these are rendered when they are used
            domains.load(specs[0].text, experiment.data, role="source")
        if args.command != "train":  # training never opens a target
            check_labelled(targets, replace(experiment.data, source=source))
    return setlib.Run.open(folder or args.run, experiment)


def run_command(args: argparse.Namespace) -> int:
    """Run the notebooks headless, in order, and write the report."""
    from setlib.workbook import notebooks, report

    notebooks.find_notebooks(args.only)
    run, stopped = open_run(args), None
    print(f"Run folder: {shown(run.path)}", flush=True)
    try:
        notebooks.run_notebooks(run, args.only)
    except notebooks.NotebookStopped as error:
        stopped = error
    experiment = run.experiment
    print(f"\nProfile {experiment.profile}, seed {experiment.seed}, backbone {experiment.model.backbone}")
    for rows in (report.cost_rows(run), report.metric_rows(run)):
        if rows[1:]:
            print(f"\n{text_table(rows)}", flush=True)
    print(f"\nReport: {shown(report.write_report(run))}")
    return fail(stopped, 1) if stopped else 0


def premise_command(args: argparse.Namespace) -> int:
    """Measure whether amplitude is style and phase content, at full size; goes on where it was cut short."""
    run = open_run(args)
    from setlib import plots
    from setlib.analysis import premise, verdict
    from setlib.weights.presets import check_name

    for name in args.backbone:
        check_name(name)
    own = run.experiment.model.backbone
    for name in args.backbone or [own]:
        one = run if name == own else run.nested(f"backbones/{Path(name).name}", f"model.backbone={name}")
        for is_control in (False, True):
            found = premise.measure(one, args.layouts, args.places, is_control)
            kind = "random weights" if is_control else "as trained"
            print(f"\n{name}, {kind}, {args.layouts} layouts in {len(found.about['asked']['styles'])} styles\n")
            rows = verdict.share_table(found.shares)
            print(text_table([list(rows[0]), *(list(row.values()) for row in rows)]))
            print(f"\n{verdict.say_verdict(found)}\n{verdict.say_atlas(found)}")
            for title, figure in (("shares", plots.share_maps(found.shares)), ("atlas", plots.atlas(found.atlas))):
                one.save_figure(figure, f"premise_{title}{'_control' * is_control}")
        print(f"\nRows: {shown(one.path / 'premise')}, figures: {shown(one.path / 'figures')}")
    return 0


def ablate_command(args: argparse.Namespace) -> int:
    """Train and score variants x seeds x sources (ablation.*), compare them; goes on where it was cut short."""
    run = open_run(args)
    from setlib import plots
    from setlib.analysis import ablation

    found = ablation.run_ablation(run)
    rows = ablation.differences(found, run.experiment.ablation.baseline)
    print(plots.Table(ablation.cross(rows, ablation.spread(found))))
    print(f"\n{ablation.verdict(rows)}")
    run.write_json("ablation/differences.json", rows)
    run.save_figure(plots.forest(rows), "ablation")
    print(f"\nRows: {shown(run.path / 'ablation' / 'table.csv')}, figures: {shown(run.path / 'figures')}")
    return 0


def train_command(args: argparse.Namespace) -> int:
    """Train on the source; no notebooks, no scores."""
    run = open_run(args)
    from setlib.distributed import state

    model, history = setlib.train(run)
    if not state().is_main_process:
        return 0
    trained = " + ".join(f"{number:,} ({part})" for part, number in model.num_trainable().items())
    loss = f"{history[-1]['loss']:.3f}" if history else "not recorded"
    print(f"{run.experiment.train.steps} steps, last loss {loss}; trained values: {trained}")
    print(f"Model: {shown(run.path / 'model')}\nScore it with: python -m setlib evaluate {shown(run.path)}")
    return 0


def dry_run(args: argparse.Namespace) -> int:
    """Prints what a command needs; 1 if something stands in its way."""
    experiment = setlib.Experiment.build(args.profile, args.source, args.target, args.seed, args.options)
    from setlib.bench.needs import needs
    from setlib.run import default_run_folder

    run = setlib.Run(args.run or default_run_folder(experiment), experiment)
    rows, problems = needs(run, partial(open_run, args), args.command == "ablate")
    print(text_table(rows))
    return max([fail(f"{problem}.", 1) for problem in problems], default=0)


def freely(experiment: setlib.Experiment, options: Sequence[str]) -> setlib.Experiment:
    """A trained model's experiment with options of its use. Raises ValueError for what training settled."""
    if trained := [option for option in options if "=" in option and not option.startswith(FREE)]:
        raise ValueError(f"Option '{trained[0]}' was settled by training: only {', '.join(FREE)} are free.")
    used = experiment.override(*options)
    from setlib.data import domains

    domains.check_edges(used.data)
    return used


def evaluate_command(args: argparse.Namespace) -> int:
    """Score a run's model on its targets or on others."""
    run = setlib.Run.load(args.run)
    targets = args.target or run.experiment.data.targets
    if not targets:
        raise ValueError(f"{run.path} names no targets: name them with --target.")
    scored = setlib.Run(run.path, freely(run.experiment, args.options))
    from setlib.data.check import check_labelled

    check_labelled(targets, scored.experiment.data, every=True)
    from setlib.analysis.scores import write_metrics
    from setlib.checkpoint import use
    from setlib.distributed import state
    from setlib.workbook import report

    with state().main_process_first():
        name, model = run.experiment.model.refiner, setlib.load_segmenter(run.path)
    use(model, scored.experiment)
    scores = setlib.evaluate_run(scored, {name: model}, targets)[name]
    if not state().is_main_process:
        return 0
    write_metrics(run, scores, scored.experiment)
    print(text_table(report.metric_rows(run)))
    if (run.path / "report.html").is_file():
        print(f"Report: {shown(report.write_report(run))}")
    return 0


def predict_command(args: argparse.Namespace) -> int:
    """Predict pictures of up to 268 million pixels: a colour overlay and a PNG of train ids each."""
    run, images = setlib.Run.load(args.run), list(dict.fromkeys(args.images))
    used = freely(run.experiment, args.options)
    for path in images:
        if not path.is_file():
            raise ValueError(f"{path} is a folder: name pictures." if path.is_dir() else f"There is no file {path}.")
    from setlib.workbook import predict

    labels = predict.label_ids(args.labels) if args.labels else None
    outputs = dict(zip(images, predict.output_names(images), strict=True))
    kinds = predict.ALWAYS + predict.WITH_LABELS * bool(labels)
    made = {(args.out / f"{name}_{kind}.png").resolve() for name in outputs.values() for kind in kinds}
    for path in images:
        if path.resolve() in made:
            raise ValueError(f"{path} would be overwritten by a prediction: name another folder with --out.")
    from tqdm import tqdm

    from setlib.checkpoint import use

    model, problems = setlib.load_segmenter(run.path), []
    use(model, used)
    for path, name in tqdm(outputs.items(), desc="predict", unit="img"):
        try:
            for kind, content in predict.predict_picture(model, path, labels).items():
                write_atomic(args.out / f"{name}_{kind}.png", content)
        except ValueError as error:
            problems.append(str(error))
    print(f"{len(images) - len(problems)} of {len(images)} pictures predicted into {args.out}")
    if problems:
        raise ValueError(" ".join(problems))
    return 0


def check_command(args: argparse.Namespace) -> int:
    """Say what a domain holds, and whether it can be used."""
    data = setlib.Experiment.build(args.profile, args.domains[0], args.domains, overrides=args.options).data
    from setlib.data import check

    found = []
    for text in args.domains:
        try:
            parts = check.check(text, data, deep=args.deep)
        except (ValueError, OSError) as error:
            parts = [check.Check(text, problems=[sentence(error)])]
        print(*parts, sep="\n", flush=True)
        found += parts
    unusable = [f"'{one.domain}' cannot be used: {one.problems[0].rstrip('.')}" for one in found if one.problems]
    if not unusable and len(args.domains) > 1:
        shared = check.duplicates(args.domains, data)
        print("\n".join(f"problem: {problem}" for problem in shared[: check.LISTED]), end="\n" * bool(shared))
        found[0].problems += shared
        unusable += shared[:1]
    if args.json:
        print(f"Rows: {write_atomic(args.json, json.dumps([one.to_dict() for one in found], indent=1))}")
    return fail(f"{'; '.join(unusable)}.", 1) if unusable else 0


def prepare_command(args: argparse.Namespace) -> int:
    """Write a resized copy of a domain, in the same tree; goes on where it was cut short."""
    from setlib.data.prepare import prepare

    if args.short_edge < 1:
        raise ValueError(f"A short edge of {args.short_edge} pixels is none: expected at least 1.")
    data = setlib.Experiment.build(overrides=args.options).data
    pairs = prepare(args.domain, args.out, args.short_edge, data)
    spec, _, _ = args.domain.partition("@")
    print(f"{pairs} pictures in {args.out}; use it as {spec}@{args.out}")
    return 0


def explore_command(args: argparse.Namespace) -> int:
    """Open the explorer in the browser: JupyterLab, on this machine alone."""
    from setlib.data import domains
    from setlib.run import default_run_folder
    from setlib.workbook import serve

    if args.run is None:
        experiment = setlib.Experiment.build(args.profile)
        folder = default_run_folder(experiment)
        args.run = folder if (folder / "experiment.json").is_file() else setlib.Run.open(folder, experiment).path
    run = setlib.Run.load(args.run)
    names = [domains.parse(name).text for name in args.target or ()]
    return serve.explore(run, names, args.port, not args.no_browser)


def backbones_command(args: argparse.Namespace) -> int:
    """List the backbones that are known by name, and whether their weights are on this machine."""
    from setlib.weights.presets import PRESETS, is_here

    rows = [["backbone", "M parameters", "patch", "layers", "here", "licence", "from"]]
    for name, preset in PRESETS.items():
        sizes = [f"{preset.millions:.2f}", str(preset.patch), str(preset.layers)]
        rows.append([name, *sizes, "yes" if is_here(name) else "-", preset.licence, preset.source])
    print(text_table(rows))
    print(
        "Name one with -o model.backbone=NAME, or a hub id, a folder of transformers, or a DINOv2 or ViT weight file in"
        " Meta's or timm's layout (.pth, .safetensors). What is not here is fetched from the hub on first use."
    )
    return 0


def import_command(args: argparse.Namespace) -> int:
    """Read a checkpoint of Rein's or SET's release (.pth) into a run folder."""
    from setlib.release import checkpoint as release

    run = release.import_checkpoint(args.checkpoint, args.out, args.backbone)
    model = run.experiment.model
    print(f"{model.refiner} on {model.backbone}: {shown(run.path)}")
    print(f"Score it with: python -m setlib evaluate {shown(run.path)} --target DOMAIN")
    return 0


def export_command(args: argparse.Namespace) -> int:
    """Write a run's model as a checkpoint under the names of the releases."""
    from setlib.release import checkpoint as release

    release.export_checkpoint(setlib.Run.load(args.run), args.out)
    print(f"Checkpoint: {args.out}")
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """Compare refiners and the mask head with golden numbers of the public releases; exit 1 above 1e-5."""
    from setlib.release import parity

    wrong = []
    for path in args.files:
        rows = parity.verify(path)
        wrong += [f"{path}: {row['item']}" for row in rows if not row["difference"] <= parity.TOLERANCE]
        print(text_table([[str(path), "largest difference"], *([r["item"], f"{r['difference']:.1e}"] for r in rows)]))
    return fail(f"above {parity.TOLERANCE:g}: {', '.join(wrong)}", 1) if wrong else 0


def bench_command(args: argparse.Namespace) -> int:
    """Measure speed and memory of the parts, as ratios taken in one run."""
    from setlib.bench import measure as bench

    found = bench.bench(args.only)
    print(", ".join(f"{name} {value}" for name, value in found.items() if value and name != "rows"))
    if found["rows"]:
        print(text_table(bench.table(found["rows"])))
    if not any(row["bench"] == "gpu" for row in found["rows"]) and (not args.only or "gpu" in args.only):
        print("gpu: nothing is measured without a GPU")
    if args.json:
        print(f"Rows: {write_atomic(args.json, json.dumps(found, indent=1))}")
    return 0


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Header and rows as aligned text, columns of words to the left."""
    columns = list(zip(*rows, strict=True))
    left = [not i or all(cell[:1].isalpha() for cell in column[1:]) for i, column in enumerate(columns)]
    widths = [max(map(len, column)) for column in columns]
    form = "  ".join(f"{{:{'<' if words else '>'}{width}}}" for words, width in zip(left, widths, strict=True))
    return "\n".join(form.format(*row).rstrip() for row in rows)


def sentence(error: object) -> str:
    """An error on one line; a system error names its file."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif isinstance(error, UnicodeEncodeError):
        error = f"The name {error.object[: error.end][-80:]!a} is not in UTF-8: rename it, or the folder it lies in"
    return " ".join(str(error).split())


def fail(error: object, code: int) -> int:
    """Prints the one line of an error; returns the exit code."""
    print(f"error: {sentence(error)}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 (a notebook stopped, a domain is unusable), 2 (bad input) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parse(argv)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (args.command not in SHARED or args.call is dry_run):
            raise ValueError("This works in one process: accelerate launch is for train and evaluate, without --dry.")
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise ModuleNotFoundError(name=missing[0])
        with on_stop(signal.default_int_handler):
            return args.call(args)
    except Exception as error:
        if "--debug" in argv:
            raise
        told = cure(text := f"{type(error).__name__}: {error}", argv[0] if argv else "")
        if isinstance(error, ModuleNotFoundError):
            told = f"This Python ({sys.executable}) has no package {error.name}: {ENTER.format(PROJECT)}"
        elif not isinstance(error, (ValueError, OSError)):
            told = told or f"{text} (a damaged file, or an error in setlib: --debug shows where)"
        return fail(told or error, 2)
    except KeyboardInterrupt:
        return fail(f"stopped; what is finished is kept; go on with: python -m setlib {shlex.join(argv)}", 130)


if __name__ == "__main__":
    sys.exit(main())
