"""`FactoredAdamW`."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from prefixattn.optim.base import Factored, FusedStep, Hyper
from prefixattn.optim.dispatch import choose, fusible
from prefixattn.optim.network_grad import W2, stacked
from prefixattn.reparam.call import Form
from prefixattn.reparam.fused_step import Moment, adamw_tile, tiles
from prefixattn.reparam.moments8 import BLOCK, Moment8


class FactoredAdamW(Factored):
    """torch.optim.AdamW that never makes the gradient of a prefix network's large matrix.

    The gradient of w2 [G, O, M] is dy.mT @ h, of rank P at most. One fused step reads the matrix and its moments, makes
    a tile of the gradient at a time from the factors, applies the rule of torch.optim.AdamW, and takes dy @ w2, of
    which the small gradients are made, from the old matrix in the same visit. Equal to AdamW up to float32's rounding.

        optimizer = FactoredAdamW(prefix, lr=5e-5)      # the prefix itself, not prefix.parameters()

    The optimizer *owns* the networks in the modules given: as long as the optimizer lives, they run once for a state of
    their parameters, however many micro-batches there are, and `.grad` of their parameters are `FactoredGradient` and
    `DeferredGradient`, tensors that torch.nn.utils.clip_grad_norm_, torch.amp.GradScaler and zero_grad take as
    they take others; torch.autograd.grad finds no way from a loss to them. A parameter of a network may not change
    between a backward pass and the step, which raises; what is written through `.data` is not seen until the next
    step. Another optimizer that steps them gets ordinary gradients. Parameters given bare, those of other
    modules and of a prefix that is neither float32 nor float64 take torch's ordinary step.

    Over several processes the gradients of prefixes are averaged, whatever the optimizer (`Prefix.process_group`), of
    owned networks as those of their kv; those of other parameters are left to the wrapper that reduces them
    (DistributedDataParallel, fully_shard).

    Args:
        params: A `Prefix` or another module, an iterable of modules and parameters, or groups whose "params" is such.
        lr, betas, eps, weight_decay: As of torch.optim.AdamW, with its defaults; each may differ by group.
        moments: How an owned w2's moments are kept: "float32", "bfloat16", or "8bit", with a scale for each 256
            numbers (prefixattn/reparam/moments8.py); or a pair, for exp_avg and exp_avg_sq. May differ by group. An
            exp_avg_sq in bfloat16 does not decay where beta2 is 0.999: a step changes it by less than half its last
            bit. Take ("bfloat16", "float32") there; "8bit" rounds by a coin and has no such trouble.
        max_norm: Clips the gradient of all parameters together to this Euclidean norm, which is left in `grad_norm`.
            It costs another read of w2.
        process_group: What the prefixes' `process_group` becomes: the processes that train together, or False: this one
            alone. None leaves it as it is: all, if torch.distributed is initialized.
        backend: Of the fused step: "auto", or the name of one, which then runs or says why it cannot.
    """

    kept: ClassVar = {"step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "max_exp_avg_sq"}
    refused: ClassVar = {
        "amsgrad": "the fused step keeps two moments and no maximum; use torch.optim.AdamW",
        "maximize": "negate the loss instead",
        "capturable": "the step reads its counter on the host; leave it out",
        "differentiable": "the fused step has no gradient; use torch.optim.AdamW",
        "foreach": "parameters without factors take torch's default; leave it out",
        "fused": "the matrix's step is fused, and other parameters take torch's where it has one; leave it out",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: str | tuple[str, str] = "float32",
        max_norm: float | None = None,
        process_group: Any = None,
        backend: str = "auto",
        amsgrad: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            **{"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": moments},
            **{"amsgrad": amsgrad, "maximize": maximize, "capturable": capturable},
            **{"differentiable": differentiable, "foreach": foreach, "fused": fused},
        }
        super().__init__(params, defaults, max_norm, process_group, backend)

    def _check(self, group: Hyper) -> None:
        super()._check(group)
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name} is {group[name]!r}, expected 0 or more")
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= float(b) < 1 for b in betas):
            raise ValueError(f"betas is {betas!r}, expected two numbers from 0 to below 1")
        _formats(group)

    def _check_state(self, name: str, p: Tensor, state: dict[str, Any]) -> None:
        if not state:
            return
        if "max_exp_avg_sq" in state:
            raise NotImplementedError(f"the state of {name} is of amsgrad: {self.refused['amsgrad']}")
        if missing := {"step", "exp_avg", "exp_avg_sq"} - set(state):
            raise ValueError(f"the state of {name} lacks {', '.join(sorted(missing))}")
        for key in ("exp_avg", "exp_avg_sq"):
            check_moment(name, key, p, state)

    def _start(self, p: Tensor, formats: tuple[str, str]) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        for key, name in zip(("exp_avg", "exp_avg_sq"), formats, strict=True):
            as_format(name, key, p, state)
        return state

    def _prepared(self, p: Tensor, group: Hyper, h: Tensor, dy: Tensor, form: Form | None) -> FusedStep:
        state = self._start(p, _formats(group))
        w, m, v = stacked(p.detach(), W2), moment("exp_avg", state), moment("exp_avg_sq", state)
        module = choose(self.backend, w, m, v, h, dy, form)

        def fused_step(h: Tensor, dy: Tensor, form: Form | None, scale: float, want_dh: bool) -> Tensor | None:
            state["step"] += 1
            numbers = {**_numbers(group), "step": int(state["step"]), "grad_scale": scale}
            dh: Tensor | None = module.fused_adamw(w, m, v, h, dy, form=form, **numbers, want_dh=want_dh)
            return dh

        return fused_step

    def _ordinary(self, group: Hyper, params: list[Tensor], grads: list[Tensor]) -> None:
        rest = []
        for p, grad in zip(params, grads, strict=True):
            state = self.state[p]
            other = [k for k in _MOMENTS if state and state[k].dtype != p.dtype]
            if other and (p.dim() in (2, 3) or any(isinstance(moment(k, state), Moment8) for k in other)):
                self._by_tiles(group, p, grad)  # a matrix that took fused steps before
            else:
                self._start(p, _NATIVE)
                rest.append((p, grad))
        for fused in (True, False):
            found = [(p, grad, self.state[p]) for p, grad in rest]
            found = [(p, grad, s) for p, grad, s in found if fusible(p, grad, *(s[k] for k in _MOMENTS)) == fused]
            if not found:
                continue
            steps = [state["step"] for _, _, state in found]
            # a fused kernel counts where the parameter is
            there = [p.device if fused else s.device for s, (p, _, _) in zip(steps, found, strict=True)]
            adamw(
                params=[p for p, _, _ in found],
                grads=[grad for _, grad, _ in found],
                exp_avgs=[state["exp_avg"] for _, _, state in found],
                exp_avg_sqs=[state["exp_avg_sq"] for _, _, state in found],
                max_exp_avg_sqs=[],
                state_steps=[torch.full_like(s, float(s), device=d) for s, d in zip(steps, there, strict=True)],
                fused=fused,
                foreach=False if fused else None,
                amsgrad=False,
                maximize=False,
                **_numbers(group),  # type: ignore[arg-type]
            )
            for step in steps:
                step += 1

    def _by_tiles(self, group: Hyper, p: Tensor, grad: Tensor) -> None:
        state = self.state[p]
        state["step"] += 1
        w, m, v = stacked(p.detach(), W2), moment("exp_avg", state), moment("exp_avg_sq", state)
        numbers = _numbers(group)
        for g, rows in tiles(w):
            tile = stacked(grad, W2)[g, rows].clone()
            adamw_tile(w, m, v, g, rows, tile, **numbers, step=int(state["step"]))


# of moments in an optimizer's state: `key` alone, or with 8 bits `key` as codes and `key + "_scale"`
FORMATS = ("float32", "bfloat16", "8bit")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NATIVE = ("", "")


def _numbers(group: Hyper) -> dict[str, float]:
    beta1, beta2 = (float(b) for b in group["betas"])
    options = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    return {**options, "beta1": beta1, "beta2": beta2}


def _formats(group: Hyper) -> tuple[str, str]:
    found = group["moments"]
    first, second = (found, found) if isinstance(found, str) else found
    for name in (first, second):
        if name not in FORMATS:
            raise ValueError(f"moments is {found!r}, expected {', '.join(map(repr, FORMATS))} or a pair of these")
    return first, second


def moment(key: str, state: dict[str, Any]) -> Moment:
    """The moment as the fused steps take it, [G, O, M]; the tensors themselves, not copies."""
    value = stacked(state[key], W2) if state[key].dim() >= 2 else state[key]
    if value.dtype != torch.uint8:
        return value
    return Moment8(value, stacked(state[key + "_scale"], W2), key == "exp_avg")


def as_format(name: str, key: str, p: Tensor, state: dict[str, Any]) -> None:
    """Brings a moment into a format; "" and "float32" are the parameter's own type."""
    value = state[key]
    if name == "8bit":
        if value.dtype == torch.uint8:
            return
        shape = *p.shape[:-1], -(-p.shape[-1] // BLOCK)
        state[key] = torch.empty(p.shape, dtype=torch.uint8, device=p.device)
        state[key + "_scale"] = torch.empty(shape, dtype=torch.float32, device=p.device)
        made, old = moment(key, state), stacked(value, W2)
        assert isinstance(made, Moment8)
        for g, rows in tiles(old):
            made.encode(g, rows, old[g, rows], int(state["step"]))
        return
    dtype = torch.bfloat16 if name == "bfloat16" else p.dtype
    if value.dtype == torch.uint8:
        old8 = moment(key, state)
        assert isinstance(old8, Moment8)
        state[key] = torch.empty(p.shape, dtype=dtype, device=p.device)
        made = stacked(state[key], W2)
        for g, rows in tiles(made):
            made[g, rows] = old8.decode(g, rows).to(dtype)
        del state[key + "_scale"]
    elif value.dtype != dtype:
        state[key] = value.to(dtype)


def check_moment(name: str, key: str, p: Tensor, state: dict[str, Any]) -> None:
    """ValueError if a saved moment is no moment of this parameter."""
    value = state[key]
    if not isinstance(value, Tensor) or value.shape != p.shape:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{key} of {name} has shape {found}, expected {list(p.shape)}")
    if value.dtype == torch.uint8:
        scale, expected = state.get(key + "_scale"), [*p.shape[:-1], -(-p.shape[-1] // BLOCK)]
        if not isinstance(scale, Tensor) or list(scale.shape) != expected:
            found = list(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
            raise ValueError(f"{key}_scale of {name} has shape {found}, expected {expected}")
        if scale.dtype != torch.float32:
            raise ValueError(f"{key}_scale of {name} is {scale.dtype}, expected torch.float32")
    elif not value.is_floating_point():
        raise ValueError(f"{key} of {name} is {value.dtype}, expected a floating-point type, or uint8 with a scale")
