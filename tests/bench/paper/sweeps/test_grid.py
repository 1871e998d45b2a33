"""Grids: names of runs, the choice after a search, refusals; from a file to the last run."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.harness.command import Refusal
from bench.paper.sweeps.grid import Score, load_grid
from bench.paper.sweeps.launch import launch
from bench.paper.sweeps.ledger import Ledger
from bench.paper.sweeps.testing import Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "sweep_work", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Place(tmp_path)


GRID = """
name = "tiny"
tasks = ["dogs", "cats"]
seeds = [7, 8]
[common]
length = 10
epochs = 100
flag = false
drop = 0.1
[task.cats]
epochs = 50
[[methods]]
name = "deep"
layers = "all"
lr = [5, 0.5]
weight_decay = [0.001, 0]
[[methods]]
name = "deep"
layers = "first"
label = "other"
lr = [1]
weight_decay = [0]
length = 20
[methods.task.cats]
lr = [2, 3]
epochs = 25
"""


def grid_file(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def test_a_grid_names_its_runs(tmp_path: Path) -> None:
    runs = load_grid(grid_file(tmp_path)).search_runs()
    assert [run.name for run in runs] == [
        "tiny/dogs/deep-all-P10/search-lr5-wd0.001-s7", "tiny/dogs/deep-all-P10/search-lr5-wd0-s7",
        "tiny/dogs/deep-all-P10/search-lr0.5-wd0.001-s7", "tiny/dogs/deep-all-P10/search-lr0.5-wd0-s7",
        "tiny/cats/deep-all-P10/search-lr5-wd0.001-s7", "tiny/cats/deep-all-P10/search-lr5-wd0-s7",
        "tiny/cats/deep-all-P10/search-lr0.5-wd0.001-s7", "tiny/cats/deep-all-P10/search-lr0.5-wd0-s7",
        "tiny/cats/other/search-lr2-wd0-s7", "tiny/cats/other/search-lr3-wd0-s7",
    ]  # fmt: skip
    assert runs[0].config == {"task": "dogs", "method": "deep", "layers": "all", "lr": 5.0, "weight_decay": 0.001,
                              "seed": 7, "phase": "search", "length": 10, "epochs": 100, "flag": False,
                              "drop": 0.1}  # fmt: skip
    first, *_ = load_grid(grid_file(tmp_path)).final_runs(Ledger(tmp_path / "ledger"))  # of one pair, not searched
    assert first.name == "tiny/dogs/other/final-lr1-wd0-s7"
    assert [(run.config["length"], run.config["epochs"]) for run in (first, runs[4], runs[8])] == [
        (20, 100), (10, 50), (20, 25)]  # fmt: skip
    assert load_grid(grid_file(tmp_path, GRID.replace("seeds = [7, 8]", ""))).seeds == (42, 44, 82, 100, 800)


DIVERGED = {"val_accuracy": None}


def searched(folder: Path, *values: Any) -> tuple[Any, Ledger]:
    """The grid, and a ledger with these val_accuracies of deep on dogs: None is left, a string is a failure.

    A dict is a whole result.
    """
    grid, ledger = load_grid(grid_file(folder)), Ledger(folder / "ledger")
    for run, value in zip(grid.search_runs(), values, strict=False):
        if isinstance(value, str):
            ledger.failed(run, value)
        elif value is not None:
            ledger.write(run, value if isinstance(value, dict) else {"val_accuracy": value})
    return grid, ledger


@pytest.mark.parametrize(  # of lr 5 wd 0.001, lr 5 wd 0, lr 0.5 wd 0.001, lr 0.5 wd 0
    ("values", "best"),
    [
        ((0.1, 0.2, 0.4, 0.3), (0.5, 0.001)),
        ((0.4, 0.2, 0.4, 0.3), (0.5, 0.001)),  # equals: the smaller lr
        ((0.4, 0.4, 0.1, 0.3), (5.0, 0.0)),  # then the smaller weight decay
        ((0.4, 0.4, 0.4, 0.4), (0.5, 0.0)),
        ((math.nan, 0.2, math.nan, math.nan), (5.0, 0.0)),
        ((math.nan, 0.0, DIVERGED, math.inf), (5.0, 0.0)),
    ],
)
def test_the_best_of_the_search_goes_on_with_each_seed(tmp_path: Path, values: Any, best: tuple[float, float]) -> None:
    grid, ledger = searched(tmp_path, *values)
    finals = [run for run in grid.final_runs(ledger) if "/deep-all-P10/" in run.name]
    assert [(run.config["lr"], run.config["weight_decay"]) for run in finals] == [best, best]
    assert [(run.config["seed"], run.config["phase"]) for run in finals] == [(7, "final"), (8, "final")]
    lr, decay = best
    assert finals[1].name == f"tiny/dogs/deep-all-P10/final-lr{lr:g}-wd{decay:g}-s8"
    assert grid.plan(ledger) == grid.search_runs() + grid.final_runs(ledger) and grid.reasons(ledger) == []
    choice = grid.choices(ledger)["dogs", "deep-all-P10"]
    assert choice.value == max(value for value in values if isinstance(value, float) and math.isfinite(value))


@pytest.mark.parametrize(
    "values, best, value", [((2.0, 1.5, 1.7, 1.9), (5.0, 0.0), 1.5), ((2.0, math.nan, 1.7, 1.7), (0.5, 0.0), 1.7)]
)
def test_a_loss_is_the_better_the_smaller(tmp_path: Path, values: Any, best: tuple[float, float], value: float) -> None:
    grid, ledger = load_grid(grid_file(tmp_path), score=Score("dev_loss", larger=False)), Ledger(tmp_path / "ledger")
    for run, loss in zip(grid.search_runs(), values, strict=False):
        ledger.write(run, {"dev_loss": loss})
    choice = grid.choices(ledger)["dogs", "deep-all-P10"]
    assert choice.best is not None and (choice.best["lr"], choice.best["weight_decay"]) == best
    assert choice.value == value


def test_a_method_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path, GRID.replace('label = "other"', 'label = "other"\nseeds = [9, 7, 3]')))
    ledger = Ledger(tmp_path / "runs")
    names = [run.name for run in grid.search_runs() if "cats/other/" in run.name]
    assert names == [f"tiny/cats/other/search-lr{lr}-wd0-s9" for lr in (2, 3)]
    finals = [run.name for run in grid.final_runs(ledger)]  # of dogs, where nothing is searched
    assert finals == [f"tiny/dogs/other/final-lr1-wd0-s{seed}" for seed in (9, 7, 3)]
    assert {method.label: method.seeds for method in grid.methods} == {"deep-all-P10": (7, 8), "other": (9, 7, 3)}
    for wrong, said in (("[]", "not empty"), ("[-1]", "-1 is below 0"), ("[1, 1]", "twice"), ("7", "expected a list")):
        text = GRID.replace('label = "other"', f'label = "other"\nseeds = {wrong}')
        with pytest.raises(Refusal, match=said) as caught:
            load_grid(grid_file(tmp_path, text))
        assert "methods[1] (deep).seeds" in str(caught.value)


def test_a_search_that_goes_on_has_no_best(tmp_path: Path) -> None:
    grid, ledger = searched(tmp_path, 0.1, "nan", 0.2, None)
    assert {run.name.split("/")[2] for run in grid.final_runs(ledger)} == {"other"} and grid.reasons(ledger) == []
    assert grid.choices(ledger)["dogs", "deep-all-P10"].reason == "waits for 1 of 4 runs of its search"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ((math.nan, DIVERGED, math.inf, DIVERGED), "no final runs, all 4 of its search diverged: val_accuracy is nan"),
        ((0.1, "no memory", 0.2, "x"), "waits for 2 of 4 runs of its search that failed: no memory; --retry tries them "
         "again"),
        (("x", math.nan, DIVERGED, math.nan), "waits for 1 of 4 runs of its search that failed: x; --retry tries them "
         "again"),
    ],
)  # fmt: skip
def test_a_search_without_a_choice_says_so_and_blocks_no_other(tmp_path: Path, values: Any, why: str) -> None:
    grid, ledger = searched(tmp_path, *values)
    assert grid.reasons(ledger) == [f"tiny/dogs/deep-all-P10: {why}"]
    choice = grid.choices(ledger)["dogs", "deep-all-P10"]
    assert (choice.best, choice.value, choice.reason) == (None, None, why)
    assert {run.name.split("/")[2] for run in grid.final_runs(ledger)} == {"other"}


def test_a_part_of_a_grid_has_the_runs_of_the_whole(tmp_path: Path) -> None:
    grid, ledger = load_grid(grid_file(tmp_path)), Ledger(tmp_path / "ledger")
    whole = grid.plan(ledger)
    assert grid.only() == grid and grid.plan(ledger) == whole
    cats, other = grid.only(tasks=["cats"]), grid.only(methods=["other"])
    assert cats.tasks == ("cats",) and cats.plan(ledger) == [run for run in whole if run.config["task"] == "cats"]
    assert other.tasks == grid.tasks and {method.label for method in other.methods} == {"other"}
    assert grid.only(methods=["deep"]) == grid  # the name of both
    (both,) = grid.only(("dogs",), ("deep-all-P10",)).methods
    assert (both.task, both.label) == ("dogs", "deep-all-P10")


@pytest.mark.parametrize(
    ("tasks", "methods", "said"),
    [
        (["cows"], None, "task 'cows': not in grid tiny; there are dogs, cats"),
        (None, ["deep", "vpt"], "method 'vpt': not in grid tiny; there are deep, deep-all-P10, other"),
        ([], None, "nothing is left of grid tiny"),
    ],
)
def test_parts_that_are_refused(tmp_path: Path, tasks: Any, methods: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        load_grid(grid_file(tmp_path)).only(tasks, methods)


def test_a_search_result_without_its_accuracy(tmp_path: Path) -> None:
    grid, ledger = searched(tmp_path)
    ledger.write(grid.search_runs()[0], {"accuracy": 1.0})
    with pytest.raises(Refusal, match=r"s7\.json: its result has no val_accuracy"):
        grid.plan(ledger)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "tiny"', "name = ", "not readable as TOML"),
        ('name = "tiny"', "", "name: missing"),
        ('name = "tiny"', 'name = "../a"', "name: is '../a', expected a word"),
        ('name = "tiny"', 'name = "tiny"\nseed = 1', "seed: unknown; there are name, tasks"),
        ('tasks = ["dogs", "cats"]', "", "tasks: missing"),
        ('tasks = ["dogs", "cats"]', "tasks = []", r"tasks: is \[\], expected a list of strings that is not empty"),
        ('tasks = ["dogs", "cats"]', 'tasks = ["cats", "cats"]', "tasks: .* one of them twice"),
        ('tasks = ["dogs", "cats"]', 'tasks = ["a/b", "cats"]', r"tasks\[0\]: is 'a/b'"),
        ('tasks = ["dogs", "cats"]', 'tasks = ["dogs"]', "task.cats: no such task; there are dogs"),
        ("seeds = [7, 8]", "seeds = [7, true]", "seeds: .*expected a list of whole numbers"),
        ("seeds = [7, 8]", "seeds = [7, -1]", "seeds: -1 is below 0"),
        ("length = 10", "length = 10\nlr = [1]", "common.lr: is of each run, and no setting"),
        ("length = 10", "length = [10]", r"common.length: is \[10\], expected a string"),
        ("length = 10", "length = nan", "common.length: is nan, expected"),
        ("epochs = 50", "epoch = 50", "task.cats.epoch: unknown; a setting has its usual value in .common."),
        ("epochs = 50", 'epochs = "50"', "task.cats.epochs: is '50', and 100 in .common.: not of one type"),
        ("epochs = 50", "flag = 1", "task.cats.flag: is 1, and False"),
        ("[task.cats]\nepochs = 50", "task = 3", "common.task: is of each run"),
        ("length = 20", "lenght = 20", r"methods\[1\] \(deep\).lenght: unknown"),
        ('name = "deep"\nlayers = "all"', 'layers = "all"', r"methods\[0\].name: missing"),
        ('layers = "all"', 'layers = "last"', r"methods\[0\] \(deep\).layers: is 'last', expected all or first"),
        ('layers = "all"', 'layers = ["all"]', r"methods\[0\] \(deep\).layers: is \['all'\]"),
        ('layers = "all"', "", r"methods\[0\] \(deep\).layers: missing for task dogs"),
        ("lr = [5, 0.5]", "", r"methods\[0\] \(deep\).lr: missing for task dogs"),
        ("lr = [5, 0.5]", "lr = 5", r"methods\[0\] \(deep\).lr: is 5, expected a list of numbers"),
        ("lr = [5, 0.5]", "lr = []", r"methods\[0\] \(deep\).lr: is \[\], expected"),
        ("lr = [5, 0.5]", "lr = [0]", r"methods\[0\] \(deep\).lr: 0 is not a finite number above 0"),
        ("lr = [5, 0.5]", "lr = [inf]", r"methods\[0\] \(deep\).lr: inf is not a finite"),
        ("lr = [5, 0.5]", "lr = [5, 5.0000001]", r"methods\[0\] \(deep\).lr: two of its values are the same in six"),
        ("weight_decay = [0.001, 0]", "weight_decay = [-1]", r".*weight_decay: -1 is not a finite number from 0"),
        ('label = "other"', 'label = "a b"', r"methods\[1\] \(deep\).label: is 'a b'"),
        ('label = "other"', 'label = "deep-all-P10"', r"methods\[1\]: the second with the label deep-all-P10"),
        ("lr = [2, 3]", 'lr = ["2"]', r"methods\[1\] \(deep\).task.cats.lr: is \['2'\]"),
        ("[methods.task.cats]", "[methods.task.cows]", r"methods\[1\] \(deep\).task.cows: no such task"),
    ],
)
def test_grids_that_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GRID
    with pytest.raises(Refusal, match=rf"grid\.toml: {said}") as caught:
        load_grid(grid_file(tmp_path, GRID.replace(old, new, 1)))
    assert "\n" not in str(caught.value)


def test_grids_without_methods_or_of_unknown_settings(tmp_path: Path) -> None:
    head = GRID[: GRID.index("[[methods]]")]
    for text in (head, "methods = []\n" + head, "methods = 3\n" + head):
        with pytest.raises(Refusal, match=r"methods: expected one \[\[methods\]\] block or more"):
            load_grid(grid_file(tmp_path, text))
    with pytest.raises(Refusal, match=r"common\.length: unknown; there are drop, epochs, flag"):
        load_grid(grid_file(tmp_path), known=("epochs", "flag", "drop"))
    path = grid_file(tmp_path, GRID.replace("length = 20", "length = 20\nhidden = 3", 1))
    assert load_grid(path, known=("length", "epochs", "flag", "drop", "hidden")).methods[1].settings["hidden"] == 3
    with pytest.raises(Refusal, match=r"absent\.toml: not readable as TOML"):
        load_grid(tmp_path / "absent.toml")


def test_a_grid_from_search_to_final(place: Place) -> None:
    (place.folder / "code" / "graded.py").write_text(
        "from pathlib import Path\n"
        "def work(config, scratch):\n"
        "    if (config['task'], config['lr']) == ('dogs', 5) and not Path(__file__).with_name('fixed').exists():\n"
        "        raise FloatingPointError('no memory')\n"
        "    value = None if config['lr'] == 5 else config['lr'] - config['weight_decay']\n"
        "    return {'val_accuracy': value, 'seed': config['seed']}\n"
    )
    grid, expected = load_grid(grid_file(place.folder)), set[str]()

    def finals(*names: str, **options: Any) -> dict[str, int]:
        state = launch("local", place.ledger, grid.plan, "graded:work", paths=place.paths, out=place.out, device="cpu",
                       poll=0.01, **options)  # fmt: skip
        expected.update(f"{name}-s{seed}" for name in names for seed in (7, 8))
        found = {run.name.partition("/")[2] for run in state["done"] if run.config["phase"] == "final"}
        assert found == expected
        return {name: len(found) for name, found in state.items()}

    names = ("cats/deep-all-P10/final-lr0.5-wd0", "dogs/other/final-lr1-wd0", "cats/other/final-lr3-wd0")
    assert finals(*names) == {"done": 8 + 6, "running": 0, "failed": 2, "left": 0}  # it ends, though dogs/deep waits
    assert finals(retry=True) == {"done": 8 + 6, "running": 0, "failed": 2, "left": 0}
    (reason,) = grid.reasons(place.ledger)
    assert "dogs/deep-all-P10: waits for 2 of 4 runs of its search that failed: FloatingPointError: no memory" in reason
    (place.folder / "code" / "fixed").touch()
    assert finals("dogs/deep-all-P10/final-lr0.5-wd0", retry=True) == {"done": 18, "running": 0, "failed": 0, "left": 0}
    assert grid.reasons(place.ledger) == []
