"""Thirty mistakes in kernels, ops, attach, optim and checkpoints: a file, what stands there, what is put in its place.

`tests`: what pytest is asked, part of what `make test` runs.
"""

from typing import NamedTuple


class Mistake(NamedTuple):
    file: str
    right: str  # stands there once
    wrong: str
    tests: str


TRITON = "tests/attention/test_prefix_attn.py -k triton"
REFERENCE = "tests/attention/test_prefix_attn.py -k reference"
DROPOUT = "tests/attention/test_dropout.py -k triton"
OPTIM = (
    "tests/optim/test_optim.py tests/optim/test_gradient.py tests/optim/test_own_network.py tests/optim/test_simple.py"
)
MODELS = (
    "tests/attach/hf/test_gpt2.py tests/attach/hf/test_families.py"
    " tests/attach/hf/test_gpt2_train.py tests/attach/hf/test_gpt2_generate.py"
)
FILES = "tests/prefixes/test_checkpoint.py tests/prefixes/test_saving.py tests/prefixes/test_old_files.py"

MISTAKES = (
    # kernels
    Mistake("kernels/fwd_tiles.py", "        score *= scale\n", "        score *= scale * 1.0001\n", TRITON),
    Mistake("kernels/fwd_tiles.py", "weight *= keep * drops.keep_scale", "weight *= keep", DROPOUT),
    Mistake("kernels/fwd_tiles.py", "seen = weight_sum != 0.0", "seen = weight_sum == weight_sum", TRITON),
    Mistake("kernels/fwd_tiles.py", "if PART == SPLIT:\n        weight = tl.where((column >= axis[0])", "if PART == SPLIT:\n        weight = tl.where((column > axis[0])", TRITON),
    Mistake("kernels/tiles.py", "    if HAS_LENGTHS:\n        length = tl.load(lengths + b)", "    if HAS_LENGTHS:\n        length = tl.load(lengths + t)", TRITON),
    Mistake("kernels/prefix_attn_bwd_short.py", "            if HAS_DLSE:\n                taken -=", "            if HAS_DLSE:\n                taken +=", TRITON),
    Mistake("kernels/prefix_attn_bwd_short.py", "store_rows(partial_k, D, column - S, inside, dk * scale,", "store_rows(partial_k, D, column - S, inside, dk,", TRITON),
    Mistake("kernels/bwd_tiles.py", "    if NEED_V:\n        dropped = weight\n        if FEATURES.DROPOUT:\n            dropped = weight * (keep * drops.keep_scale)", "    if NEED_V:\n        dropped = weight\n        if FEATURES.DROPOUT:\n            dropped = weight * keep", DROPOUT),
    Mistake("kernels/prefix_attn_bwd_prefix.py", "end = length\n", "end = P\n", TRITON + " tests/kernels/test_triton.py"),
    # ops, and what a call means
    Mistake("prefixattn/attention/ops.py", "    ctx.mark_non_differentiable(mass, attended)\n", "    ctx.mark_non_differentiable(attended)\n", REFERENCE + " or mass"),
    Mistake("prefixattn/attention/ops.py", "grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]\n    return *grads", "grads = list(grads)\n    return *grads", "tests/attention/test_prefix_attn.py tests/attention/test_qkvpacked.py -k 'reference and nobody'"),
    Mistake("prefixattn/attention/normal_form.py", "        scale = D**-0.5 if D else 1.0\n", "        scale = 1.0\n", REFERENCE),
    Mistake("prefixattn/attention/reference.py", "delta = delta - given.dlse.to(delta.dtype)", "delta = delta + given.dlse.to(delta.dtype)", REFERENCE),
    Mistake("prefixattn/attention/reference.py", "prefix_k=dkeys[:, :, :P] * keep_k", "prefix_k=dkeys[:, :, :P]", "tests/attention/test_dropout.py -k reference"),
    Mistake("prefixattn/attention/layout.py", "return torch.float64 if q.dtype in (torch.float32, torch.float64)", "return torch.float64 if q.dtype in (torch.float64,)", "tests/attention/test_accuracy_sums.py tests/attention/test_compile.py -k 'few_queries or opcheck'"),
    Mistake("prefixattn/reparam/reference.py", "    return 1 - z.tanh().square()\n", "    return 1 - z.tanh()\n", "tests/reparam/test_reparam.py -k reference"),
    # attach
    Mistake("prefixattn/attach/adapter.py", "                self.model.requires_grad_(False)\n", "", MODELS),
    Mistake("prefixattn/attach/hf/positions.py", "    positions = positions + shift\n", "", MODELS + " tests/attach/hf/test_positions.py"),
    Mistake("prefixattn/attach/bank.py", "kvs = [prefix._kv() for prefix in found]", "kvs = [found[0]._kv() for prefix in found]", "tests/attach/test_bank.py"),
    Mistake("prefixattn/attach/bank.py", "lengths = torch.tensor([kv.shape[3] for kv in kvs]", "lengths = torch.tensor([P for kv in kvs]", "tests/attach/test_bank.py"),
    Mistake("prefixattn/attach/prefix.py", "self.encoder, self.gate = FreePrefix(self._kv(), trainable=False), None", "self.encoder, self.gate = FreePrefix(self._kv(), trainable=True), None", MODELS + " tests/prefixes/test_modules.py tests/prefixes/test_checkpoint.py"),
    # optim
    Mistake("prefixattn/optim/lazy_grad.py", "                part = (self._of(source) * scale)", "                part = (self._of(source))", OPTIM),
    Mistake("prefixattn/optim/lazy_grad.py", "            found_inf.masked_fill_(~source.finite(), 1.0)\n", "            pass\n", OPTIM),
    Mistake("prefixattn/optim/network_grad.py", "        self.wide().add_(dkv)\n", "        self.wide().copy_(dkv)\n", OPTIM),
    Mistake("prefixattn/optim/base.py", "        for source in wanting:\n                source.make_dh()\n            wanting = []", "        wanting = []", OPTIM),
    Mistake("prefixattn/optim/adamw.py", "                step += 1\n", "                pass\n", OPTIM),
    Mistake("prefixattn/reparam/fused_step.py", "    m.lerp_(grad, 1 - beta1)\n", "    m.lerp_(grad, beta1)\n", OPTIM + " tests/optim/test_bank.py"),
    # files
    Mistake("prefixattn/prefixes/checkpoint.py", "        saver.place(weights)\n        saver.place(JSON)\n", "        saver.place(JSON)\n        saver.place(weights)\n", FILES),
    Mistake("prefixattn/prefixes/checkpoint.py", ".requires_grad_(not values[\"folded\"])", ".requires_grad_(True)", FILES),
    Mistake("prefixattn/prefixes/peft.py", "permute(1, 2, 3, 0, 4)[_pairs(geometry)]", "permute(1, 2, 3, 0, 4)[_pairs(geometry)].flip(1)", "tests/prefixes/test_peft.py"),
)  # fmt: skip
