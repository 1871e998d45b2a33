#!/usr/bin/env bash
# transformers 5.23.0: T5Gemma's encoder has another window with FlashAttention than with SDPA.
#
# With a `sliding_window` of 4 the mask of the encoder shows 4 tokens to either side, as the config's comment on encoders
# has it. The layer passes `sliding_window=4` on, of which the FlashAttention integration makes `window_size=(3, 3)`,
# which FlashAttention counts without the token itself: 3 to either side. ModernBERT has the same mask and passes 5,
# so that both agree; a causal model (Mistral, T5Gemma's own decoder) has a mask of 3 back and passes 4.
# A backend that reads `sliding_window`, as FlashAttention's does, therefore needs to know the model.
# Here: random models of two layers, a window of 4, 12 tokens, on a CPU; FlashAttention's arguments are asked of the
# function that makes them, no GPU is needed.
# Seen: encoder mask 4, 4 and flash 3, 3; ModernBERT 4, 4 and 4, 4; Mistral 3, 0 and 3 to the left.
# Expected: one model sees the same tokens with each attention implementation.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    T5GemmaConfig,
    T5GemmaModel,
    T5GemmaModuleConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs

WINDOW = 4
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=16)
SLIDING = dict(layer_types=["sliding_attention"] * 2)
TOKENS = torch.arange(1, 13)[None]
calls = []


def noting(module, query, key, value, mask, sliding_window=None, softcap=None, **others):
    calls.append((sliding_window, mask))
    return sdpa_attention_forward(module, query, key, value, mask, **others)


class Everything(dict):
    """A FlashAttention that supports whatever is asked."""

    def __missing__(self, name):
        return True


def windows(model, is_causal):
    """How far back and ahead the mask of the first layer lets a token see, and what FlashAttention is told."""
    calls.clear()
    model.eval().set_attn_implementation("noting")
    with torch.no_grad():
        model(TOKENS)
    told, mask = calls[0]
    query, key = mask[0, 0].nonzero().unbind(1)
    options = dict(query_length=12, key_length=12, is_causal=is_causal, sliding_window=told)
    flash = _process_flash_attention_kwargs(**options, supports_mapping=Everything())["window_size"]
    return (int((query - key).max()), int((key - query).max())), flash


AttentionInterface.register("noting", noting)
AttentionMaskInterface.register("noting", sdpa_mask)
torch.manual_seed(0)
part = T5GemmaModuleConfig(**GROUPED, **SLIDING, sliding_window=WINDOW)
special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
found = {
    "T5Gemma encoder": windows(T5GemmaModel(T5GemmaConfig(encoder=part, decoder=part)).get_encoder(), False),
    "ModernBERT": windows(ModernBertModel(ModernBertConfig(**SIZES, **SLIDING, **special, local_attention=2 * WINDOW)), False),
    "Mistral": windows(MistralModel(MistralConfig(**GROUPED, sliding_window=WINDOW)), True),
}
print(f"transformers {transformers.__version__}, window {WINDOW}: tokens back and ahead")
for name, (mask, flash) in found.items():
    print(f"{name:16} by the mask {mask}, FlashAttention is told {flash}")
expected = {
    "T5Gemma encoder": ((4, 4), (3, 3)),
    "ModernBERT": ((4, 4), (4, 4)),
    "Mistral": ((3, 0), (3, 3)),  # and causal
}
sys.exit(0 if found == expected else 1)
PYTHON
