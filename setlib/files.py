"""Where files live, and how they are written: whole or not at all."""

from __future__ import annotations

import contextlib
import difflib
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import typing
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
VERSION = "0.2.0"  # of setlib; every run folder records it
PROBE_SECONDS = 3.0  # for the hub to answer
LOCK = ".lock"  # in a folder that one process at a time works in
STOPS = (signal.SIGINT, signal.SIGTERM)
STATIC = "SETLIB_STATIC"  # environment variable: nobody moves a slider, explorers show a picture


def peak_bytes() -> int:
    """Largest resident memory of this process so far, bytes; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cache_folder() -> Path:
    """Where converted weights and rendered scenes are kept: SETLIB_CACHE, else ~/.cache/setlib."""
    return Path(os.environ.get("SETLIB_CACHE") or Path.home() / ".cache" / "setlib")


def shown(path: Path, below: Path | None = None) -> str:
    """A path for people: relative to the working folder, or another one, where it lies below it."""
    path, here = Path(path).absolute(), below or Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Writes a file whole or not at all (temporary file, then a rename); the folder is made.

    Raises ValueError naming the path if it cannot be written (full disk, no permission).
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(f"Cannot write {path}: {error.strerror or error}: free space or change the folder.") from None
    return path


def small(path: Path) -> bytes:
    """Content of a file of JSON. Raises ValueError if it is too large to be one of ours, or of a data set's."""
    if path.stat().st_size > 2**26:
        raise ValueError(f"{path.name} holds more than 64 MB")
    return path.read_bytes()


def load_json(path: Path) -> typing.Any:
    """JSON of a file. Raises ValueError naming the file if it is damaged."""
    try:
        return json.loads(small(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete the folder or restore the file.") from None


@contextlib.contextmanager
def alone(lock: Path, patience: float = 10.0) -> Iterator[None]:
    """Keeps other processes out of a folder, by a lock file in it; free when this process is gone, however it went.

    Within a process it may be held several times. Where a file system has no locks, nobody is kept out.
    Raises ValueError naming the process that has held it for `patience` seconds, and where it cannot be written.
    """
    from filelock import FileLock, Timeout

    holder, name = lock.with_suffix(f".holder{LOCK}"), "another process"
    try:
        taken: contextlib.AbstractContextManager = FileLock(lock, is_singleton=True).acquire(timeout=patience)
    except NotImplementedError:
        taken = contextlib.nullcontext()
    except Timeout:
        with contextlib.suppress(OSError):
            name = holder.read_text()
        raise ValueError(f"{shown(lock.parent)} is in use by {name}: wait for it, or use another folder.") from None
    except OSError as error:
        raise ValueError(f"Cannot write {lock}: {error.strerror or error}: free space or change the folder.") from None
    with taken:
        with contextlib.suppress(ValueError):  # a full disk: the name is lost, nothing else
            write_atomic(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield


@contextlib.contextmanager
def on_stop(act: Callable[[int, object], object]) -> Iterator[None]:
    """Calls `act` at the first SIGINT or SIGTERM; from the second on all is as before. Ignored signals stay ignored."""
    caught = threading.current_thread() is threading.main_thread()  # only there can they be
    kinds = [kind for kind in STOPS if caught and signal.getsignal(kind) not in (signal.SIG_IGN, None)]
    with contextlib.ExitStack() as before:

        def first(number: int, frame: object) -> None:
            before.close()
            os.write(2, b"\nstopping; once more: at once\n")
            act(number, frame)

        for kind in kinds:
            before.callback(signal.signal, kind, signal.signal(kind, first))
        yield


def outlive_stops(_: int) -> None:
    """In a worker: a signal to all leaves it ten seconds, in which the process that started it ends its step."""
    for kind in STOPS:
        signal.signal(kind, lambda *_: threading.Timer(10, os._exit, [0]).start())


def cure(error: str, command: str) -> str:
    """The sentence for an error that says that memory is full, with what to lower; "" for another one."""
    if re.search(r"DataLoader worker \(pid|shared memory|terminated abruptly", error):  # at any place of a step
        return "A process that reads pictures was killed, or lacks memory (in /dev/shm too): lower data.workers."
    settings = "data.height and data.width"
    if command in ("train", "ablate", "run"):
        settings += " or train.batch_size, or set train.accumulate or train.checkpointing"
    elif command in ("evaluate", "predict"):
        settings = "inference.windows or inference.scales, or leave inference.whole off"
    is_full = re.search("MemoryError|allocate memory|out of memory", error)
    return f"Out of memory: lower {settings}." if is_full else ""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error sentence: the nearest known names, or all of them."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(choices) or 'none'}"


def hub_answers(endpoint: str) -> bool:
    """Whether the endpoint answers at all within 3 s, the look-up of its name (which has no limit) included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an error status is an answer
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
