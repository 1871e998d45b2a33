"""The error of float32 on tiles under torch.set_float32_matmul_precision("high"), beside float32's own; no time.

    python -m bench.attention.float32_high                        # on the tiles in use, or on plain ones
    python -m bench.attention.float32_high --isa amx_plain        # on those named

Relative errors by rms, against float64, of out, lse and every gradient; printed as a table.
"""

import argparse
import sys
from collections.abc import Iterator

import torch

from bench.harness.command import NOTHING, command
from prefixattn import _C
from prefixattn.testing.attention import FEATURES, Shape, exact, make_inputs, ours, rms

CALLS = {
    "ViT-B/16, P 10": (Shape(2, 12, 12, 197, 197, 10, 64), "plain"),
    "causal, 1,024 tokens, GQA, P 64": (Shape(1, 8, 2, 1024, 1024, 64, 128), "causal"),
    "float mask, P 140": (Shape(2, 4, 4, 300, 300, 140, 32), "bias"),
    "memory, softcap, bank": (Shape(3, 4, 4, 150, 150, 40, 80), "softcap_causal"),
}


def relative(name: str, setting: str) -> dict[str, float]:
    """By result; a float mask gets no gradient from these kernels."""
    shape, feature = CALLS[name]
    inputs = make_inputs(shape, **FEATURES[feature])
    if "attn_mask" in inputs.tensors:
        inputs.options["attn_mask"] = inputs.tensors.pop("attn_mask").detach()
    right = exact(inputs)
    torch.set_float32_matmul_precision(setting)
    try:
        found = ours(inputs, "cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    return {key: rms(found[key].double() - t) / rms(t) for key, t in right.items()}


def rows() -> Iterator[str]:
    yield "| call | result | highest | high | times |"
    yield "|---|---|---|---|---|"
    for name in CALLS:
        full, high = relative(name, "highest"), relative(name, "high")
        for key in full:
            yield f"| {name} | {key} | {full[key]:.1e} | {high[key]:.1e} | {high[key] / full[key]:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=_C.isa() if _C.isa().startswith("amx") else "amx_plain")
    _C.set_isa(parser.parse_args().isa)
    print(f"{_C.isa()}, float32, relative errors by rms against float64\n")
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    sys.exit(command("float32_high.py", main, NOTHING))
