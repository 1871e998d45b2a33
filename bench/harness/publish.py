"""From a run's JSON to its table and figure, which lie beside it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Row = dict[str, Any]


def publish(
    path: Path | None, maker: str, tables: Callable[[Result], str], figure: Callable[[Result, Path], None]
) -> None:
    """Writes the .md and .png of the JSON at `path`, and prints the tables; `maker` is the command that makes such."""
    if path is None or not path.is_file():
        sys.exit(f"no results: {path or 'name a JSON'}; {maker} writes them")
    try:
        if path.suffix != ".json":  # the table takes its name with .md
            raise ValueError("expected the name of a file that ends in .json")
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        text = tables(result)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # JSON that is no record
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        sys.exit(f"{path}: not results ({why}); {maker} writes them")
    path.with_suffix(".md").write_text(text)
    figure(result, path.with_suffix(".png"))
    print(text)


def by_case(result: Result) -> dict[str, dict[str, Row]]:
    """The rows by their case, and in it by their baseline, ours too."""
    found: dict[str, dict[str, Row]] = {}
    for row in result["rows"]:
        found.setdefault(row["case"], {})[row["way"]] = row
    return found
