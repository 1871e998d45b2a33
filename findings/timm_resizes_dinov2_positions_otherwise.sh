#!/usr/bin/env bash
# timm 1.0.31 and transformers 5.23.0 (torch 2.15.0): the same DINOv2 weights give other features at another image size.
#
# At the size of its table of positions (518) the two agree. At every other size timm resizes the table with
# `antialias=True`, transformers' Dinov2 with `antialias=False`. Larger images differ too, if less: with `antialias`
# torch's bicubic kernel is another one (a = -0.5 in place of -0.75). The release, facebookresearch/dinov2 at b8931f7,
# has `interpolate_antialias=False` for these models (dinov2/hub/backbones.py), and stretches by (n + 0.1)/37 for n
# patches a side, which neither does. With registers it has True, and there timm and transformers agree.
# Here: a random model of two small layers in both, with the same weights and 37 x 37 positions, once noise and once
# smooth (8 x 8 noise, enlarged). Trained tables were not tried.
# Seen, as a share of transformers' features: noise 0.75 at 224 and 0.06 at 672, smooth 0.03 and 0.015.
# Table against the release's, at 224: timm's is 0.82 away, transformers' 0.3 (noise); 0.07 and 0.06 (smooth).
# Expected: for these models timm resizes without antialias, as the release does.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.15.0 torchvision==0.29.2 numpy timm==1.0.31 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import timm
import torch
import torch.nn.functional as F
import transformers
from transformers import Dinov2Config, Dinov2Model

WIDTH, TRAINED, PATCH = 32, 37, 14
NAMES = {
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.cls_token": "cls_token",
    "encoder.layer.": "blocks.",
    "attention.o_proj.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}


def renamed(state):
    """The weights of a Dinov2Model under timm's names."""
    state = {name: value for name, value in state.items() if "mask_token" not in name}
    for name in [name for name in state if "q_proj" in name]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    for theirs, timms in NAMES.items():
        state = {name.replace(theirs, timms): value for name, value in state.items()}
    return state


def grid(rows, side):
    """Rows of positions, the class token's first, as one picture."""
    return rows[:, 1:].mT.reshape(1, WIDTH, side, side)


def share(one, other):
    return ((one - other).norm() / other.norm()).item()


torch.manual_seed(0)
config = Dinov2Config(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=TRAINED * PATCH, patch_size=PATCH
)
theirs = Dinov2Model(config).eval()
timms = timm.create_model(
    "vit_small_patch14_dinov2", embed_dim=WIDTH, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True
).eval()
noise = torch.randn(1, 1 + TRAINED**2, WIDTH)
smooth = F.interpolate(torch.randn(1, WIDTH, 8, 8), size=TRAINED, mode="bicubic").flatten(2).mT
smooth = torch.cat([noise[:, :1], smooth], dim=1)

print(f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
seen = True
with torch.no_grad():
    for kind, table in ("noise", noise), ("smooth", smooth):
        theirs.embeddings.position_embeddings.copy_(table)
        timms.load_state_dict(renamed(theirs.state_dict()))
        for side in TRAINED, 16, 48:
            size = side * PATCH
            image = torch.randn(1, 3, size, size)
            features = share(timms.forward_features(image), theirs(image).last_hidden_state)
            seen &= features < 1e-5 if side == TRAINED else features > 1e-3
            line = f"{kind:6} {size}: features differ by {features:.2g}"
            if side != TRAINED:
                # what each adds to its tokens: the difference to a run on tokens of zeros
                empty = torch.zeros(1, side, side, WIDTH)
                timms_table = grid(timms._pos_embed(empty), side)
                tokens = torch.zeros(1, 1 + side**2, WIDTH)
                their_table = grid(theirs.embeddings.interpolate_pos_encoding(tokens, size, size), side)
                stretch = (side + 0.1) / TRAINED
                release = F.interpolate(grid(table, TRAINED), scale_factor=stretch, mode="bicubic", antialias=False)
                line += f"; tables by {share(timms_table, their_table):.2g}, from the release's: "
                line += f"timm's {share(timms_table, release):.2g}, transformers' {share(their_table, release):.2g}"
            print(line)
sys.exit(0 if seen else 1)
PYTHON
