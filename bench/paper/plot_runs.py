"""The table and the figure of a table-to-text run, both from its results JSON alone.

python bench/paper/plot_runs.py bench/paper/results/e2e-small.json
"""

import sys
from pathlib import Path
from typing import Any

from runs import Refusal, read_json, replacing

PERCENT = {"BLEU": 1, "METEOR": 1, "ROUGE_L": 1}  # digits; shown times 100 as in the papers
PLAIN = {"NIST": 2, "CIDEr": 2}
METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
DASHES = {"original": (2, 2), "deep-all": (1, 4)}  # they lie on deep: dashes let all be seen
EVERYWHERE = ("deep-all", "original")  # logits at every position, whatever config["logits"] says


def shown(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.{PERCENT[metric]}f}" if metric in PERCENT else f"{value:.{PLAIN[metric]}f}"


def table(results: dict[str, Any]) -> str:
    """One row for each method, as a Markdown table; then what a reader must know of the numbers."""
    alone = timed_alone(results["config"], results["methods"])
    costs = ("ms/step", "peak MiB") if alone else ("peak MiB",)
    rows = [("method", "trained / kept", *(m.replace("_", "-") for m in METRICS), "dev loss", *costs)]
    for run in results["methods"]:
        trained = f"{run['trained']:,} / {run['kept']:,}" if run["trained"] else "- / -"
        scores = [shown(metric, (run.get("scores") or {}).get(metric)) for metric in METRICS]
        step = f"{1000 * run['seconds_per_step']:.1f}" if run["seconds_per_step"] else "-"
        peak = f"{run['peak_mib']:.0f}" if run["peak_mib"] is not None else "-"
        rows.append((run["method"], trained, *scores, f"{run['dev_loss']:.3f}", *((step, peak) if alone else (peak,))))
    for name, scores in (results.get("paper") or {}).items():
        rows.append((name, "", *(shown(metric, scores[metric]) for metric in METRICS), "", *("" for _ in costs)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("| " + " | ".join(cells) + " |")
    lines.insert(1, "|-" + "-|-".join("-" * w for w in widths) + "-|")
    config = results["config"]
    memory = next((run["memory"] for run in results["methods"] if run["memory"]), "")
    lines += [
        "",
        f"{results['data']['where']}; trained on {results['data']['trained_on']:,} rows, {config['epochs']} epoch(s), "
        f"batch {config['batch']}, P = {config['length']}; {results['data']['decoded']:,} test records decoded, "
        f"beam {config['beams']}",
        f"{config['model']} on {results['provenance']['device']}, {config['threads']} thread(s), "
        f"{config.get('parallel', 'unrecorded')} method(s) at a time; peak: {memory}",
        *remarks(config, [run["method"] for run in results["methods"]]),
        *results.get("notes", []),
    ]
    return "\n".join(lines)


def timed_alone(config: dict[str, Any], methods: list[Any]) -> bool:
    """False if methods ran side by side: what a step took then tells what ran beside it, not what the method costs."""
    return min(config.get("parallel", 1), len(methods)) <= 1


def remarks(config: dict[str, Any], methods: list[str]) -> list[str]:
    """What keeps rows from being compared like for like; a key that an older record lacks says nothing."""
    lines, alone = [], timed_alone(config, methods)
    everywhere = [method for method in EVERYWHERE if method in methods]
    if config.get("logits") == "labelled" and everywhere:
        weighs = "ms/step and peak MiB" if alone else "peak MiB"
        lines.append(
            f"logits (they weigh on {weighs}): at every position for {' and '.join(everywhere)}, at labelled positions "
            "only for the others; like for like: deep-all and original, or all with --logits all"
        )
    if not alone:
        lines.append(
            "no ms/step: methods ran side by side and cost each other time; --parallel 1 runs them one after another"
        )
    elif len(methods) > 1 and "parallel" in config:
        lines.append(
            "ms/step: one method after another; what else the machine did meanwhile weighs on some of them only"
        )
    if "none" in methods:
        lines.append(
            f"none: random, P = {config['length']}; the published No-share runs are none-word: from the activations of "
            "a word, P = 1"
        )
    return lines


def figure(results: dict[str, Any], path: Path) -> None:
    """Training loss per sample (sum over its tokens) against the step, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in results["methods"]:
        if run["losses"]:
            steps, losses = zip(*run["losses"], strict=True)
            dashes = DASHES.get(run["method"])
            style = {"linestyle": (0, dashes), "linewidth": 2.0} if dashes else {"linewidth": 1.2}
            ax.plot(steps, smoothed(list(losses)), label=f"{run['method']} (lr {run['lr']:g})", **style)
    ax.set(xlabel="step", ylabel="loss: sum over a sample's tokens, nats", yscale="log", title=results["name"])
    ax.grid(alpha=0.3, which="both")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=110, format="png")
    plt.close(fig)


def smoothed(values: list[float], window: int = 9) -> list[float]:
    """Centred running mean, over fewer values at the ends."""
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: plot_runs.py RESULTS.json ...", file=sys.stderr)
        return 1
    for name in arguments:
        path = Path(name)
        try:
            results = read_json(path, "expected a results file of e2e.py")
            print(table(results))
            figure(results, path.with_suffix(".png"))
        except (Refusal, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # whatever JSON that is no record leads to
            why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            print(f"{path}: not a results file ({why})", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
