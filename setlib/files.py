"""Where files live, and how they are written: whole or not at all."""

from __future__ import annotations

import contextlib
import difflib
import http.client
import json
import os
import sys
import threading
import typing
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
VERSION = "0.2.0"  # of setlib; every run folder records it
PROBE_SECONDS = 3.0  # for the hub to answer
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


def shown(path: Path) -> str:
    """A path for people: relative to the working folder where it lies below it."""
    path, here = Path(path).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


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
        raise ValueError(
            f"Cannot write {path}: {error.strerror or error}: choose another folder or free some space."
        ) from None
    return path


def load_json(path: Path) -> typing.Any:
    """JSON of a file. Raises ValueError naming the file if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): delete the folder or restore the file.") from None


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
