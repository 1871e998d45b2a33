"""What an installation holds, how the extension is built, and that nothing breaks where it cannot be."""

import ast
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import prefixattn
from build_support import cuda
from build_support.common import CannotBuild
from tests.support import ROOT

X86 = platform.machine().lower() in ("x86_64", "amd64")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
RECORDS = {"prefixattn/_C_build.json", "prefixattn/_cuda_build.json"}
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def python_files() -> set[Path]:
    """Those of the package, by their place in it: kernels/ is there through a link."""
    found = os.walk(ROOT / "prefixattn", followlinks=True)
    return {
        (Path(folder) / file).relative_to(ROOT) for folder, _, files in found for file in files if file.endswith(".py")
    }


ASKED = "PREFIXATTN_REQUIRE_EXT", "PREFIXATTN_CUDA"


def run_setup(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *words],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in ASKED} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def record(folder: Path, name: str = "_C") -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "prefixattn" / f"{name}_build.json").read_text())
    return content


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this setup.py and next to nothing to compile: seconds instead of a minute."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "build_support", tmp_path / "build_support")
    (tmp_path / "prefixattn" / "attach").mkdir(parents=True)
    (tmp_path / "prefixattn" / "__init__.py").write_text('import torch\n\n__version__ = "1.2.3"\n')
    for folder in ("cpu", "python"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    (tmp_path / "csrc" / "shared.h").write_text("int from_shared();\n")
    (tmp_path / "csrc" / "python" / "module.cpp").write_text('extern "C" int bound() { return 1; }\n')
    (tmp_path / "csrc" / "cpu" / "plain.cpp").write_text('#include "shared.h"\nint from_shared() { return 2; }\n')
    return tmp_path


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], set[str]]:
    """This project packed where nothing can be compiled: its folder, the files of the wheel, those of the sdist."""
    folder = tmp_path_factory.mktemp("project")
    built = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "results", "*_build.json")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*built), dirs_exist_ok=True)
    done = run_setup(folder, "-q", "sdist", "bdist_wheel", CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stdout
    [wheel], [sdist] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as zipped, tarfile.open(sdist) as tarred:
        return folder, set(zipped.namelist()), {name.partition("/")[2] for name in tarred.getnames()}


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "kernels/__init__.py hides the package `kernels` of Hugging Face from transformers wherever the repository is "
        "the working directory; without it the folder is only a candidate and the installed package wins"
    )


def test_version_is_said_once() -> None:
    assert importlib.metadata.version("prefixattn") == prefixattn.__version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_packages_are_all_written_out() -> None:
    [written] = [
        ast.literal_eval(keyword.value)
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "packages"
    ]
    assert set(written) == {".".join(path.parent.parts) for path in python_files()}


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return {package: version for package, _, version in (line.partition("==") for line in lines if line[:1] != "#")}


def asked() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for name, e in project["optional-dependencies"].items() if name != "dev" for r in e]
    return [r for r in map(Requirement, project["dependencies"] + extras) if r.name != "prefixattn"]


def test_tested_versions_satisfy_what_the_package_asks_for() -> None:
    tested = pinned("tested.txt")
    for requirement in asked():
        assert requirement.specifier.contains(tested[requirement.name]), requirement


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    lowest = pinned("lowest.txt")
    assert set(lowest) == set(pinned("tested.txt"))
    for requirement in asked():
        [bound] = [s.version for s in requirement.specifier if s.operator == ">="]
        assert Version(lowest[requirement.name]) == Version(bound), requirement


def test_wheel_holds_the_package_and_nothing_else(archives: tuple[Path, set[str], set[str]]) -> None:
    _, wheel, _ = archives
    package = set(map(str, python_files()))
    inside = {name for name in wheel if ".dist-info/" not in name}
    assert inside - {"prefixattn/py.typed", "prefixattn/_C.pyi", "prefixattn/_cuda.pyi"} == package | RECORDS
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)


