"""The README's quick starts and the scripts in examples/ run as they are written, each in a process of its own."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.project import scripts
from tests.support import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"([^\n]+):\n\n```python\n(.*?)```", README.split("## Quick start")[1], flags=re.DOTALL))
# what is true behind each block
PROOFS = {
    "The op, in plain PyTorch": "assert out.shape == q.shape and prefix_k.grad.shape == (12, 10, 64)",
    "A prefix for GPT-2": """
assert texts.shape[0] == 2 and texts.shape[1] > 12 and prefix.is_active
prefix.detach()
torch.testing.assert_close(prefixattn.load(model, "my_prefix")(), prefix())
""",
    "A prefix for a vision transformer of timm": """
assert model.head.weight.grad.any() and all(p.grad is not None for p in prefix.parameters())
assert not any(p.requires_grad for p in model.blocks.parameters())
""",
    "Many prefixes in one batch": """
assert logits.shape == (3, 12, 50257)
model.eval()  # without dropout
together = model(ids, prefix_ids=torch.tensor([7, 0, 99])).logits
alone = model(ids[1:2], prefix_ids=torch.tensor([0])).logits
torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
assert not torch.allclose(alone, model(ids[1:2], prefix_ids=torch.tensor([1])).logits)
""",
}


def libraries(code: str) -> None:
    for name in ("transformers", "timm"):
        if re.search(rf"^(import|from) .*\b{name}\b", code, flags=re.MULTILINE) and find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def test_every_quick_start_has_a_proof() -> None:
    assert list(BLOCKS) == list(PROOFS)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_quick_start_runs_as_written(name: str, tmp_path: Path) -> None:
    libraries(BLOCKS[name])
    assert scripts.run(f"{BLOCKS[name]}\n{PROOFS[name]}\nprint('ran')", tmp_path).endswith("ran\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_runs_and_trains(path: Path, tmp_path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 40
    libraries(code)
    said = scripts.run(path, tmp_path)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", said)]
    assert said and (not losses or losses[-1] < losses[0]), said
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", said)]  # of samples: means of three steps
    assert not rewards or sum(rewards[-3:]) > sum(rewards[:3]), said
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
