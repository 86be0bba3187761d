"""JupyterLab on this machine: the kernel of the notebooks, the command that serves them, the explorer's notebook."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from setlib.files import PROJECT, STATIC, write_atomic
from setlib.run import Run

EXPLORER = """# Press Shift + Enter.
import os

from setlib.explorer.widgets import Tabs
from setlib.explorer.studio import Studio

os.chdir({here!r})
Tabs(Studio.open({names}))"""


@contextmanager
def this_python(headless: bool = False) -> Iterator[dict[str, str]]:
    """Makes the kernel called python3 this interpreter with this setlib, whatever kernels the user has installed.

    headless: nobody moves a slider: the explorers show a picture. Yields what was added to the environment.
    """
    from ipykernel.kernelspec import get_kernel_dict

    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # an inherited Agg would drop every figure
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the debugger warns at every start
        "TQDM_MININTERVAL": "0.5" if sys.stderr.isatty() else "10",  # seconds; a log needs fewer lines than an eye
        STATIC: "1" if headless else "",
    }
    spec = get_kernel_dict() | {"env": environment}
    if headless:
        spec["argv"].append("--log-level=CRITICAL")  # its warnings are about Jupyter's own plumbing
    before = os.environ.get("JUPYTER_PATH", "")
    with tempfile.TemporaryDirectory(prefix="setlib-kernel-") as folder:
        write_atomic(Path(folder) / "kernels" / "python3" / "kernel.json", json.dumps(spec))
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield {"JUPYTER_PATH": os.environ["JUPYTER_PATH"]}
        finally:
            os.environ["JUPYTER_PATH"] = before  # empty means none


def explore(run: Run, domains: Sequence[str], port: int, open_browser: bool) -> int:
    """Serves the explorer's notebook until it is interrupted. Raises ValueError as `lab_command` does."""
    with this_python():
        command, address, token = lab_command(run.path, open_browser, port, "explore.ipynb")
        write_explorer(run, domains)
        print(f"{address}/doc/tree/explore.ipynb?token={token}\nPress Ctrl-C to stop.", flush=True)
        server = subprocess.Popen(command)
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait()


def lab_command(
    folder: Path, open_browser: bool = True, port: int = 0, notebook: str = ""
) -> tuple[list[str], str, str]:
    """The command that serves a folder's notebooks in JupyterLab to this machine alone; its address and its token.

    port: 0 = a free one. notebook: is opened, in JupyterLab's simple mode, with nothing around it.
    Raises ValueError for a port that cannot be had.
    """
    with socket.socket() as free:
        try:
            free.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise ValueError(f"Port {port} is in use or not allowed: give another, or leave it out.") from None
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder.absolute(),
        "ServerApp.open_browser": open_browser,
        "ServerApp.allow_root": True,
        "ServerApp.answer_yes": True,
        "ServerApp.log_level": "WARN",
        "IdentityProvider.token": token,
        "LabApp.default_url": f"/doc/tree/{notebook}" if notebook else "/lab",
        "LabApp.news_url": None,
        "LabApp.extension_manager": "readonly",  # asks no index
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    return command, f"http://127.0.0.1:{port}", token


def write_explorer(run: Run, domains: Sequence[str] = (), code: str = EXPLORER) -> Path:
    """RUN/explore.ipynb: one cell that shows all views, of the run's domains and some more."""
    import nbformat

    names = ", ".join(map(repr, [str(run.path.absolute()), *domains]))
    cell = nbformat.v4.new_code_cell(code.format(names=names, here=str(Path.cwd())), id="explorer")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    return write_atomic(run.path / "explore.ipynb", nbformat.writes(notebook) + "\n")
