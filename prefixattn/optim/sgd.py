"""`FactoredSGD`."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from prefixattn.optim.base import Factored, FusedStep, Hyper
from prefixattn.optim.dispatch import choose, fusible
from prefixattn.optim.network_grad import W2, stacked
from prefixattn.reparam.call import Form


class FactoredSGD(Factored):
    """torch.optim.SGD that never makes the gradient of a prefix network's large matrix.

    What is said of `FactoredAdamW` holds here: give it the prefix itself, and it owns its networks.

    Args:
        params, max_norm, process_group, backend: As of `FactoredAdamW`.
        lr, momentum, dampening, weight_decay, nesterov: As of torch.optim.SGD, with its defaults; may differ by group.
    """

    kept: ClassVar = {"momentum_buffer"}
    refused: ClassVar = {
        "maximize": "negate the loss instead",
        "differentiable": "the fused step has no gradient; use torch.optim.SGD",
        "foreach": "parameters without factors take torch's default; leave it out",
        "fused": "the matrix's step is fused, and other parameters take torch's where it has one; leave it out",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_norm: float | None = None,
        process_group: Any = None,
        backend: str = "auto",
        maximize: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            **{"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay},
            **{"nesterov": nesterov, "maximize": maximize, "differentiable": differentiable},
            **{"foreach": foreach, "fused": fused},
        }
        super().__init__(params, defaults, max_norm, process_group, backend)

    def _check(self, group: Hyper) -> None:
        super()._check(group)
        for name in ("lr", "momentum", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name} is {group[name]!r}, expected 0 or more")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov needs a momentum above 0 and no dampening; momentum is {group['momentum']!r}, dampening "
                f"{group['dampening']!r}"
            )

    def _check_state(self, name: str, p: Tensor, state: dict[str, Any]) -> None:
        buffer = state.get("momentum_buffer")
        if buffer is None:
            return
        if not isinstance(buffer, Tensor) or buffer.shape != p.shape:
            found = list(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
            raise ValueError(f"momentum_buffer of {name} has shape {found}, expected {list(p.shape)}")

    def _prepared(self, p: Tensor, group: Hyper, h: Tensor, dy: Tensor, form: Form | None) -> FusedStep:
        numbers = _numbers(group)
        w, kept, first = stacked(p.detach(), W2), None, False
        if numbers["momentum"] != 0:
            kept = self.state[p].get("momentum_buffer")
            first = kept is None
            if kept is None:
                kept = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffer = None if kept is None else stacked(kept, W2)
        module = choose(self.backend, w, buffer, None, h, dy, form)

        def fused_step(h: Tensor, dy: Tensor, form: Form | None, scale: float, want_dh: bool) -> Tensor | None:
            if first:
                self.state[p]["momentum_buffer"] = kept
            options = {**numbers, "first": first, "grad_scale": scale, "want_dh": want_dh}
            dh: Tensor | None = module.fused_sgd(w, buffer, h, dy, form=form, **options)
            return dh

        return fused_step

    def _ordinary(self, group: Hyper, params: list[Tensor], grads: list[Tensor]) -> None:
        sets: dict[tuple[bool, bool], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        for p, grad in zip(params, grads, strict=True):
            buffer = self.state[p].get("momentum_buffer")
            fused = fusible(p, grad, *(() if buffer is None else (buffer,)))
            sets.setdefault((fused, buffer is None), []).append((p, grad, buffer))
        for (fused, _), found in sets.items():
            some, their_grads, buffers = (list(column) for column in zip(*found, strict=True))
            how: dict[str, Any] = {"fused": fused, "foreach": False if fused else None}
            sgd(some, their_grads, buffers, maximize=False, **how, **_numbers(group))
            if group["momentum"] != 0:
                for p, buffer in zip(some, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer


def _numbers(group: Hyper) -> dict[str, Any]:
    options: dict[str, Any] = {n: float(group[n]) for n in ("lr", "momentum", "dampening", "weight_decay")}
    return {**options, "nesterov": bool(group["nesterov"])}
