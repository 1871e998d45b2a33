"""Which models, prompts and prefixes `SharedPrompt` refuses, in which words."""

import pytest
import torch
from torch import nn

import prefixattn
from prefixattn import PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")
from prefixattn.testing.models import tiny, token_ids

PROMPT = token_ids(1, 7)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_prompts_do_not_slide_out_of_a_window_behind_a_prefix_that_stays(family):
    model = tiny(family, sliding_window=10)
    prefix = prefixattn.attach(model, PrefixConfig(length=2, share="none"))
    shared = prefixattn.SharedPrompt(model)
    with torch.no_grad(), shared(PROMPT):
        assert model(token_ids(2, 3)).logits.shape[1] == 3
        with pytest.raises(ValueError, match="window of 10 tokens, but the longest prompt has 7 and the completions 4"):
            model(token_ids(2, 4))
        with pytest.raises(ValueError, match=r"completions 4.*attach the prefix with prefix_in_window=True"):
            model.generate(token_ids(1, 2), attention_mask=torch.ones(1, 2), max_new_tokens=8, do_sample=False)
    assert model(token_ids(2, 20)).logits.shape[1] == 20
    prefix.detach()
    with torch.no_grad(), shared(PROMPT):
        assert model(token_ids(2, 20)).logits.shape[1] == 20


PREFIXES = {
    "a bank": ({"length": 3, "share": "none", "count": 2}, "behind a PrefixBank; a single Prefix"),
    "some layers": ({"length": 3, "layers": [0]}, r"layers=\(0,\) and length=3"),
    "lengths": ({"length": [3, 2]}, r"layers='all' and length=\(3, 2\)"),
    "dropout": ({"length": 3, "dropout": 0.1}, "dropout=0.1, which would fall on the prompts too"),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_that_cannot_stand_before_prompts_are_refused(case):
    model = tiny("gpt2")
    choices, words = PREFIXES[case]
    shared = prefixattn.SharedPrompt(model)
    prefix = prefixattn.attach(model, PrefixConfig(**choices))
    with pytest.raises(NotImplementedError, match=words), shared(PROMPT):
        pass
    prefix.detach()
    plus = prefixattn.attach(model, prefixattn.PrefixPlusConfig())
    with pytest.raises(NotImplementedError, match="behind a PrefixPlus"), shared(PROMPT):
        pass
    plus.detach()


@pytest.mark.parametrize("family", ["bart", "bert", "t5"])
def test_models_that_are_not_causal_are_refused(family):
    with pytest.raises(NotImplementedError, match="SharedPrompt takes causal language models"):
        prefixattn.SharedPrompt(tiny(family))


def test_a_model_that_carries_more_than_keys_and_values_is_refused():
    class Carrying(nn.Module):
        """Each token sees the sum of those before it, as a recurrent layer's state would show it."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden) + hidden.cumsum(1)

    model = tiny("llama")
    model.model.layers[0].mlp = Carrying(model.model.layers[0].mlp)
    with pytest.raises(NotImplementedError, match="LlamaModel computes something else of tokens behind a shared prom"):
        prefixattn.SharedPrompt(model)
    assert not model.model._forward_pre_hooks


MISTAKES = {
    "no tensor": ([[1]], None, "input_ids is a list, expected integers"),
    "a row": (torch.ones(3, dtype=torch.int64), None, r"input_ids is torch.int64 \[3\], expected integers \[T, P\]"),
    "no tokens": (torch.ones(2, 0, dtype=torch.int64), None, r"input_ids has shape \[2, 0\]"),
    "mask": (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 2), r"attention_mask is torch.float32 \[2, 2\]"),
    "a hole": (torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]]), "hides tokens between others"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_wrong_prompts_are_refused(case):
    model = tiny("gpt2")
    ids, mask, words = MISTAKES[case]
    with pytest.raises(ValueError, match=words), prefixattn.SharedPrompt(model)(ids, mask):
        pass
    assert not model.transformer._forward_pre_hooks


def test_ids_that_name_no_prompt_are_refused():
    model = tiny("gpt2")
    with prefixattn.SharedPrompt(model)(PROMPT.repeat(2, 1)):
        with pytest.raises(
            ValueError, match=r"prefix_ids is missing for T=2 shared prompts; expected .* a prompt for ea"
        ):
            model(token_ids(2))
        with pytest.raises(ValueError, match=r"prefix_ids\[1\] is 2, expected 0 to 1"):
            model(token_ids(2), prefix_ids=torch.tensor([0, 2]))


def test_positions_past_the_models_are_refused():
    model = tiny("gpt2")  # of 64 positions
    with prefixattn.SharedPrompt(model)(token_ids(1, 40)):
        with pytest.raises(ValueError, match="position 64 is past the model's 64 positions"):
            model(token_ids(1, 25))
