"""Many prefixes in one batch: each sample picks its own, in training and in generation."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import prefixattn


def main():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=2)).eval()
    bank = prefixattn.attach(model, prefixattn.PrefixConfig(length=4, share="none", count=100))
    bank.sparse = True  # the gradient has the batch's prefixes only
    optimizer = torch.optim.SparseAdam(bank.parameters(), lr=1e-2)

    ids, prefix_ids = torch.randint(500, (3, 12)), torch.tensor([7, 0, 99])
    for step in range(3):
        loss = model(input_ids=ids, labels=ids, prefix_ids=prefix_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print("step", step, "loss", round(float(loss), 4))

    texts = model.generate(ids, prefix_ids=prefix_ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        bank.save_pretrained(folder)  # one safetensors file
        bank.detach()
        opened = prefixattn.PrefixBank.open(model, folder)  # read as far as it is used
        again = model.generate(ids, prefix_ids=prefix_ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(texts, again)
        print("prefixes:", len(opened), "one of them:", list(opened.get(7).shape))


if __name__ == "__main__":
    main()
