"""The pages: their links, the files they name, their lines, the map in DESIGN.md, and numbers that no table holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
WRITTEN = [p for p in PAGES if p.name != "families.md"]  # that one is made by tests/sweep/report.py
FIGURES = ROOT / "docs" / "figures"
COLUMNS = 100
IGNORED = {"build", "dist", "shared", "__pycache__"}  # folders of the root that are not the repository's


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_records(text: str) -> str:
    """Without what is copied from a report: its lines are as long as the report makes them."""
    return re.sub(r"<!-- from .*? -->.*?<!-- to here -->\n", "", text, flags=re.DOTALL)


def prose(text: str) -> list[str]:
    """Lines of sentences: no code, tables, headings, pictures, or targets of links. Items keep their dash."""
    text = re.sub(r"^```.*?^```\n", "", without_records(text), flags=re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("> ") for line in text.splitlines()]
    return [line.strip() for line in lines if not re.match(r"\||#|!\[|\[[\w ]+\]: |    |<!--|\[!|$", line)]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    inside = re.findall(r"\]\(([^)\s]+)\)", text)
    targets = dict(re.findall(r"^\[([\w ]+)\]: (\S+)$", text, flags=re.MULTILINE))
    wanted = [t for t in inside + list(targets.values()) if not t.startswith("http")]
    lost = [t for t in wanted if not (path.parent / t.partition("#")[0]).exists()]
    assert not lost, f"{name(path)} links to {lost}"
    used = set(
        re.findall(r"\]\[([\w ]+)\]", re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)))
    )
    assert used <= set(targets), f"{name(path)} names no target for {used - set(targets)}"
    assert set(targets) <= used, f"{name(path)} does not use {set(targets) - used}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_files_that_are_named_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(
        re.findall(r"(?<![\w/.-])(?:bench|tests|docs|examples|findings|csrc)/[\w./-]+\.(?:py|sh|md|json)", text)
    )
    lost = [n for n in sorted(named) if not (ROOT / n).exists()]
    assert not lost, f"{name(path)} names {lost}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_lines_are_short(path: Path) -> None:
    lines = without_records(path.read_text(encoding="utf-8")).splitlines()
    long = [line for line in lines if len(line) > COLUMNS and not line.startswith("|")]
    assert not long, f"{name(path)}: more than {COLUMNS} columns:\n" + "\n".join(long)


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_a_line_is_a_sentence(path: Path) -> None:
    lines = prose(path.read_text(encoding="utf-8"))
    several = [line for line in lines if re.search(r"[a-z0-9)`*][.?!] [A-Z`*\[]", re.sub(r"^\d\. ", "", line))]
    assert not several, f"{name(path)}: more than one sentence:\n" + "\n".join(several)
    # items of a list may be parts of one sentence
    open_ended = [line for line in lines if not re.match(r"- |\d\. ", line) and not re.search(r"[.:?!][)*`]*$", line)]
    assert not open_ended, f"{name(path)}: no end of a sentence:\n" + "\n".join(open_ended)


def test_the_readme_and_the_design_are_short() -> None:
    for page, most in (("README.md", 130), ("DESIGN.md", 150)):
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= most, page


def test_the_readme_warns_of_what_no_gpu_ran() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    records = [json.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "bench" / "results").glob("*.json")]
    measured = any("copy_gbytes" in record for record in records)  # as in tests/project/test_readme.py
    assert ("> [!WARNING]\n> The Triton kernels were **never run on a GPU**" in text) is not measured


# the map of files


def in_map() -> set[str]:
    """Paths of DESIGN.md's map; a folder ends in a slash."""
    block = re.search(r"## 4\. Map\n\n```\n(.*?)```", (ROOT / "DESIGN.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert block is not None
    found, folders = set(), []
    for line in block[1].splitlines():
        entry = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 4
        folders = [*folders[:depth], entry]
        found.add("".join(folders))
    return found


def on_disk() -> set[str]:
    """Folders of the root and those inside that hold files, and the package's modules; a folder ends in a slash."""
    found = set()
    for top in ROOT.iterdir():
        if not top.is_dir() or top.name[0] == "." or top.name in IGNORED or top.suffix == ".egg-info":
            continue
        found.add(f"{top.name}/")
        for inside in top.iterdir():
            hidden = inside.name[0] == "." or inside.name in ("__pycache__", "results")
            if inside.is_dir() and not hidden and any(p.is_file() for p in inside.iterdir()):
                found.add(f"{top.name}/{inside.name}/")
            elif top.name == "prefixattn" and inside.suffix in (".py", ".pyi"):
                found.add(f"{top.name}/{inside.name}")
    return found


def proposed(path: str) -> str:
    """A line for the map: the first words of a module, or of a folder's __init__."""
    file = ROOT / path / "__init__.py" if path.endswith("/") else ROOT / path
    words = re.match(r'"""(.*?)(\.|\n|""")', file.read_text(encoding="utf-8")) if file.is_file() else None
    *above, own = re.findall(r"[^/]+/?", path)
    return f"{'    ' * len(above)}{own}".ljust(27) + (words[1] if words else "")


def test_the_map_is_the_tree() -> None:
    lost = [p for p in sorted(in_map()) if not (ROOT / p).exists()]
    assert not lost, f"DESIGN.md's map names what is not there: {lost}"
    missing = sorted(on_disk() - in_map())
    assert not missing, "DESIGN.md's map lacks:\n" + "\n".join(map(proposed, missing))


# pictures


def test_the_script_draws_every_picture_and_a_page_shows_each(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    subprocess.run((sys.executable, str(FIGURES / "draw.py"), str(tmp_path)), check=True)
    drawn = {p.name for p in tmp_path.iterdir()}
    assert drawn == {p.name for p in FIGURES.glob("*.png")}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.iterdir())
    pages = "".join(p.read_text(encoding="utf-8") for p in PAGES)
    unseen = [figure for figure in sorted(drawn) if f"figures/{figure})" not in pages]
    assert not unseen, f"no page shows {unseen}"


# numbers that no table of a benchmark holds


def test_the_share_of_random_calls_outside_the_bar_is_the_records() -> None:
    calls = json.loads((ROOT / "bench" / "results" / "fuzz.json").read_text(encoding="utf-8"))["calls"]["cpu"]
    share = {name: f"{100 * calls[name]['outside'] / calls[name]['calls']:.1f} %" for name in ("bfloat16", "float16")}
    told = f"{share['bfloat16']} of the calls in bfloat16 and {share['float16']} in float16"
    assert told in (ROOT / "docs" / "design" / "numerics.md").read_text(encoding="utf-8")


def test_what_spills_is_the_records() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "triton_resources.json").read_text(encoding="utf-8"))["rows"]
    most: dict[tuple[str, ...], int] = {}
    for row in rows:
        feature = row["case"].partition("_")[0]
        if row["stack"] and feature != "features":
            kernel = row["kernel"].removeprefix("prefix_attn_")
            key = (feature, f"`{kernel}`", f"{row['arch']}, {row['dtype']}, head size {row['head_dim']}")
            most[key] = max(most.get(key, 0), row["stack"])
    page = (ROOT / "docs" / "design" / "triton.md").read_text(encoding="utf-8")
    shown = page.split("| bytes a thread |\n|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert set(shown) == {f"| {' | '.join(key)} | {stack} |" for key, stack in most.items()}
