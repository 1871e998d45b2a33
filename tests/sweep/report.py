"""The page about the sweep's counts, and the models that stand for all in the quick test; both from results.json.

python tests/sweep/report.py          writes docs/families.md
"""

import hashlib
import json
import re
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "families.md"
SAMPLE = 40
OUTCOMES = ("proved", "refused", "failed", "not built")
Models = dict[str, dict[str, Any]]


def results() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return read


def kind(result: dict[str, Any]) -> str:
    """What two results have in common if they say the same about two models."""
    if result["outcome"] == "proved":
        unusual = [f"{n} {w.split(':')[0].split(' (')[0]}" for n, w in result["checks"].items()]
        return " ".join(["proved", *result["kinds"], result["positions"], *unusual])
    text = re.sub(r"'[^']*'|\b\w+(\.\w+)+\b|\b\w*[a-z][A-Z]\w*\b|\[[^\]]*\]|\d+", "_", result["reason"])
    return f"{result['outcome']} {text[:70]}"


def sample(models: Models, size: int = SAMPLE) -> list[str]:
    """One model of each kind of result, the kinds with most models first; then a second of each, and so on.

    Which one is said by the names' hashes, so it neither follows the alphabet nor changes from run to run. Models that
    were not built, or take long, are left out.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, result in models.items():
        if result["outcome"] != "not built" and result.get("seconds", 99) < 3:
            groups[kind(result)].append(name)
    ordered = [sorted(g, key=lambda n: hashlib.sha256(n.encode()).digest()) for g in groups.values()]
    ordered.sort(key=lambda g: (-len(g), g[0]))
    turns = [g[turn] for turn in range(max(map(len, ordered), default=0)) for g in ordered if turn < len(g)]
    return sorted(turns[:size])


REASONS = (  # the first that is in a refusal says why in the table
    ("none of its layers calls transformers' attention interface", "no layer calls the attention interface"),
    ("the keyword arguments", "layers do not get the keyword arguments of the model's forward pass"),
    ("query heads; expected one", "layers with query heads of several numbers"),
    ("takes input_features, but", "takes sounds in another form than Whisper does"),
    ("attach tries a model with tokens", "takes neither tokens nor images nor what Whisper takes"),
    ("without a prefix it fails", "does not run on tokens, an image or a sound alone"),
    ("has no image_size", "no image_size in the config"),
    ("computes something else", "computes something else with the attention that reads a prefix, even without one"),
    ("which would get no prefix", "some layers have an attention of their own"),
    ("does not run with the attention", "does not run with the attention that reads a prefix"),
    ("s_aux", "attention sinks"),
    ("requires the", "needs a library that is not installed"),
    ("million parameters", "no small config"),
)


def reason(result: dict[str, Any]) -> str:
    text = result["reason"]
    known = next((words for part, words in REASONS if part in text), None)
    if known is not None:
        return known
    return "other" if result["outcome"] == "refused" else "no config or inputs that the sweep's names find"


HEAD = """\
# Models of transformers, one by one

Made by `make sweep` (tests/sweep) with transformers {transformers} and torch {torch}.
It takes every class of transformers' auto classes, with each config of it, small and random.

*Proved* means all of this:

- With a prefix attached, another prefix changes the output of `model(...)` and of generation.
- Each layer's prefix does so by itself, and gets a gradient in training.
- `model.forward(...)`, the base model, the encoder and the decoder use the prefix or refuse.
- An output depends on another token exactly where the plain model's does.
- Padding takes no part where it takes none in the plain model, or is refused in words.
- A mask of another width is refused where the plain model refuses it.
- Steps of generation equal the forward pass.
- `disabled()` and `detach()` give the plain model to the bit.

*Refused* means that `attach` says why, and leaves the model as it was.
*Not built* says nothing about the class.
A library is missing, or there was no small config or no inputs on which the plain model runs."""


def page(read: dict[str, Any], tasks: dict[str, tuple[str, ...]]) -> str:
    models: Models = read["models"]
    counts = [sum(r["outcome"] == o for r in models.values()) for o in OUTCOMES]
    lines = [
        *HEAD.format(**read).splitlines(),
        "",
        "| proved | refused | failed | not built | all |",
        "|---|---|---|---|---|",
        f"| {' | '.join(map(str, counts))} | {len(models)} |",
        "",
        "| auto class | proved | refused | failed | not built |",
        "|---|---|---|---|---|",
    ]
    by_task: dict[str, list[str]] = defaultdict(list)
    for name in models:
        for task in tasks[name]:
            by_task[task].append(name)
    for task, names in sorted(by_task.items()):
        counts = [sum(models[n]["outcome"] == o for n in names) for o in OUTCOMES]
        lines.append(f"| {task} | " + " | ".join(map(str, counts)) + " |")
    for outcome in ("refused", "not built"):
        groups: dict[str, list[str]] = defaultdict(list)
        for name, result in models.items():
            if result["outcome"] == outcome:
                groups[reason(result)].append(name.split("/")[0])
        lines += ["", f"Why {outcome}:", "", "| reason | classes | model types |", "|---|---|---|"]
        for words, types in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
            lines.append(f"| {words} | {len(types)} | {', '.join(sorted(set(types)))} |")
    proved = sorted({n.split("/")[0] for n, r in models.items() if r["outcome"] == "proved"})
    lines += ["", f"Model types with a class that is proved ({len(proved)}):", ""]
    lines += textwrap.wrap(", ".join(proved) + ".", 100, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def main() -> int:
    import os
    import sys

    sys.path.insert(0, str(HERE.parents[1]))
    from tests.sweep.catalogue import units

    tasks = {unit.name: unit.tasks for unit in units()}
    if len(sys.argv) > 1:
        missing = set(tasks) - set(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["models"])
        if missing:
            print(f"{sys.argv[1]} lacks {len(missing)} of {len(tasks)} models: run tests/sweep/run.py to its end")
            return 1
        os.replace(sys.argv[1], RESULTS)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results(), tasks), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
