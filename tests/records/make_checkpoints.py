"""Writes checkpoints/: what test_old_files.py must still read. Made once, by commit 4a35c4e; never made anew.

python tests/records/make_checkpoints.py FOLDER
"""

import sys
from pathlib import Path

import torch

from prefixattn import FactoredAdamW, PrefixBank, PrefixConfig, PrefixPlusConfig, attach
from prefixattn.testing.models import tiny

CONFIGS = {
    "deep": PrefixConfig(length=3, hidden=4),
    "none": PrefixConfig(length=2, share="none", positions="shifted"),
    "plus": PrefixPlusConfig(),
}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    expected = {}
    for name, config in CONFIGS.items():
        model = tiny("gpt2")
        prefix = attach(model, config)
        if name == "deep":
            optimizer = FactoredAdamW([prefix], lr=1e-2)
            model(torch.arange(6)[None]).logits.square().mean().backward()
            optimizer.step()
            torch.save(optimizer.state_dict(), folder / "factored_adamw.pt")
        prefix.save_pretrained(folder / name)
        if name != "plus":
            prefix.save_pretrained(folder / f"{name}-folded", folded=True)
            expected[name] = prefix().detach().clone()
    model = tiny("gpt2")
    two = [attach(model, PrefixConfig(length=length, share="none")) for length in (3, 2)]
    bank = PrefixBank.of(model, two)
    bank.save_pretrained(folder / "bank")
    expected["bank"] = bank().detach().clone()
    torch.save(expected, folder / "expected.pt")


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True)
    main(Path(sys.argv[1]))
