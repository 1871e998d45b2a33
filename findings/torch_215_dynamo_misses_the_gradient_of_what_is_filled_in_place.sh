#!/usr/bin/env bash
# torch 2.15.0: in a compiled function a tensor that was filled in place does not require a gradient, though it does.
#
# An empty tensor, into whose parts tensors with gradients are copied, requires a gradient then. In code that Dynamo
# traces, even with backend="eager", its `requires_grad` is still False; that of a view of it, made afterwards, is True.
# An autograd.Function that asks it which gradients are wanted leaves that one out, silently. DeepSeek's attention in
# transformers 5.23.0 makes its keys so.
# Here: `requires_grad` of such a tensor and of a view of it, in eager and in compiled code.
# Seen: eager True and True, compiled False and True.
# Expected: True four times.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch


def filled(x):
    made = x.new_empty(4)
    made[:2].copy_(x[:2])
    made[2:].copy_(x[2:])
    return made.sum(), made.requires_grad, made.view_as(made).requires_grad


x = torch.ones(4, requires_grad=True)
eager = filled(x)[1:]
compiled = torch.compile(filled, backend="eager", fullgraph=True)(x)[1:]
print(f"requires_grad of the tensor and of its view: eager {eager}, compiled {compiled}")
sys.exit(0 if eager == (True, True) and compiled == (False, True) else 1)
PYTHON
