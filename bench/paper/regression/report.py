"""From finished cells to one JSON, and from that alone to the tables and the figure."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.regression import claims, slopes
from bench.paper.regression.families import ACTIVATIONS
from bench.paper.regression.figure import draw
from bench.paper.regression.names import MEASURES, ROUNDING, title
from bench.paper.runs import write_json, write_text
from bench.paper.sweeps.ledger import Ledger, Run
from bench.paper.sweeps.tables import Table, markdown, words

LARGE = {"support": 10**6, "uniform": 0, "attention": 10**4}  # slopes are of n from here on: rates are of large n
Result = dict[str, Any]


def collect(runs: Sequence[Run], ledger: Ledger) -> Result:
    """Whatever of the plan is done: curves and slopes of each setting, the splits, and how the fits went."""
    done = [(run, record) for run in runs if (record := ledger.record(run))]
    groups: dict[str, list[tuple[dict[str, Any], Any]]] = {}
    for run, record in done:
        groups.setdefault("/".join(run.name.split("/")[:2]), []).append((run.config, record["result"]))
    split = groups.pop("splits/all", [])
    return {
        "name": "theory",
        "planned": len(runs),
        "done": len(done),
        "seconds": round(sum(record["seconds"] for _, record in done)),
        "replicates": sorted({run.config["replicates"] for run in runs if "replicates" in run.config}),
        "splits": split[0][1]["rows"] if split else [],
        "settings": [_setting(name, cells) for name, cells in groups.items()],
        "provenance": {
            name: sorted({str(record["provenance"][name]) for _, record in done})
            for name in ("date", "commit", "tree", "device")
        },
        "torch": sorted({record["provenance"]["versions"]["torch"] for _, record in done}),
    }


def least(config: dict[str, Any]) -> int:
    """The smallest n of a setting that slopes are of."""
    return LARGE[config.get("design", "attention")]


def _setting(name: str, cells: list[tuple[dict[str, Any], Any]]) -> Result:
    cells = sorted(cells, key=lambda cell: cell[0]["n"])
    first = cells[0][0]
    config = {key: value for key, value in first.items() if key not in ("n", "replicates", "seed")}
    measures = {}
    for measure in cells[0][1]["measures"]:
        curve = [(config["n"], result["measures"][measure]) for config, result in cells]
        large = [point for point in curve if point[0] >= least(first)]
        found = slopes.of(large)
        measures[measure] = {"curve": [_point(*point) for point in curve], "slope": found and asdict(found)}
    fits = [{"n": config["n"], **result["fits"]} for config, result in cells]
    return {"name": name, "config": config, "measures": measures, "fits": fits}


def _point(n: int, values: Sequence[float | None]) -> dict[str, Any]:
    """Of the replicates that have a value: how many, their mean, and three quantiles."""
    found = [value for value in values if value is not None]
    if not found:
        return {"n": n, "count": 0, "mean": None, "quantiles": None}
    quantiles = [float(f"{q:.4g}") for q in np.quantile(found, (0.1, 0.5, 0.9))]
    return {"n": n, "count": len(found), "mean": float(f"{np.mean(found):.4g}"), "quantiles": quantiles}


def tables(result: Result) -> list[Table]:
    regression = [one for one in result["settings"] if one["config"]["kind"] == "regression"]
    networks = [one for one in regression if one["config"]["family"] in ACTIVATIONS]
    found = [_splits(result["splits"])] if result["splits"] else []
    for caption, part in (
        ("Separate prompts (Theorem 4.1)", [one for one in regression if one["config"]["family"] == "separate"]),
        ("One prompt for key and value (Theorem 4.2)", [o for o in regression if o["config"]["family"] == "simple"]),
        ("One-layer networks (Theorem 4.3)", networks),
    ):
        if part:
            found.append(_rates(caption, part))
    if attention := [one for one in result["settings"] if one["config"]["kind"] == "attention"]:
        found.append(_attention(attention))
    fits = _fits(regression)
    return [*found, fits] if fits.rows else found


def _splits(rows: list[dict[str, Any]]) -> Table:
    sequences = list(dict.fromkeys(row["sequence"] for row in rows))
    sizes = sorted({row["n"] for row in rows})
    shown = {(row["sequence"], row["n"]): f"{row['ratio']:.1e}" if row["error"] > ROUNDING else "0" for row in rows}
    body = [[words(name), *(words(shown[name, n]) for n in sizes)] for name in sequences]
    notes = (
        f"An upper bound needs a ratio that stays above a constant; 0 is an error below {ROUNDING:g}, rounding.",
        "With W free there is a column of W1 and W2 for each atom, and 4.3's ratio is 0 whatever the activation is.",
    )
    return Table("Error over loss along the proofs' splits, by n", ["sequence", *map(str, sizes)], body, notes)


def _rates(caption: str, settings: list[Result]) -> Table:
    body = []
    for setting in settings:
        for measure, name in MEASURES.items():
            found = setting["measures"].get(measure)
            claim = claims.of(setting["config"], measure)
            if found is None or claim is None or not any(point["count"] for point in found["curve"]):
                continue
            body.append([words(one) for one in (title(setting), name, *_judged(found["slope"], claim))])
    notes = (
        f"Slopes of the mean over replicates on log-log axes, with the {slopes.LEVEL:.0%} bootstrap interval, for n "
        f"from {LARGE['support']:,} on (uniform X: all n); then of the {slopes.TAIL} largest n; then of the median.",
        f"A slope is told from a rate where the interval lies more than {slopes.MARGIN} beyond it.",
        "The rate's slope is over the same n: a log makes it less steep.",
    )
    head = ["setting", "measure", "slope", "largest n", "median", "rate", "its slope", "whose", "verdict"]
    return Table(caption, head, body, notes)


def _judged(slope: dict[str, Any] | None, claim: claims.Claim) -> list[str]:
    said = {"upper": "at most ", "lower": "at least ", "slower": "slower than "}[claim.kind]
    rate = said + slopes.power(claim.power, claim.log)
    if slope is None:
        return ["-", "-", "-", rate, "-", claim.source, slopes.UNKNOWN]
    found = slopes.Slope(**slope)
    own = slopes.of_rate(found.sizes, claim.power, claim.log)
    verdict = slopes.verdict(found, claim.kind, own)
    if not claim.stated:
        told = {slopes.AGREES: "has it", slopes.CONTRADICTS: "has it not"}.get(verdict, slopes.UNKNOWN)
        verdict = f"no theorem; {told}"
    return [
        f"{found.slope:.2f} [{found.low:.2f}, {found.high:.2f}]",
        f"{found.tail:.2f} [{found.tail_low:.2f}, {found.tail_high:.2f}]",
        f"{found.median:.2f}", rate, f"{own:.2f}", claim.source, verdict,
    ]  # fmt: skip


def _attention(settings: list[Result]) -> Table:
    body = []
    for setting in settings:
        for measure, name in MEASURES.items():
            found = setting["measures"].get(measure)
            if found is None or not any(point["count"] for point in found["curve"]):
                continue
            ends = [f"{found['curve'][i]['mean']:.1e}" if found["curve"][i]["count"] else "-" for i in (0, -1)]
            slope = found["slope"] and slopes.Slope(**found["slope"])
            shown = f"{slope.slope:.2f} [{slope.low:.2f}, {slope.high:.2f}]" if slope else "-"
            body.append([words(one) for one in (title(setting), name, *ends, shown)])
    sizes = [fit["n"] for fit in settings[0]["fits"]]
    head = ["prefix", "measure", f"at n = {sizes[0]:,}", f"at n = {sizes[-1]:,}", "slope"]
    steepest = max(fit["largest_gradient"] for setting in settings for fit in setting["fits"])
    noise = min(fit["noise_gradient"] for setting in settings for fit in setting["fits"])
    worse = sum(fit["worse_than_truth"] for setting in settings for fit in setting["fits"])
    notes = (
        f"Descent ended at gradients of at most {steepest:.1g} times the root of n; noise makes {noise:.1g} or more. "
        f"{worse} replicates ended above the truth's objective.",
        'Keys and values "alone" are those of a row without a like; "twice" has two rows that are planted alike.',
        f"Slopes are of n from {LARGE['attention']:,} on; no theorem is of this head.",
    )
    return Table("A planted prefix of an attention head, by gradient descent", head, body, notes)


def _fits(settings: list[Result]) -> Table:
    body = []
    for setting in settings:
        large = [fit for fit in setting["fits"] if fit["n"] >= least(setting["config"])]
        replicates = setting["measures"]["l2"]["curve"][0]["count"] * len(large)
        if not large:
            continue
        body.append([words(one) for one in (
            title(setting), f"{replicates:,}", f"{np.mean([fit['steps'] for fit in large]):.0f}",
            f"{sum(fit['not_converged'] for fit in large):,} of {replicates * large[0]['starts']:,}",
            f"{sum(fit['best_not_converged'] for fit in large):,}",
            f"{sum(fit['worse_than_truth'] for fit in large):,}",
            f"{np.mean([fit['near_best'] for fit in large]):.2f}",
            f"{np.mean([fit['random_near_best'] for fit in large]):.2f}",
            f"{max(fit['largest_gradient'] for fit in large):.1e}",
            f"{np.mean([fit['noise_gradient'] for fit in large]):.1f}",
        )])  # fmt: skip
    head = ["setting", "replicates", "steps", "starts not converged", "best not converged", "worse than the truth",
            "near the best", "of random", "largest gradient", "at the truth"]  # fmt: skip
    notes = (
        "Fits that did not converge are counted here, and their errors are in the tables as they are.",
        "Gradients are over the root of n: the largest at the best fits, and the mean at the truth, which noise makes.",
        "Near the best: the share of starts, and of those at random, that end within 0.01 of a replicate's best.",
    )
    return Table("The fits, of the n that slopes are of", head, body, notes)


def text(result: Result) -> str:
    where = "; ".join(result["provenance"]["device"]) or "nothing"
    lead = (
        f"{result['done']} of {result['planned']} cells, {' or '.join(map(str, result['replicates']))} replicates "
        f"each, {result['seconds'] / 3600:.1f} h of work in all; {where}, torch {', '.join(result['torch'])}. "
        "The losses are reconstructed (bench/paper/regression/losses.py)."
    )
    return markdown("The theory, simulated", lead, tables(result))


def publish(result: Result, out: Path) -> str:
    """OUT.md and OUT.png of a result; returns the tables."""
    shown = text(result)
    write_text(out.with_name(f"{out.name}.md"), shown)
    draw(result, out.with_name(f"{out.name}.png"))
    return shown


def write(runs: Sequence[Run], ledger: Ledger, out: Path) -> str:
    """OUT.json of the finished runs, and all that is made of it."""
    result = collect(runs, ledger)
    write_json(out.with_name(f"{out.name}.json"), result)
    return publish(result, out)
