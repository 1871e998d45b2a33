#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0): `BlipForConditionalGeneration.generate` writes into the `input_ids` that it is given.
#
# It sets their first column, where the tokenizer puts [CLS], to the text config's `bos_token_id`, in place; other
# models' `generate` leaves its inputs alone. A second use of the same tensor, as in `model(**inputs)`, then runs on
# other tokens. Here: a random model of two small layers, one image and the prompt 5 6 7 8, with `bos_token_id` 2.
# Seen: after one `generate` the prompt is 2 6 7 8, and the logits of a forward pass on it moved by 0.27.
# Expected: `generate` works on a copy.
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
from transformers import BlipConfig, BlipForConditionalGeneration

torch.manual_seed(0)
layers = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
tokens = dict(vocab_size=60, bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0)
config = BlipConfig(
    text_config=layers | tokens | dict(encoder_hidden_size=32, max_position_embeddings=64),
    vision_config=layers | dict(image_size=32, patch_size=8),
)
model = BlipForConditionalGeneration(config).eval()
image = torch.randn(1, 3, 32, 32)
prompt = torch.tensor([[5, 6, 7, 8]])
given = prompt.clone()
with torch.no_grad():
    before = model(pixel_values=image, input_ids=given).logits
    model.generate(pixel_values=image, input_ids=given, max_new_tokens=2)
    after = model(pixel_values=image, input_ids=given).logits
moved = (after - before).abs().max().item()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"prompt before {prompt.tolist()}, after generate {given.tolist()}; a forward pass on it moved by {moved:.2g}")
sys.exit(0 if given.tolist() == [[2, 6, 7, 8]] and moved > 0 else 1)
PYTHON
