"""Prefix-Tuning+ on a frozen LLaMA with grouped key heads: a matrix for each head, added inside attention."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prefixattn


def main():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    ids = torch.randint(500, (4, 16))
    plain = model(ids).logits

    plus = prefixattn.attach(model, prefixattn.PrefixPlusConfig(phi="elu"))
    torch.testing.assert_close(model(ids).logits, plain)  # the matrices start at zero
    optimizer = torch.optim.AdamW(plus.parameters(), lr=1e-2)
    for step in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print("step", step, "loss", round(float(loss), 4))
    with plus.disabled():
        assert torch.equal(model(ids).logits, plain)
    print("trained parameters:", plus.num_parameters())


if __name__ == "__main__":
    main()
