"""What every run shares: checkpoints that are refused, and curves thinned for a record."""

from pathlib import Path

import pytest
import torch

from bench.paper.runs import Refusal, load_state, save_state, thinned


@pytest.mark.parametrize("damage", ["truncated", "noise", "foreign", "other_run"])
def test_a_bad_checkpoint_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.pt"
    save_state(path, "f" * 64, {"step": 3, "prefix": {"w": torch.ones(100)}})
    keys = {"step", "prefix"}
    loaded = load_state(path, "f" * 64, keys)
    assert loaded is not None
    assert loaded["step"] == 3
    words = f"{path}: damaged checkpoint"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "noise":
        path.write_bytes(b"\x00\x01noise" * 50)
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
        words = "not a checkpoint of this program (lacks fingerprint, prefix, step)"
    else:
        words = "checkpoint of another run (fingerprint ffffffffffff, expected 000000000000"
    with pytest.raises(Refusal) as refusal:
        load_state(path, "0" * 64 if damage == "other_run" else "f" * 64, keys)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none.pt", "x", {"step"}) is None


def test_thins_a_curve_to_means_of_equal_windows() -> None:
    assert thinned([4.0, 2.0, 3.0], points=2) == [(2, 3.0), (3, 3.0)]
    assert thinned([], points=2) == []
    curve = thinned([float(i) for i in range(21_030)])
    assert len(curve) <= 500
    assert curve[-1][0] == 21_030
