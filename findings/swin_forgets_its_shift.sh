#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0): after one image of 224, `SwinModel` gives another output for larger images.
#
# A layer whose grid is no larger than its window needs no shift; SwinLayer notes that in itself, and nothing takes it
# back. With the default window of 7 and patches of 4, an image whose shorter side is 193 to 224 leaves the last stage
# 7 rows: from then on that stage shifts for no image. Larger images change nothing for smaller ones. At 192 or less the
# call raises, since the table of relative positions fits the whole window only; the window stays lowered then, and
# 256, which ran before, raises as well. DonutSwinModel does the same, SwinBackbone and Swinv2Model do not.
# Here: random models of small layers in evaluation mode, one image of 256 before and after another image.
# Seen: two calls in a row are equal to the bit; after an image of 224 the output moved by 0.15, while no weight did;
# after one of 192 the same call raises.
# Expected: each call takes window and shift from its own image, and the layer keeps what it was made with.
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
from transformers import SwinConfig, SwinModel

config = SwinConfig(embed_dim=16, depths=[2, 2, 2, 2], num_heads=[2, 2, 2, 2])


def output(model, image):
    """The model's output, or its error in short."""
    with torch.no_grad():
        try:
            return model(image).last_hidden_state
        except RuntimeError as error:
            return f"raises: {str(error).split(' at ')[0]}"


torch.manual_seed(0)
large, middle, small = (torch.randn(1, 3, size, size) for size in (256, 224, 192))
print(f"transformers {transformers.__version__}, torch {torch.__version__}, window {config.window_size}")

model = SwinModel(config).eval()
weights = {name: value.clone() for name, value in model.state_dict().items()}
first, second = output(model, large), output(model, large)
output(model, middle)
third = output(model, large)
moved = (third - first).abs().max().item()
kept = all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
print(f"256 twice: equal {torch.equal(first, second)}; after 224: moved by {moved:.2g}, weights kept {kept}")

fresh = SwinModel(config).eval()
fresh.load_state_dict(weights)
again = output(fresh, large)
print(f"a fresh model with the same weights gives the first output: {torch.equal(again, first)}")
output(fresh, small)
last = output(fresh, large)
print(f"256 after 192: {last if isinstance(last, str) else 'runs'}")

seen = torch.equal(first, second) and torch.equal(first, again) and kept and moved > 0 and isinstance(last, str)
sys.exit(0 if seen else 1)
PYTHON
