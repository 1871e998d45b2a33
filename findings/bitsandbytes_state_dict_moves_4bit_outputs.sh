#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX512_BF16 (torch 2.13.0): reading `state_dict()` changes what a 4-bit layer computes.
#
# Without gradients such a layer repacks its weight at its first call. `state_dict()` turns the weight back, and the
# next call repacks what came of that. Here: one nf4 layer of 64 x 64 in evaluation mode, the same input each time.
# Seen: two calls in a row are equal to the bit; after one `state_dict()` the output moved by 0.03.
# Expected: reading a state changes nothing.
#
# Ends with 0 if that is seen, 1 if it is no longer so, 77 where the CPU has no such path.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
layer.weight = bnb.nn.Params4bit(torch.randn(64, 64) * 0.2, requires_grad=False, quant_type="nf4")
layer = layer.to("cpu").eval()
if not getattr(layer, "support_avx512bf16_for_cpu", False):
    print("this CPU has no path that repacks 4-bit weights")
    sys.exit(77)
x = torch.randn(4, 64)
with torch.no_grad():
    first, second = layer(x), layer(x)
    layer.state_dict()
    third = layer(x)
moved = (third - first).abs().max().item()
print(f"bitsandbytes {bnb.__version__}, torch {torch.__version__}")
print(f"two calls in a row are equal: {torch.equal(first, second)}; after state_dict() the output moved by {moved:.3g}")
sys.exit(0 if torch.equal(first, second) and moved > 0 else 1)
PYTHON
