"""The papers' tables, their numbers beside ours, from the results in results/: the committed studies and own ones.

    python bench/paper/report.py            # every study
    python bench/paper/report.py nlg-smollm2 vision-small

Nothing is trained: `vision.py report` and `nlg.py report` make the results of a study from its runs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.command import NOTHING, command
from bench.paper import runs

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("nlg", "vision")


def studies(folder: Path) -> dict[str, Path]:
    """The results of studies, by name; the language half first."""
    files = (path for kind in KINDS for path in sorted(folder.glob(f"{kind}-*.json")))
    return {path.stem: path for path in files if not path.stem.endswith("-times")}


def shown(path: Path) -> str:
    results: Any = runs.read_json(path, "make it anew with the report verb of nlg.py or vision.py")
    needed = {"name", "tasks", "settings", "cells", "provenance"}
    if not isinstance(results, dict) or not needed <= set(results) or not results["cells"]:
        raise runs.Refusal(f"{path}: not the results of a study")
    if path.stem.startswith("vision-"):
        from bench.paper.visual import report
    else:
        from bench.paper.language import report
    return report.markdown(results)


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Prints the papers' tables from results.")
    parser.add_argument("names", nargs="*", help="studies (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder of results")
    given = parser.parse_args(arguments)
    found = studies(given.results)
    if not found:
        raise runs.Refusal(f"{given.results}: no results of a study, nlg-NAME.json or vision-NAME.json")
    for name in given.names:
        if name not in found:
            raise runs.Refusal(f"no study {name!r}; there are {', '.join(found)}")
    print("\n".join(shown(found[name]) for name in given.names or found), end="")


def main(arguments: list[str] | None = None) -> int:
    return command("report.py", lambda: run(sys.argv[1:] if arguments is None else arguments), NOTHING)


if __name__ == "__main__":
    sys.exit(main())
