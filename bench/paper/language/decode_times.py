"""How long texts take by beam search: prompts together, as decode.py does, and one at a time with PEFT's prefix.

Both have the same prefix, which is trained for a few steps and then written as a PEFT adapter, and the same prompts: of
the commonest lengths, so that `rows` of them go together. The texts are compared too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.harness.timing import interleave
from bench.paper.language import backbones
from bench.paper.language.decode import Search, decode
from bench.paper.language.methods import Choices, Tuned
from bench.paper.language.train import Loop, Run, Settings, cast_once, drawn
from bench.paper.runs import Refusal
from bench.paper.sweeps.tables import Entry, Table, words

STEPS = 40
TOGETHER, ALONE, PEFT = "together", "one at a time", "one at a time, PEFT"


def compare(settings: Settings, count: int = 20, rows: int = 10, rounds: int = 2) -> dict[str, Any]:
    """Seconds of each way, of all `count` prompts in each of `rounds`, and how many texts are PEFT's."""
    from peft import PeftModel

    run = Run(replace(settings, method="deep", epochs=1, accumulation=1))
    if run.backbone.seq2seq:
        raise Refusal("decoding is timed beside PEFT's prefix, which is another function in a model with an encoder")
    with TemporaryDirectory() as folder:
        here = Path(folder)
        loop = Loop(run, run.samples(drawn(run.task.train.pairs(), STEPS * settings.batch)), here / "state.pt", "")
        if not loop.train():
            raise Refusal("deep: a loss of its steps is not finite; lower the first rate of the grid")
        run.tuned.prefix.export_peft(here / "adapter")
        other = Tuned(backbones.load(settings.backbone), Choices())
        other.model, other.cached = PeftModel.from_pretrained(other.model, here / "adapter").eval(), False
    other.model.to(run.device)
    if settings.bf16:
        cast_once(other.model)
    run.tuned.train(False)
    prompts = commonest(run.prompt_ids(run.task.test.prompts()), count, rows)
    texts: dict[str, list[str]] = {}
    ways = {TOGETHER: (run.tuned, rows), ALONE: (run.tuned, 1), PEFT: (other, 1)}

    def way(name: str) -> None:
        tuned, at_once = ways[name]
        search = Search(settings.beams, settings.most_new, settings.least_new, settings.length_penalty, at_once)
        with TemporaryDirectory() as folder:
            texts[name] = decode(tuned, prompts, search, Path(folder) / "texts.json", "", run.autocast)

    ms = interleave({name: lambda name=name: way(name) for name in ways}, 0.0, (rounds, rounds))
    same = {name: sum(a == b for a, b in zip(texts[TOGETHER], texts[name], strict=True)) for name in ways}
    return {
        "prompts": len(prompts), "rows": rows, "beams": settings.beams, "steps": loop.steps, "bf16": settings.bf16,
        "seconds": {name: [round(each / 1000, 3) for each in found] for name, found in ms.items()},
        "same_texts": same,
    }  # fmt: skip


def commonest(prompts: Sequence[list[int]], count: int, rows: int) -> list[list[int]]:
    """`rows` prompts of each of the commonest lengths, until there are `count`."""
    lengths = [length for length, often in Counter(map(len, prompts)).most_common() if often >= rows]
    found: list[list[int]] = []
    for length in lengths[: -(-count // rows)]:
        found += [ids for ids in prompts if len(ids) == length][:rows]
    return found[:count] or list(prompts[:count])


def table(found: dict[str, Any]) -> Table:
    """Times over those of prompts together, round by round."""
    base, rows = found["seconds"][TOGETHER], []
    for name, seconds in found["seconds"].items():
        ratios = sorted(each / other for each, other in zip(seconds, base, strict=True))
        mean = sum(seconds) / len(seconds) / found["prompts"]
        said = f"{ratios[0]:.2f}" if len(ratios) == 1 else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        same = found["same_texts"][name]
        rows.append([words(name), Entry(f"{mean:.2f}", mean), Entry(said, ratios[0]), Entry(str(same), same)])
    caption = (
        f"Beam {found['beams']}, {found['prompts']} prompts, {found['rows']} together, after {found['steps']} steps"
        + (", bfloat16" if found["bf16"] else "")
    )
    return Table(caption, ["way", "s a text", "times as long", "same texts"], rows)
