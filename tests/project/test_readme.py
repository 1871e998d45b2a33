"""The tables of README.md and docs/ are those of the records, and the lines for timm run as they are written."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from bench.attention import plot, plot_gpu
from bench.models import plot as plot_models
from bench.paper import moments
from bench.reparam import plot as plot_reparam
from tests.project import scripts
from tests.support import ROOT


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def record(path: str, page: str) -> tuple[dict[str, Any], str]:
    """A record and the page that shows it, which must say where the record lies."""
    shown = text(page)
    place = os.path.relpath(ROOT / path, (ROOT / page).parent)
    named = [place, place.replace(".json", ".md")]
    assert any(f"]({name})" in shown or f"]: {name}\n" in shown for name in named), f"{page} does not name {path}"
    found: dict[str, Any] = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return found, shown


EPYC, XEON = "cpu-amd-epyc-avx512-2-threads", "cpu-intel-r-xeon-r-processor-avx512-2-threads"
SPEEDS = [
    (EPYC, False, "AMD EPYC (Zen 5) with AVX-512 ([results][cpu]), bidirectional (ViT)"),
    (EPYC, True, "the same, causal (GPT)"),
    (XEON, False, f"Intel Xeon with AMX ([results](bench/results/{XEON}.md)), bidirectional (ViT)"),
    (XEON, True, "the same, causal (GPT)"),
]


@pytest.mark.parametrize("name, causal, label", SPEEDS)
def test_speed_is_the_records(name: str, causal: bool, label: str) -> None:
    result, shown = record(f"bench/results/{name}.json", "README.md")
    pairs = plot.pair(result["rows"])
    assert f"over {len({p['name'] for p in pairs})} shapes" in shown
    cells = []
    for dtype, passes in plot.COLUMNS:
        ratios = [p["ratio"] for p in pairs if (p["causal"], p["dtype"], p["pass"]) == (causal, dtype, passes)]
        cells.append(f"{plot.geometric_mean(ratios):.2f} ({min(ratios):.2f})")
    assert f"| {label} | {' | '.join(cells)} |" in shown


def test_memory_is_the_records() -> None:
    result, shown = record("bench/results/cpu-amd-epyc-avx512-2-threads.json", "docs/benchmarks.md")
    pairs = plot.pair(result["rows"])
    case = ("vit B2 N577 P50 D64", "torch.float32", "fwd+bwd")
    [row] = [p for p in pairs if (p["name"], p["dtype"], p["pass"]) == case]
    ours, peer, necessary = row["ours"]["peak_mib"], row["peer"]["peak_mib"], row["ours"]["necessary_mib"]
    assert f"| {ours:.1f} MiB | {peer:.1f} MiB | {necessary:.1f} MiB |" in shown


def test_the_networks_tables_are_the_records() -> None:
    result, shown = record("bench/results/reparam-cpu-amd-epyc-avx512-2-threads.json", "docs/optimizer.md")
    for line in plot_reparam.times(result) + plot_reparam.peak_table(result):
        assert line in shown


def test_the_moments_table_is_the_records() -> None:
    result, shown = record("bench/paper/results/moments.json", "docs/optimizer.md")
    for line in moments.table(result).splitlines():
        assert line in shown


def test_the_steps_of_smollm2_are_the_records() -> None:
    pytest.importorskip("transformers", reason="what makes the tables needs transformers")
    from bench.paper.language import decode_times, times
    from bench.paper.sweeps.tables import markdown

    result, shown = record("bench/paper/results/nlg-smollm2-times.json", "docs/language.md")
    made = markdown("", "", [*times.tables(result), decode_times.table(result["decoding"])])
    lines = [line for line in made.splitlines() if line.startswith("|")]
    assert len(lines) == 2 * 8 + 5
    for line in lines:
        assert line in shown


def test_the_shared_prompts_table_is_the_records() -> None:
    pytest.importorskip("transformers", reason="what makes the table needs transformers")
    from bench.models import shared_prompts

    result, shown = record("bench/results/shared-prompts.json", "docs/prompts.md")
    lines = shared_prompts.table(result["rows"])
    assert len(lines) == 2 + len(shared_prompts.LENGTHS)
    for line in lines:
        assert line in shown
    assert f"has {result['group']} completions of {result['new']} tokens" in shown


def test_the_tables_of_windows_packing_and_a_long_prefix_are_the_records() -> None:
    from bench.attention import long_prefix, packed, windows

    for module, name in ((windows, "windows"), (packed, "packed"), (long_prefix, "long-prefix")):
        result, shown = record(f"bench/results/{name}.json", "docs/benchmarks.md")
        for line in module.table(result["rows"]):
            assert line in shown
        assert result["tree"] == "clean"


def test_gpu_tables_are_the_records() -> None:
    """`python -m bench.attention.plot_gpu RECORD` prints the table."""
    results = ROOT / "bench" / "results"
    found = [p for p in results.glob("*.json") if "copy_gbytes" in json.loads(p.read_text(encoding="utf-8"))]
    if not found:
        pytest.skip("no GPU was measured yet: there is no record")
    for path in found:
        result, shown = record(f"bench/results/{path.name}", "docs/benchmarks.md")
        for line in plot_gpu.targets(result):
            assert line in shown


def test_the_models_tables_are_the_records() -> None:
    """`python -m bench.models.plot RECORD` prints them."""
    found = sorted((ROOT / "bench" / "results").glob("models-*.json"))
    if not found:
        pytest.skip("bench.models.bench_models was not run to its end yet: there is no record")
    for path in found:
        result, shown = record(f"bench/results/{path.name}", "docs/benchmarks.md")
        for line in plot_models.steps(result) + plot_models.attached(result):
            assert line in shown


def test_the_lines_for_timm_run_as_written() -> None:
    """In a process of its own, with a step between them; timm and torchvision are what `make build` installs."""
    section = text("docs/models.md").split("## timm's vision transformers")[1]
    first, second = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    step = """
