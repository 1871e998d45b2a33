"""Two prefixes written as PEFT adapters, read again, and combined to one."""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import prefixattn


def main():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=2)).eval()
    ids = torch.randint(500, (2, 12))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in ("one", "other"):
            prefix = prefixattn.attach(model, prefixattn.PrefixConfig(length=3, share="deep", hidden=16))
            prefix.export_peft(Path(folder) / name)  # the network is folded into keys and values
        expected = model(ids).logits  # of the other one, which is active

        one = prefixattn.load(model, Path(folder) / "one")
        other = prefixattn.load(model, Path(folder) / "other")
        print("share of a loaded adapter:", other.config.share)
        torch.testing.assert_close(model(ids).logits, expected)

        both = prefixattn.combine(model, [one, other])
        mean = prefixattn.combine(model, [one, other], how="average", weights=[3, 1])
        print("rows of both:", both.config.length, "of the mean:", mean.config.length)


if __name__ == "__main__":
    main()
