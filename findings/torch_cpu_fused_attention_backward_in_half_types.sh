#!/usr/bin/env bash
# torch 2.15.0: on a CPU the backward of `scaled_dot_product_attention` in bfloat16 takes longer than in float32, and many times as
# long as that of the same attention written out.
#
# The fused forward is the faster one, so nothing warns of it; a small vision transformer under bfloat16 autocast spent half of
# each training step there. Here: batch 128, 4 heads of 64, 65 tokens, two threads, the least of five times.
# Seen on an Intel Xeon with AMX: backward in bfloat16 103 to 114 ms fused and 7 to 8 ms written out, in float32 15 to 22 and 3 to
# 17 ms; float16 is as bfloat16 (120 and 13). With 197 and 512 tokens the fused backward takes 3.8 and 1.4 times the other. Other CPUs may differ.
# Expected: the backward gains from the half type as the forward's products do.
#
# Ends with 0 if the fused backward in bfloat16 takes over three times the other's, and longer than its own in float32; else 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(2)


def least(work):
    work()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def written(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def backward_ms(attention, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(128, 4, 65, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(128, 4, 65, 64, dtype=dtype)
    with torch.no_grad():
        forward = least(lambda: attention(q, k, v))
    return least(lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), gradient)) - forward


fused = {d: backward_ms(F.scaled_dot_product_attention, d) for d in (torch.bfloat16, torch.float32)}
plain = {d: backward_ms(written, d) for d in (torch.bfloat16, torch.float32)}
print(f"torch {torch.__version__}, AMX {torch.cpu._is_amx_tile_supported()}")
for dtype in fused:
    print(f"{dtype}: backward {fused[dtype]:.1f} ms fused, {plain[dtype]:.1f} ms written out")
seen = fused[torch.bfloat16] > 3 * plain[torch.bfloat16] and fused[torch.bfloat16] > fused[torch.float32]
sys.exit(0 if seen else 1)
PYTHON
