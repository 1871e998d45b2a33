"""A sample of the sweep over transformers' auto classes, and that the page of its counts says what came out."""

import re
import warnings
from collections import Counter

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from . import report  # noqa: E402
from .catalogue import units  # noqa: E402
from .one import sweep  # noqa: E402

if not report.RESULTS.exists():
    pytest.skip("tests/sweep/results.json is not there: make sweep writes it", allow_module_level=True)
RESULTS = report.results()
UNITS = {unit.name: unit for unit in units()}
NUMBER = re.compile(r"\d[\d.e+-]*")
SAME = RESULTS["transformers"] == transformers.__version__


@pytest.mark.parametrize("name", report.sample(RESULTS["models"]))
def test_a_model_is_proved_or_refused_by_name(name: str) -> None:
    if name not in UNITS:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")  # transformers' own
        result = sweep(UNITS[name])
    assert result["outcome"] != "failed", result["reason"]
    if SAME:
        recorded = RESULTS["models"][name]
        assert result["outcome"] == recorded["outcome"]
        # how far outputs differ is the CPU's
        assert NUMBER.sub("", result["reason"]) == NUMBER.sub("", recorded["reason"])


def test_nothing_failed_and_nothing_is_left_out() -> None:
    failed = {n: r["reason"] for n, r in RESULTS["models"].items() if r["outcome"] == "failed"}
    assert not failed
    if not SAME:
        pytest.skip(
            f"the sweep was run with transformers {RESULTS['transformers']}, here is {transformers.__version__}"
        )
    assert set(RESULTS["models"]) == set(UNITS)


def test_the_page_is_what_came_out() -> None:
    if not SAME:
        pytest.skip(
            f"the sweep was run with transformers {RESULTS['transformers']}, here is {transformers.__version__}"
        )
    page = report.page(RESULTS, {name: unit.tasks for name, unit in UNITS.items()})
    assert report.PAGE.read_text(encoding="utf-8") == page, "write it again: python tests/sweep/report.py"
    count = Counter(r["outcome"] for r in RESULTS["models"].values())
    shown = (report.PAGE.parent / "models.md").read_text(encoding="utf-8")
    told = f"Of the {len(RESULTS['models'])} classes behind transformers' auto classes {count['proved']} are proved"
    assert told in shown and f"{count['refused']} are refused by name, and {count['not built']} could not" in shown