def test_sdist_holds_what_a_build_needs(archives: tuple[Path, set[str], set[str]]) -> None:
    _, _, sdist = archives
    sources = {str(path.relative_to(ROOT)) for end in ("h", "cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{end}")}
    tests = {
        str(path.relative_to(ROOT)) for folder in ("tests", "build_support") for path in (ROOT / folder).rglob("*.py")
    }
    kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected = (
        sources | tests | kernels | {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "requirements/tested.txt"}
    )
    assert expected <= sdist
    assert not {name for name in sdist if name.endswith((".so", ".pyc", ".o"))}


def test_without_a_compiler_the_package_installs_and_knows_why(archives: tuple[Path, set[str], set[str]]) -> None:
    folder, wheel, _ = archives
    assert not {name for name in wheel if name.endswith(".so")}
    with zipfile.ZipFile(next((folder / "dist").glob("*.whl"))) as zipped:
        said = json.loads(zipped.read("prefixattn/_C_build.json"))
    assert said == {"built": False, "reason": "CXX=/nonexistent/g++: no such program"}


def test_without_a_compiler_the_extension_can_be_demanded(project: Path) -> None:
    done = run_setup(project, "-q", "build_ext", "--inplace", CXX="/nonexistent/g++", PREFIXATTN_REQUIRE_EXT="1")
    assert done.returncode == 1
    assert "PREFIXATTN_REQUIRE_EXT is set: CXX=/nonexistent/g++: no such program" in done.stdout


NO_NVCC = {"PREFIXATTN_CUDA": "1", "CUDA_HOME": "/nonexistent"}


@needs_compiler
def test_without_nvcc_the_other_kernels_are_built_and_the_reason_stands_there(project: Path) -> None:
    done = run_setup(project, "-q", "build_ext", "--inplace", **NO_NVCC)
    assert done.returncode == 0, done.stdout
    assert record(project)["built"] is True and list((project / "prefixattn").glob("_C.*.so"))
    assert record(project, "_cuda") == {"built": False, "reason": "CUDA_HOME=/nonexistent has no bin/nvcc"}
    quiet = run_setup(project, "-q", "build_ext", "--inplace", PREFIXATTN_CUDA="0")
    assert "_cuda" not in quiet.stdout and record(project, "_cuda")["reason"] == "PREFIXATTN_CUDA=0"


@needs_compiler
def test_the_cuda_kernels_can_be_demanded(project: Path) -> None:
    done = run_setup(project, "-q", "build_ext", "--inplace", PREFIXATTN_REQUIRE_EXT="1", **NO_NVCC)
    assert done.returncode == 1 and "prefixattn._cuda was not built and PREFIXATTN_REQUIRE_EXT is set" in done.stdout
    assert record(project)["built"] is True


def test_architectures_are_named_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFIXATTN_CUDA_ARCHS", raising=False)
    assert cuda.archs() == list(cuda.ARCHS)
    monkeypatch.setenv("PREFIXATTN_CUDA_ARCHS", "sm_80; sm_90")
    assert cuda.gencode(cuda.archs()) == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
    ]
    monkeypatch.setenv("PREFIXATTN_CUDA_ARCHS", "sm_75")
    with pytest.raises(CannotBuild, match="sm_75 is none of sm_80 and later"):
        cuda.archs()


@needs_compiler
def test_a_build_compiles_only_what_changed(project: Path) -> None:
    first = run_setup(project, "-q", "build_ext", "--inplace")
    assert record(project)["built"] is True, first.stdout
    [library] = (project / "prefixattn").glob("_C.*.so")
    written = library.stat().st_mtime_ns

    start = time.perf_counter()
    again = run_setup(project, "-q", "build_ext", "--inplace")
    assert "no work to do" in again.stdout
    assert library.stat().st_mtime_ns == written
    assert time.perf_counter() - start < 10  # a third of a second on an idle machine

    time.sleep(0.01)  # a file system's clock may be coarse
    (project / "csrc" / "shared.h").write_text("int from_shared();\n\n")
    changed = run_setup(project, "-q", "build_ext", "--inplace").stdout
    assert "plain.o" in changed and "module.o" not in changed


