"""A sample of the sweep over timm's names, and what is told of the whole of it."""

import importlib.util
import json
from typing import Any

import pytest
import timm

from tests.support import ROOT

SPEC: Any = importlib.util.spec_from_file_location("sweep_timm", ROOT / "tests" / "sweep_timm.py")
sweep = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sweep)
WHOLE = json.loads(sweep.FILE.read_text(encoding="utf-8")) if sweep.FILE.exists() else None
RUN = pytest.mark.skipif(WHOLE is None, reason="tests/sweep_timm.json is not there: make sweep writes it")

# a name of each file of timm's that has one, and of each class of attention
PROVED = [
    "test_vit",
    "test_vit2",
    "test_vit4",
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",
    "naflexvit_base_patch16_siglip",
    "vit_base_patch16_rope_mixed_ape_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_small_plus_patch16_dinov3",
    "vit_tiny_r_s16_p8_224",
]
REFUSED = {
    "swin_tiny_patch4_window7_224": "timm.models.swin_transformer.WindowAttention",
    "test_vit_relpos": "timm.models.vision_transformer_relpos.RelPosAttention",
    "test_resnet": "attach finds no attention",
}


@pytest.mark.parametrize("name", PROVED)
def test_a_small_model_of_a_name_is_proved(name):
    assert sweep.outcome(name) == ("proved", "")


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_is_refused_by_its_attention(name):
    kind, words = sweep.outcome(name)
    assert kind == "refused" and sweep.reason(words) == REFUSED[name]


@RUN
def test_what_the_sweep_tells_is_whole():
    counts = WHOLE["counts"]
    assert not WHOLE["failed"] and counts["failed"] == 0
    assert counts["proved"] == len(WHOLE["proved"]) and counts["refused"] == sum(WHOLE["refused"].values())
    assert counts["not built"] == len(WHOLE["not built"])
    assert set(PROVED) <= set(WHOLE["proved"]) and set(REFUSED.values()) <= set(WHOLE["refused"])
    if timm.__version__ == WHOLE["timm"]:
        assert sum(counts.values()) == len(timm.list_models())


@RUN
def test_the_page_of_models_tells_the_counts():
    assert sweep.sentence(WHOLE) in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
