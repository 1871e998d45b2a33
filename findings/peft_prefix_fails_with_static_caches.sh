#!/usr/bin/env bash
# PEFT 0.21.2 (transformers 5.23.0): with a prefix, `generate(cache_implementation="static")` raises.
#
# PEFT hands its prefix to `generate` as a cache of its own, and asks the static one for `max_cache_len`, which caches
# of transformers 5 have no more. What comes out is an AttributeError about transformers' class, and nothing that says
# that prefixes and static caches do not go together. The model alone generates with a static cache, and the prefix
# with the dynamic one. Gemma 2, whose layers have masks of two kinds, raises a ValueError about their number.
# Here: random LLaMA and Gemma 2 of two layers, a prefix of 4, three new tokens, on a CPU.
# Seen: AttributeError("'StaticCache' object has no attribute 'max_cache_len'"), and "Expected a single attention mask,
# got 2 instead".
# Expected: three tokens, or words that say that a prefix takes no static cache.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import peft
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TOKENS = torch.arange(1, 9)[None]


def tried(model, **options):
    """How many new tokens it makes, or what it raises."""
    limits = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    try:
        return f"{model.generate(input_ids=TOKENS, **limits, **options).shape[1] - TOKENS.shape[1]} tokens"
    except Exception as error:
        return repr(error)


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
torch.manual_seed(0)
config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16)).eval()
static = dict(cache_implementation="static")
found = {"LLaMA alone, static cache": tried(llama, **static)}
with_prefix = get_peft_model(llama, config).eval()
found["LLaMA with a prefix, dynamic cache"] = tried(with_prefix)
found["LLaMA with a prefix, static cache"] = tried(with_prefix, **static)
found["Gemma 2 alone, static cache"] = tried(gemma, **static)
found["Gemma 2 with a prefix, static cache"] = tried(get_peft_model(gemma, config).eval(), **static)
for what, words in found.items():
    print(f"{what}: {words[:90]}")
lacks = "AttributeError(\"'StaticCache' object has no attribute 'max_cache_len'\")"
*others, last = found.values()
seen = others == ["3 tokens", "3 tokens", lacks, "3 tokens"] and "Expected a single attention mask, got 2" in last
sys.exit(0 if seen else 1)
PYTHON
