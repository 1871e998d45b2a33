#!/usr/bin/env bash
# torch 2.15.0, CPU: inside one `torch.autocast` region a weight that is frozen is cast to bfloat16 at every call.
#
# Autocast keeps what it has cast until the region ends, so that a weight is cast once; but only of weights that take a
# gradient. A frozen backbone, with a prefix, an adapter or LoRA beside it, is thus cast whole for every token that is
# generated, and every training step keeps a bfloat16 copy of each matrix for its backward pass.
# Here: one Linear of 256 x 256 called ten times in one region, its weight trainable and frozen; then a chain of eight
# frozen ones behind an input that takes a gradient.
# Seen: 1 cast of the trainable weight, 10 of the frozen one. The chain's backward holds eight copies, 1 MiB beside the
# weights' 2; with weights that were cast beforehand it holds none, and the output is the same to the bit.
# Expected: a frozen weight, which cannot change, is cast as seldom as one that can.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import sys

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Casts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == (256, 256):
            self.count += 1
        return func(*args, **(kwargs or {}))


def casts(trainable):
    layer, x = nn.Linear(256, 256, bias=False).requires_grad_(trainable), torch.randn(4, 256)
    with torch.autocast("cpu", torch.bfloat16), Casts() as seen:
        for _ in range(10):
            layer(x)
    return seen.count


def held(model):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.shape[-2:] == (256, 256) and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    return out, len(kept), sum(kept.values()) / 2**20


trainable, frozen = casts(True), casts(False)
torch.manual_seed(1)
chain = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8))).requires_grad_(False)
out, copies, mib = held(chain)
before = copy.deepcopy(chain).bfloat16()
same, none, _ = held(before)
print(f"torch {torch.__version__}: casts of one weight in ten calls: trainable {trainable}, frozen {frozen}")
print(f"copies held for the backward of eight frozen layers: {copies} ({mib:.0f} MiB), cast beforehand: {none}")
print(f"outputs equal to the bit: {torch.equal(out, same)}")
sys.exit(0 if (trainable, frozen, copies, none) == (1, 10, 8, 0) and torch.equal(out, same) else 1)
PYTHON
