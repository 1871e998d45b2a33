#!/usr/bin/env bash
# PEFT 0.21.2 (transformers 5.23.0): where Gemma 4's first layer gets no prefix, padding hides the wrong keys.
#
# PEFT makes rows for the layers with the widest heads, and leaves out, with a warning, layers that have more heads than
# those, as the sliding layers of the large Gemma 4 have. The cache that it hands on is then empty in layer 0, and its
# length, which transformers reads there, is 0 and not P. So positions start at 0, and the P columns that PEFT puts in
# front of the attention mask push a sample's own padding P columns along: a sample padded on the left gives other
# logits than alone, and generation other tokens than passes over all tokens.
# Here: random models of four layers, P=4, 9 tokens, 4 of the second sample padding, on a CPU. In one model all layers
# have one key head, in the other the sliding ones have two.
# Seen: logits of the padded sample 1e-6 from those alone in the first model, and more than 1 in the second.
# Expected: the same in both, or an error.
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
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.utils import logging

logging.set_verbosity_error()
SIZES = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
    layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16, hidden_size_per_layer_input=0,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=None, initializer_range=0.2,
)
WIDE = {"head_dim": 16, "num_key_value_heads": 1}
TOKENS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[1, :4] = 0


def tried(heads):
    """How far the logits of a padded sample are from those alone, and whether generation is what passes say."""
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(
        Gemma4TextConfig(**SIZES, num_key_value_heads=heads, per_layer_config={"1": WIDE, "3": WIDE})
    )
    model = get_peft_model(model.eval(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    cache = model.get_prompt(1)
    filled = [i for i, layer in enumerate(cache.layers) if layer.is_initialized]
    with torch.no_grad():
        positions = (MASK.cumsum(1) - 1).clamp(min=0)  # to which PEFT adds P
        padded = model(input_ids=TOKENS, attention_mask=MASK, position_ids=positions).logits[1, 4:]
        alone = model(input_ids=TOKENS[1:, 4:], position_ids=positions[1:, 4:]).logits[0]
        ids = TOKENS
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        limits = dict(min_new_tokens=6, max_new_tokens=6, do_sample=False)
        made = model.generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **limits)
    apart = (padded - alone).abs().max().item()
    print(
        f"{heads} key heads in sliding layers: prefix in layers {filled}, cache of length {cache.get_seq_length()}; "
        f"padded {apart:.1e} from alone; generation as passes say: {torch.equal(made, ids)}"
    )
    return filled, cache.get_seq_length(), apart < 1e-4, torch.equal(made, ids)


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
one, two = tried(1), tried(2)
sys.exit(0 if one == ([0, 1, 2, 3], 4, True, True) and two == ([1, 3], 0, False, False) else 1)
PYTHON
