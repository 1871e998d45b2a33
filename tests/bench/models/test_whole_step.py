"""The benchmark of whole steps: a dry run leaves every row, nothing is timed that disagrees, failures are rows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import prefixattn
from bench.models import baselines, original, whole_step
from bench.models.families import GPT2, Bart, Family, ViT
from bench.models.whole_step import COMPILED, EAGER, LABELLED, Budget, Case, Row
from prefixattn.attach.hf import interface
from tests.support import ROOT

PEFT = {"peft"} if find_spec("peft") else set()
# what transformers, PEFT and Dynamo warn of while models are made; the command itself does not show it
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("dry") / "steps.json"
    # a worker of the suite would pass on that it is one
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.models.whole_step", "--device", "cpu", "--dry-run", "--out", str(out)],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "| gpt2-medium | 5 | fp32 eager | ours |" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == [out.name], "a temporary file was left behind"
    return json.loads(out.read_text())


def test_a_dry_run_leaves_every_row(dry: dict[str, Any]) -> None:
    found = {(r["model"], r.get("source"), r["P"], r["who"], r["how"]) for r in dry["rows"]}
    cases = [("gpt2-medium", None, 5), *(("vit-b16", None, P) for P in (10, 50, 200))]
    cases += [("bart-large", source, 200) for source in (16, 32)]
    wanted = {(*case, who, f"{t} {how}") for case in cases for t in ("fp32", "bf16") for who, how in EAGER}
    wanted |= {(*cases[0], who, f"{t} {how}") for t in ("fp32", "bf16") for who, how in LABELLED}
    compiled = [case for case in cases if case[1:] in ((None, 5), (None, 10))]
    wanted |= {(*case, who, f"bf16 {how}") for case in compiled for who in ("frozen", "ours") for how in COMPILED}
    assert found == wanted
    assert {r["library"] for r in dry["rows"] if r["model"] == "vit-b16"} == {"timm", "transformers"}


def test_what_ran_has_times_and_what_did_not_has_a_reason(dry: dict[str, Any]) -> None:
    for r in dry["rows"]:
        if "absent" in r:
            assert len(r["absent"].split()) > 2, r
            continue
        assert 0 < r["min_ms"] <= r["ms"][0] <= r["ms"][1] <= r["ms"][2]
        assert r["trained"] > 0 and r["first_gradient"] > 0
        assert r["extra_ms"] == 0 if r["who"] == "frozen" else "extra_ms" in r
    there = [r for r in dry["rows"] if "absent" not in r]
    ran = {model: {r["who"] for r in there if r["model"] == model} for model in whole_step.MODELS}
    everyone = {"frozen", "ours", "original"}
    assert ran == {"gpt2-medium": everyone | PEFT, "bart-large": everyone | PEFT, "vit-b16": everyone}
    [words] = {
        r["absent"] for r in dry["rows"] if (r["model"], r["who"], r["library"]) == ("vit-b16", "peft", "transformers")
    }
    assert words == "NotImplementedError: PEFT has no prefix-tuning for image models"
    assert dry["memory"] == "not measured on a CPU" and "commit" in dry and dry["dry"] is True


def test_baselines_that_train_the_same_network_start_alike(dry: dict[str, Any]) -> None:
    rows = [r for r in dry["rows"] if r["model"] == "gpt2-medium" and r["who"] != "frozen"]
    assert len({r["trained"] for r in rows}) == 1
    assert max(r["first_loss"] for r in rows) == pytest.approx(min(r["first_loss"] for r in rows), rel=1e-3)
    apart = {r["how"]: r["apart"] for r in rows if "apart" in r}
    assert apart.keys() == {"fp32 eager", "bf16 eager"} and apart["fp32 eager"].keys() == {"original"} | PEFT
    assert max(apart["fp32 eager"].values()) < 1e-4


def measured(family: Family, P: int, *ways: tuple[str, str], dtype: torch.dtype = torch.float32) -> dict[str, Row]:
    rows = whole_step.measure(Case(family, P, dtype, ways), "cpu", Budget(1.0, dry=True), 0.0, {})
    return {r["who"]: r for r in rows}


def test_a_prefix_that_ours_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, attach = interface.prefix_attention, prefixattn.attach

    def then_forgets(model: Any, config: Any) -> Any:
        prefix = attach(model, config)  # which would refuse a prefix that reaches nothing
        monkeypatch.setattr(interface, "prefix_attention", forgetful)
        return prefix

    def forgetful(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, **options: Any) -> Tensor:
        return whole(q, k, v, prefix_k[:, :0], prefix_v[:, :0], **options)

    monkeypatch.setattr(prefixattn, "attach", then_forgets)
    monkeypatch.setattr(whole_step.Step, "warm_up", lambda self, steps: {"first_loss": 1.0, "first_gradient": 1.0})
    rows = measured(GPT2(tiny=True), 5, *EAGER)
    assert rows["ours"]["failed"] and "prefixes of [0, 0] rows were attended to" in rows["ours"]["absent"]
    assert "ms" not in rows["ours"] and "ms" in rows["original"]


def test_a_parameter_without_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prefixattn.attach

    def idle(model: Any, config: Any) -> nn.Module:
        prefix = whole(model, config)
        prefix.encoder.idle = nn.Parameter(torch.ones(2))
        return prefix

    monkeypatch.setattr(prefixattn, "attach", idle)
    ours = measured(GPT2(tiny=True), 5, *EAGER)["ours"]
    assert ours["absent"] == "AssertionError: no gradient reached encoder.idle" and "ms" not in ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_that_the_original_forgets_is_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(original.OriginalPrefix, "cache", lambda self, rows, config: DynamicCache(config=config))
    family = GPT2(tiny=True)
    made = {who: baselines.BASELINES[who](family, "cpu", dtype, 5) for who in ("frozen", "ours", "original", *PEFT)}
    before = [p.clone() for p in made["ours"].trained.parameters()]
    with pytest.raises(AssertionError, match=r"ours and original disagree: loss .* gradients apart by"):
        baselines.assert_agree(made["ours"], {"original": made["original"]}, made["frozen"])
    others = {who: made[who] for who in PEFT}
    assert all(e < 0.1 for e in baselines.assert_agree(made["ours"], others, made["frozen"]).values())
    for p, value in zip(made["ours"].trained.parameters(), before, strict=True):
        assert torch.equal(p, value)


def test_disagreement_ends_in_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    case = Case(GPT2(tiny=True), 5, torch.float32, EAGER)
    monkeypatch.setattr(whole_step, "cases", lambda tiny, models: [case])
    monkeypatch.setattr(baselines, "_columns", lambda prefixes, rows: whole_columns(prefixes, rows).flip(-1))
    assert whole_step.main(["--device", "cpu", "--dry-run", "--out", str(tmp_path / "a.json")]) == 1
    assert "ours and original disagree" in capsys.readouterr().out
    assert {r["who"]: r.get("failed") for r in json.loads((tmp_path / "a.json").read_text())["rows"]}["ours"]


whole_columns = baselines._columns


def test_a_baseline_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> baselines.Baseline:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nand more lines")

    monkeypatch.setitem(baselines.BASELINES, "original", full)
    rows = measured(GPT2(tiny=True), 5, ("frozen", "eager"), ("ours", "eager"), ("original", "eager"))
    assert rows["original"]["absent"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB"
    assert rows["ours"]["ms"] and rows["ours"]["note"] == "not compared: no other way is there"


def test_the_time_limit_ends_a_run_with_reasons(tmp_path: Path) -> None:
    out = tmp_path / "none.json"
    arguments = ["--device", "cpu", "--dry-run", "--minutes", "0", "--model", "vit-b16", "--out", str(out)]
    assert whole_step.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {r["absent"] for r in rows} == {"not run: the 0 minutes were over"} and {r["model"] for r in rows} == {
        "vit-b16"
    }


def test_gpt2_and_vit_come_first_and_compiled_steps_after_all_eager_ones() -> None:
    cases = whole_step.cases(tiny=True, models=whole_step.MODELS)
    assert [case.family.name for case in cases[:4]] == ["gpt2-medium", "gpt2-medium", "vit-b16", "vit-b16"]
    hows = [case.ways[0][1] for case in cases if case.family.library == "transformers"]
    assert "eager" not in hows[hows.index(COMPILED[0]) : hows.index(COMPILED[0]) + hows.count(COMPILED[0])]


def forgetful_attention(module: Any, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
    k, v, held = module.published
    module.published = k[:, :, 1:], v[:, :, 1:], held
    return whole_attention(module, query, *args, **options)


whole_attention = baselines.concatenating_attention
FAMILIES: dict[str, Callable[[], Family]] = {"bart": lambda: Bart(True, 512), "vit": lambda: ViT(True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_ours_and_the_published_way_agree(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]()
    rows = measured(family, 10, ("frozen", "eager"), ("ours", "eager"), ("original", "eager"), dtype=dtype)
    assert "ms" in rows["ours"] and "ms" in rows["original"], rows
    assert rows["ours"]["trained"] == rows["original"]["trained"]
    assert rows["ours"]["apart"]["original"] < baselines.TOLERANCES[dtype][1]
    monkeypatch.setattr(baselines, "concatenating_attention", forgetful_attention)
    if dtype == torch.float32:  # the first row alone is forgotten
        rows = measured(family, 10, ("frozen", "eager"), ("ours", "eager"), ("original", "eager"), dtype=dtype)
        assert "ours and original disagree" in rows["ours"]["absent"]


def test_networks_of_vit_interleave_keys_and_values() -> None:
    networks = baselines.ViTNetworks(ViT(True), P=3).eval()
    k, v = networks(rows=2, dtype=torch.float32)[1]
    out = networks.networks[1](networks.embeddings[1])  # [P, 2 * width]
    assert k.shape == v.shape == (2, 2, 3, 16)
    torch.testing.assert_close(k[1].transpose(0, 1).flatten(1), out[:, 0::2])
    torch.testing.assert_close(v[0].transpose(0, 1).flatten(1), out[:, 1::2])
    networks.train()
    k, _ = networks(rows=2, dtype=torch.float32)[1]
    assert not torch.equal(k[0], k[1]), "dropout draws a mask for each sample"
