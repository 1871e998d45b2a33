"""GRPO of the small GPT-2: a group of completions is sampled and trained behind one pass of its prompt."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefixattn

FOLDER = Path(__file__).parents[1] / "bench" / "paper" / "backbone"  # or any causal model's name
PROMPTS = ["The house by the river was", "In the morning she", "He said that the old town had a"]
GROUP, NEW = 8, 16  # completions of a prompt, and their tokens


def main():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left", pad_token="<|endoftext|>")
    shared, optimizer = prefixattn.SharedPrompt(model), torch.optim.AdamW(model.parameters(), lr=2e-4)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    groups = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)  # the prompt of each completion
    last = batch["input_ids"][groups, -1:]  # of its prompt: this token predicts the completion's first
    prompts = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1]
    for step in range(10):
        with torch.no_grad(), shared(*prompts):
            rows = model.generate(last, prefix_ids=groups, do_sample=True, max_new_tokens=NEW, pad_token_id=0)
        tokens = rows[:, 1:]  # [B, NEW]
        kept = (tokens == 0).cumsum(1) - (tokens == 0).long() == 0  # up to an end, which is token 0
        rewards = torch.tensor([float(t.count("e")) for t in tokenizer.batch_decode(tokens, skip_special_tokens=True)])
        advantages = torch.nn.functional.layer_norm(rewards.view(-1, GROUP), (GROUP,))  # (reward - mean) / deviation
        with shared(*prompts):  # once more, with gradients
            logps = model(rows[:, :-1], prefix_ids=groups).logits.log_softmax(-1).gather(-1, tokens[..., None])
            ratios = (logps - logps.detach()).exp()[..., 0]  # 1: a sample's only step has nothing to clip
            (-(ratios * advantages.view(-1, 1))[kept].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        print("step", step, "reward", round(float(rewards.mean()), 2))


main()
