"""Commands of setlib in processes of their own, what is done to these, and what must hold of the files they leave.

A process is forked from a server that has imported setlib once: it starts in no time, and dies as any other does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

PATIENCE = 240  # seconds after which a process counts as hanging
SMALL = ("data.height=32", "data.width=64", "data.long_edge=64")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["setlib.__main__", "setlib.analysis.ablation", "setlib.analysis.premise", "faults"])


def _work(argv: list[str], folder: str, log: str, prepare: Callable[[], None] | None) -> None:
    """The new process: a group of its own, in a folder, with its output in a file."""
    os.setsid()
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # of its own processes, as in a Python that begins anew
    for stream, name in ((sys.stdout, 1), (sys.stderr, 2)):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), name)
        stream.reconfigure(line_buffering=True)
    from setlib import __main__ as cli

    if prepare:
        prepare()
    sys.exit(cli.main(argv))


class Command:
    """A running `python -m setlib ...`. prepare: what its process does first, a function of a module."""

    def __init__(self, folder: Path, *argv: object, prepare: Callable[[], None] | None = None) -> None:
        self.log = Path(tempfile.mkstemp(dir=folder, prefix=".log-")[1])
        arguments = [str(word) for word in argv], str(folder), str(self.log), prepare
        self.process = FORKS.Process(target=_work, args=arguments)
        self.process.start()

    def kill(self, kind: signal.Signals = signal.SIGKILL, group: bool = False) -> None:
        """Sends a signal to the process, or to all that it started too."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, kind)

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code; None if it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self) -> int:
        """Waits for the end, which must come, without a traceback, and returns the exit code."""
        code = self.wait()
        if code is None:
            self.kill()
        assert code is not None, f"it hangs:\n{self.output}"
        assert "Traceback" not in self.output and "shows where" not in self.output, self.output
        return code

    def wait_for(self, words: str) -> None:
        """Waits until it has said something."""
        self._wait_until(lambda: words in self.output)

    def wait_for_file(self, path: Path) -> None:
        """Waits until a file is there."""
        self._wait_until(path.is_file)

    def _wait_until(self, found: Callable[[], bool]) -> None:
        for _ in range(100 * PATIENCE):
            if found() or self.wait(0.01) is not None:
                break
        assert found(), self.output

    @property
    def output(self) -> str:
        """What it printed so far, errors among it."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def error(self) -> str:
        """The one sentence that it ended with."""
        lines = [line for line in self.output.splitlines() if "error: " in line]
        assert len(lines) == 1, self.output
        return lines[0].partition("error: ")[2]


def run(folder: Path, *argv: object, **options: object) -> Command:
    """A command that has ended, without a traceback."""
    command = Command(folder, *argv, **options)
    command.end()
    return command


def outside(folder: Path, *argv: object, **environment: str) -> subprocess.CompletedProcess:
    """A command in a fresh Python, where what is read at the start from the environment counts."""
    words = [sys.executable, "-m", "setlib", *map(str, argv)]
    place = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment}
    ended = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, **place)
    assert "Traceback" not in ended.stderr and "shows where" not in ended.stderr, ended.stderr
    return ended


def make_domain(folder: Path, count: int = 4, size: tuple[int, int] = (64, 32), seed: int = 0) -> str:
    """A `folder@` domain of noise with the labels road and sky; size: (w, h)."""
    draw = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / f"images/p{i}.png")
        label = np.where(draw.random(size[::-1]) < 0.5, 0, 10).astype(np.uint8)
        Image.fromarray(label).save(folder / f"labels/p{i}.png")
    return f"folder@{folder}"


# What must hold of files


def visible(folder: Path) -> list[Path]:
    """The files of a folder that are meant to be seen; what begins with a dot is not."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def check_whole(folder: Path) -> None:
    """Every file can be read to its end."""
    for path in visible(folder):
        if path.suffix in (".json", ".ipynb"):
            json.loads(path.read_bytes())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_bytes().splitlines()]
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as saved:
                [saved.get_tensor(name) for name in saved.keys()]  # noqa: SIM118
        elif path.suffix in (".png", ".jpg"):
            Image.open(path).load()
        elif path.suffix == ".csv":
            assert path.read_bytes().endswith(b"\n")


def digest(folder: Path) -> dict[str, str]:
    """The content of every visible file, without what tells the time, the machine or the place."""
    found = {}
    for path in visible(folder):
        content = path.read_bytes().replace(str(folder).encode(), b"HERE")
        if path.suffix == ".safetensors":  # the order of its notes is chance
            with safe_open(path, "np") as saved:
                content = json.dumps(saved.metadata() or {}, sort_keys=True).replace(str(folder), "HERE").encode()
                content += b"".join(name.encode() + saved.get_tensor(name).tobytes() for name in sorted(saved.keys()))
        if path.name == "history.jsonl":
            entries = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def survive(
    make: Callable[[Path], Command], kept: str, folder: Path, kills: int, draw: random.Random, ends: int = 0
) -> int:
    """Kills a command at random moments, gives it again until it ends, and compares what it left with the undisturbed.

    make: starts the command in a folder; kept: the part of the folder that is compared. Returns how often it was
    killed before its end.
    """
    whole, cut = folder / "place", folder / "whole"
    whole.mkdir()
    run(folder, "backbones")  # the server starts
    began = time.monotonic()
    first = make(whole)
    assert first.end() == ends, first.output
    seconds, expected = time.monotonic() - began, digest(whole / kept)
    assert expected
    whole.rename(cut)  # both are made under one path: some files name it
    died = 0
    for _ in range(kills):  # at the latest: most are killed more than once
        if died >= kills:
            break
        shutil.rmtree(folder / "place", ignore_errors=True)
        (folder / "place").mkdir()
        for _ in range(3):
            command = make(folder / "place")
            if command.wait(draw.uniform(0, seconds)) is not None:
                break
            command.kill()
            command.wait()
            died += 1
            check_whole(folder / "place" / kept)
        last = make(folder / "place")
        assert last.end() == ends, last.output
        found = digest(folder / "place" / kept)
        differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        assert not differing, f"{differing} differ from those of the run in {cut}"
    return died


# What is done to a process


def little_memory(more: int) -> None:
    """Lets this process have so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system in memory of a size such as 200k; skips the test where none may be mounted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A folder in which nothing can be written; root is let through by permissions, so it is mounted so."""
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)
        return
    for options in (("--bind",), ("-o", "remount,ro,bind")):
        mounted = subprocess.run(["mount", *options, folder, folder], capture_output=True)
        if mounted.returncode:
            subprocess.run(["umount", "-l", folder], capture_output=True)
            pytest.skip("root is let through by permissions, and may not mount here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