import torch
torch.manual_seed(0)
images, labels = torch.randn(2, 3, 224, 224), torch.tensor([3, 141])
losses = []
for _ in range(3):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
assert losses[2] < losses[0], losses
"""
    after = "\nassert torch.isfinite(model(images)).all() and ema.module is not prefix\nprint('ran')\n"
    assert "ran" in scripts.run(first + step + second + after, ROOT / "tests")


def run_page(code: str, folder: Path) -> None:
    """In a process of its own, in `folder`, with the small GPT-2 of the repository."""
    code = code.replace("bench/paper/backbone", str(ROOT / "bench/paper/backbone")) + "\nprint('ran')\n"
    assert scripts.run(code, folder).endswith("ran\n")


def test_the_page_on_serving_runs_as_written(tmp_path: Path) -> None:
    for library in ("transformers", "safetensors"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    first, second = re.findall(r"```python\n(.*?)```", text("docs/serving.md"), flags=re.DOTALL)
    proof = """
assert torch.equal(text, model.generate(ids, attention_mask=mask[:, 5:], do_sample=False))
assert torch.equal(again, text[:1]) and text.shape[1] > 8
"""
    run_page(first + second + proof, tmp_path)


def test_the_page_on_prompts_runs_as_written(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    [code] = re.findall(r"```python\n(.*?)```", text("docs/prompts.md"), flags=re.DOTALL)
    proof = """
whole = torch.cat([prompts[groups], completions], 1)
mask = torch.cat([prompt_mask[groups], torch.ones_like(completions)], 1)
positions = (mask.cumsum(1) - 1).clamp(min=0)
wanted = torch.cat([torch.full_like(prompts[groups], -100), completions], 1)
repeated = model(whole, attention_mask=mask, position_ids=positions, labels=wanted).loss
torch.testing.assert_close(loss, repeated)
assert model.transformer.wte.weight.grad is not None
"""
    run_page(code + proof, tmp_path)


def test_the_page_on_the_op_runs_as_written(tmp_path: Path) -> None:
    widths, code, packed, batch = re.findall(r"```python\n(.*?)```", text("docs/op.md"), flags=re.DOTALL)
    of_two = """
keys, values = (torch.cat([p.expand(2, -1, -1, -1), x], 2) for p, x in ((prefix_k, k), (prefix_v, v)))
seen = torch.ones(9, 14, dtype=torch.bool).tril(5)
right = torch.nn.functional.scaled_dot_product_attention(q, keys, values, seen)
torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
"""
    proof = """
wide = prefixattn.prefix_attention(q, k, v, prefix_k, prefix_v, is_causal=True, window_size=(8, -1))
torch.testing.assert_close(stays[:, :, :4], wide[:, :, :4], rtol=1e-5, atol=1e-5)
assert not torch.allclose(stays[:, :, 4:], wide[:, :, 4:], atol=1e-3)
"""
    run_page(widths + of_two + code + proof + packed + batch, tmp_path)


def test_packed_sequences_in_models_run_as_written(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    section = text("docs/models.md").split("## Packed sequences")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    proof = "assert all(p.grad is not None and p.grad.any() for p in prefix.parameters())"
    run_page(code + proof, tmp_path)
