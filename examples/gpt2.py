"""A Deep-share prefix on a frozen GPT-2: training, generation, saving and loading."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import prefixattn


def main():
    torch.manual_seed(0)
    # random and small, so that this runs offline; or GPT2LMHeadModel.from_pretrained("gpt2")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=2)).eval()
    prefix = prefixattn.attach(model, prefixattn.PrefixConfig(length=5, share="deep", hidden=32))
    print("trained parameters:", prefix.num_parameters(), "kept:", prefix.num_parameters(kept=True))
    optimizer = prefixattn.FactoredAdamW(prefix, lr=1e-2)
    ids = torch.randint(500, (8, 16))
    labels = ids.clone()
    labels[:, :8] = -100  # no loss, and no logits, on the first half
    for step in range(5):
        loss = prefixattn.labelled_loss(model, labels, input_ids=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print("step", step, "loss", round(float(loss), 4))

    prefix.eval()  # switches the prefix's own dropout off
    texts = model.generate(ids[:2], num_beams=2, max_new_tokens=6, pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        prefix.save_pretrained(folder)
        prefix.detach()  # the model is the plain model again
        prefixattn.load(model, folder)
    assert torch.equal(texts, model.generate(ids[:2], num_beams=2, max_new_tokens=6, pad_token_id=0))
    print("the loaded prefix generates the same:", texts.shape)


if __name__ == "__main__":
    main()