@needs_compiler
def test_a_source_that_does_not_compile_leaves_no_stale_library(project: Path) -> None:
    run_setup(project, "-q", "build_ext", "--inplace")
    assert list((project / "prefixattn").glob("_C.*.so"))
    (project / "csrc" / "cpu" / "plain.cpp").write_text("#error this machine is too old\n")
    done = run_setup(project, "-q", "build_ext", "--inplace")
    assert done.returncode == 0
    assert not list((project / "prefixattn").glob("_C.*.so"))
    assert record(project)["built"] is False
    assert "this machine is too old" in str(record(project)["reason"])


@needs_compiler
@pytest.mark.skipif(not X86, reason="the instruction sets are those of x86")
def test_only_files_named_for_it_use_an_instruction_set(project: Path) -> None:
    allowed: dict[str, set[str]] = {
        "plain.cpp": set(),
        "not_avx2.cpp": set(),
        "avx2.cpp": {"AVX2"},
        "avx512.cpp": {"AVX2", "AVX512F"},
        "avx512_bf16.cpp": {"AVX2", "AVX512F", "AVX512BF16"},
        "amx_plain.cpp": set(),
        "amx_plain_avx512.cpp": {"AVX2", "AVX512F", "AVX512BF16"},
    }
    for name, macros in allowed.items():
        checks = [
            f"#if {'!' if macro in macros else ''}defined(__{macro}__)\n#error {name} {macro}\n#endif\n"
            for macro in ("AVX2", "AVX512F", "AVX512BF16")
        ]
        (project / "csrc" / "cpu" / name).write_text("".join(checks))
    done = run_setup(project, "-q", "build_ext", "--inplace")
    assert record(project)["built"] is True, done.stdout


@needs_compiler
@pytest.mark.skipif(not X86, reason="the instruction sets are those of x86")
def test_what_the_assembler_does_not_know_is_left_out(project: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase " $* " in *" - "*) exit 1;; esac\nexec "${REAL:?}" "$@"\n')
    old.chmod(0o755)
    source = project / "csrc" / "cpu" / "amx_bf16.cpp"
    source.write_text("#if defined(PA_AMX)\n#error this machine assembles it\n#endif\n")
    run_setup(project, "-q", "build_ext", "--inplace", CXX=str(old), REAL=str(COMPILER))
    assert record(project)["built"] is True
    run_setup(project, "-q", "build_ext", "--inplace")
    asked = [str(COMPILER), "-x", "c++", "-c", "-", "-o", os.devnull]
    knows = subprocess.run(asked, input='asm("tdpbf16ps %tmm0, %tmm1, %tmm2");', text=True).returncode == 0
    assert record(project)["built"] is not knows


def test_version_is_read_without_importing_torch(project: Path) -> None:
    (project / "torch.py").write_text("raise RuntimeError('setup.py imported torch')\n")
    done = run_setup(project, "--version", PYTHONPATH=str(project))
    assert done.stdout.splitlines()[-1] == "1.2.3"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_extension_needs_neither_torch_nor_an_openmp_of_its_own() -> None:
    libraries = list((ROOT / "prefixattn").glob("_C.*.so"))
    if not libraries:
        pytest.skip("prefixattn._C is not built")
    needed = subprocess.run(["readelf", "-d", str(libraries[0])], capture_output=True, text=True, check=True).stdout
    assert "libtorch" not in needed and "libgomp" not in needed and "libiomp" not in needed


def test_the_command_lists_the_backends() -> None:
    [entry] = importlib.metadata.entry_points(group="console_scripts", name="prefixattn")
    done = subprocess.run([sys.executable, "-m", "prefixattn"], capture_output=True, text=True, check=True, cwd="/")
    assert entry.value == "prefixattn.__main__:main"
    assert "reference  works" in done.stdout


def test_versions_of_make_are_those_of_a_file(tmp_path: Path) -> None:
    """`make lowest` installs the lower bounds, in a .venv of its own."""
    # -B: as if nothing were installed, which it may be where this ran before
    done = subprocess.run(("make", "-n", "-B", "lowest"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lowest = pinned("lowest.txt")
    for name in ("torch", "torchvision", "transformers"):
        assert f"{name}=={lowest[name]}" in done.stdout
    assert ".venv-lowest/bin/python -m pytest" in done.stdout and ".venv/bin" not in done.stdout
