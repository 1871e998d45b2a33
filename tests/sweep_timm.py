"""Every model name of timm: a small model of it gets a prefix and is proved, or is refused by name.

    python tests/sweep_timm.py [--only PATTERN] [--out tests/sweep_timm.json]

Ends with 1 if a proof failed. Takes some minutes.
"""

import argparse
import copy
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.attach import make_adapter
from prefixattn.testing.timm import concatenating

FILE = Path(__file__).with_suffix(".json")
MOST_PARAMETERS = 40_000_000
SMALL = {"embed_dim": 64, "num_heads": 4, "depth": 2, "num_classes": 5, "mlp_ratio": 4.0}
# of what a name's own sizes are left alone, one after another: some are bound to each other
CHOICES = (
    ("embed_dim", "num_heads", "depth", "num_classes", "img_size"),
    ("embed_dim", "num_heads", "depth", "num_classes", "img_size", "mlp_ratio"),
    ("depth", "num_classes", "img_size"),
    ("embed_dim", "num_heads", "num_classes", "img_size"),
    ("num_classes", "img_size"),
    ("embed_dim", "num_heads", "depth", "num_classes"),
    ("num_classes",),
)


class Unfilled(TorchFunctionMode):
    """Inside, parameters on meta are not initialised, which would take most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_") and name != "requires_grad_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Outcome(NamedTuple):
    kind: str  # "proved", "refused", "not built" or "failed"
    words: str = ""


def outcome(name: str) -> Outcome:
    try:
        with torch.device("meta"), Unfilled():
            whole = timm.create_model(name)
    except Exception as error:  # some look at numbers while they are made
        return Outcome("not built", first_line(error))
    try:
        make_adapter(whole)
    except NotImplementedError as error:
        return Outcome("refused", str(error))
    try:
        model, x = small(name, whole)
    except Exception as error:
        return Outcome("not built", first_line(error))
    try:
        prove(model, x)
    except Exception as error:
        return Outcome("failed", first_line(error))
    return Outcome("proved")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def small(name: str, whole: nn.Module) -> tuple[Any, Tensor]:
    """A small random model of a name in evaluation mode, and images for it."""
    cfg = whole.pretrained_cfg  # type: ignore[union-attr]
    patch = max((m.kernel_size[0] for m in whole.modules() if isinstance(m, nn.Conv2d)), default=16)
    size = 4 * (patch if patch >= 8 else 16)
    reasons = []
    for choice in CHOICES:
        sizes = {n: v for n, v in {**SMALL, "img_size": size}.items() if n in choice}
        side = size if "img_size" in sizes else cfg["input_size"][1]
        try:
            with torch.device("meta"), Unfilled():
                numbers = sum(p.numel() for p in timm.create_model(name, **sizes).parameters())
            if numbers > MOST_PARAMETERS:
                raise ValueError(f"{numbers / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = timm.create_model(name, **sizes).eval()
            spread(model)
            x = torch.randn(2, cfg["input_size"][0], side, side)
            with torch.no_grad():
                out = model(x)
            if not out.isfinite().all() or torch.equal(out[0], out[1]):
                raise ValueError("the output is not finite, or does not depend on the image")
            return model, x
        except Exception as error:
            reasons.append(first_line(error))
    raise ValueError(f"no small model of {name}: {'; '.join(dict.fromkeys(reasons))}")


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Larger weights than usual, and in LayerScale too, or a prefix would hardly move the logits."""
    width = getattr(model, "embed_dim", 1000)
    alpha = 0.1 if isinstance(width, int) and width <= 128 else 0.02
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=alpha)


def prove(model: Any, x: Tensor) -> None:
    """AssertionError in words if a prefix is not what it should be in the model."""
    model.requires_grad_(False)
    kinds, state, plain = [type(m) for m in model.modules()], list(model.state_dict()), model(x)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share="none"))
    out = model(x)
    says(out.isfinite().all() and not torch.equal(out, plain), "the prefix does not move the output")
    with torch.no_grad(), concatenating(prefix):
        expected = twin(x)
    close = torch.allclose(out, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    says(close, f"concatenation gives another output, by {float((out - expected).abs().max().detach()):.2g}")
    out.square().mean().backward()
    gradients = prefix.encoder.bank.grad.flatten(1).abs().sum(1)
    says(gradients.isfinite().all() and (gradients > 0).all(), "a layer gets no gradient")
    mass = prefix.mass(x)
    says(len(mass) == len(prefix.slots) and ((mass > 0) & (mass < 1)).all(), "mass is not between 0 and 1")
    says(torch.equal(model.forward(x), out), "forward by itself gives another output")
    if in_parts(twin, x) is not None:
        says(torch.equal(in_parts(model, x), out), "forward_features and forward_head give another output")
    with prefix.disabled():
        says(torch.equal(model(x), plain), "disabled() is not the plain model")
    prefix.detach()
    says(torch.equal(model(x), plain), "detach() does not leave the plain model")
    says([type(m) for m in model.modules()] == kinds and list(model.state_dict()) == state, "detach() leaves traces")
    try:
        prefix = prefixattn.attach(model, PrefixConfig(length=4, share="simple"))
    except NotImplementedError as error:
        says("share='simple' does not know" in str(error), f"share='simple' fails: {first_line(error)}")
        return
    model(x).square().mean().backward()
    says((prefix.encoder.vectors.grad.flatten(1).abs().sum(1) > 0).all(), "a layer's vectors get no gradient")
    prefix.detach()


def in_parts(model: Any, x: Tensor) -> Any:
    """The output by way of the two halves that most models have."""
    try:
        return model.forward_head(model.forward_features(x))
    except (AttributeError, NotImplementedError):
        return None


def says(holds: Any, words: str) -> None:
    if not holds:
        raise AssertionError(words)


def reason(words: str) -> str:
    """The class of attention that a refusal names, or what else it says."""
    found = re.search(r"its \S+ is a ([\w.]+)", words)
    return found.group(1) if found else re.sub(r" (in|of) \w+( \(.*\))?", "", words)


def record(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    by_kind: dict[str, Any] = {kind: [] for kind in ("proved", "refused", "not built", "failed")}
    for name, (kind, _) in outcomes.items():
        by_kind[kind].append(name)
    refused = Counter(reason(outcomes[name].words) for name in by_kind["refused"])
    return {
        "timm": timm.__version__,
        "counts": {kind: len(names) for kind, names in by_kind.items()},
        "proved": by_kind["proved"],
        "refused": dict(sorted(refused.items())),
        **{kind: {name: outcomes[name].words for name in by_kind[kind]} for kind in ("not built", "failed")},
    }


def sentence(whole: dict[str, Any]) -> str:
    """What docs/models.md tells of it."""
    counts = whole["counts"]
    return (
        f"{counts['proved']} of the {sum(counts.values())} names of timm {whole['timm']} take a prefix, and "
        f"{counts['refused']} are refused by name"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", metavar="PATTERN", help="names with it alone, as timm.list_models has it")
    parser.add_argument("--out", type=Path, help="a JSON file with names, reasons and counts")
    options = parser.parse_args()
    names = timm.list_models(options.only)
    outcomes = {}
    for i, name in enumerate(names):
        outcomes[name] = found = outcome(name)
        print(f"{i + 1}/{len(names)} {name}: {found.kind} {found.words}"[:200], flush=True)
    whole = record(outcomes)
    print(whole["counts"], f"docs/models.md: {sentence(whole)}", sep="\n")
    if options.out:
        options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return int(bool(whole["failed"]))


if __name__ == "__main__":
    sys.exit(main())
