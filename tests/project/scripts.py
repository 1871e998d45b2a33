"""Runs code as a user's script, in a process of its own that need not import again what all of them do."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # tests.support would import the package for the script
IMPORTS = ["torch", "transformers", "timm", "peft"]  # those that are missing are left out
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SECONDS = 600


def run(script: Path | str, folder: Path) -> str:
    """What a file, or code, prints when it runs in `folder`; it must end well.

    A server of the multiprocessing module has imported the libraries, and forks. Nothing of ours is among them: the
    script imports the package itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with tempfile.TemporaryDirectory() as place:
        file = script if isinstance(script, Path) else Path(place) / "script.py"
        if not isinstance(script, Path):
            file.write_text(script, encoding="utf-8")
        out, errors = Path(place) / "out", Path(place) / "errors"
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT)  # the server starts with the first script
        try:
            process = context.Process(target=_run, args=(file, folder, out, errors))
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        said = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
        assert process.exitcode == 0, said
        return out.read_text(encoding="utf-8")


def _run(file: Path, folder: Path, out: Path, errors: Path) -> None:
    for number, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.update(ENVIRONMENT)
    sys.argv, sys.path[0:0] = [str(file)], [str(ROOT)]
    warnings.simplefilter("ignore")
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
