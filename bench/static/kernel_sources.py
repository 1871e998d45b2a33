"""Which code a record of compiled kernels is of."""

import ast
import hashlib
import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def digest(*entries: str, folder: Path = KERNELS) -> str:
    """Of these files of kernels/ and of all that they import there.

    What changes no kernel does not count: comments, docstrings, the imports themselves and layout.
    """
    total = hashlib.sha256()
    for name in sorted(_reached(set(entries), folder)):
        tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [line for line in body if not _is_silent(line)]
        total.update(f"{name} {ast.dump(tree)}\n".encode())
    return total.hexdigest()[:16]


def native_digest(folder: Path = CSRC) -> str:
    """Of what device code is compiled from: attention's part of csrc/api, and csrc/cuda without what is the host's.

    Comments and layout do not count.
    """
    others = {"host", "host.h", "tests", "python", "reparam.h"}
    found = [path for top in ("api", "cuda") for path in (folder / top).rglob("*") if path.suffix in (".h", ".cu")]
    total = hashlib.sha256()
    for path in sorted(found):
        name = path.relative_to(folder)
        if not others & set(name.parts):
            words = re.sub(r"//.*", "", path.read_text(encoding="utf-8")).split()
            total.update(f"{name} {' '.join(words)}\n".encode())
    return total.hexdigest()[:16]


def _reached(names: set[str], folder: Path) -> set[str]:
    found: set[str] = set()
    while names:
        name = names.pop()
        found.add(name)
        for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = {f"{module.removeprefix('prefixattn.kernels.')}.py" for module in modules}
                names |= {file for file in files - found if (folder / file).is_file()}
    return found


def _is_silent(line: ast.stmt) -> bool:
    text = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
    return text or isinstance(line, (ast.Import, ast.ImportFrom))
