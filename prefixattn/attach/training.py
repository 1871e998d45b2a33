"""What happens around an optimizer's step: no prefix is left out in silence, or trained by each process alone.

torch tells of every optimizer's step, and of no optimizer before it. So whoever trains an attached model is looked at
when the first step is about to be made.
"""

import gc
import sys
import weakref
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from prefixattn.optim.processes import Average

CLOSE = 1e-5  # of two norms of one gradient, on processors that may differ


class Watched:
    """What is known of one prefix that may be trained."""

    def __init__(self) -> None:
        self.average = Average()
        self.looked_at: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.compared = False  # what is trained beside it, with the other processes'


_watched: weakref.WeakKeyDictionary[nn.Module, Watched] = weakref.WeakKeyDictionary()
_steps = 0  # of all optimizers since the first prefix was made


def steps() -> int:
    """Of all optimizers so far: torch's fused ones leave no trace in a tensor's version."""
    _watch_steps()
    return _steps


def watched(prefix: nn.Module) -> Watched:
    """What is known of `prefix`, which is watched from now on; its parameters may be others than before."""
    _watch_steps()
    found = _watched.get(prefix)
    new = found is None
    if found is None:
        found = _watched[prefix] = Watched()
    if new or (dist.is_available() and dist.is_initialized()):
        found.average.watch(prefix.parameters())
    return found


@cache
def _watch_steps() -> None:
    """Once, and not before there is a prefix: the hooks are of all optimizers of the process."""
    register_optimizer_step_pre_hook(_before_any_step)
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(*_: Any) -> None:
    global _steps
    _steps += 1


def _before_any_step(optimizer: Optimizer, *_: Any) -> None:
    several = dist.is_available() and dist.is_initialized()
    for prefix in [p for ref in _watched.keyrefs() if (p := ref()) is not None]:
        known = _watched[prefix]
        if optimizer not in known.looked_at and _waits(prefix):
            _refuse_trainers(prefix)
            _refuse_what_leaves_out(prefix, optimizer)
            known.looked_at.add(optimizer)
        if several and known.average.processes() > 1 and _holds(optimizer, prefix):
            known.average()
            if not known.compared:
                known.average.agree()  # that all are here
                _compare_others(prefix, optimizer, known.average)
                known.compared = True
            known.average.stepped()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in getattr(optimizer, "param_groups", []) for p in group["params"]]


def _holds(optimizer: Optimizer, prefix: nn.Module) -> bool:
    own = {id(p) for p in prefix.parameters()}
    return any(id(p) in own for p in _parameters(optimizer))


def _waits(prefix: Any) -> bool:
    """True if the model attends to it and a backward pass has reached it."""
    adapter = prefix._adapter
    running = adapter is not None and adapter.prefix is prefix and adapter.active
    return running and any(p.requires_grad and p.grad is not None for p in prefix.parameters())


def _refuse_trainers(prefix: Any) -> None:
    """transformers' Trainer trains, clips, zeroes and saves what the model has; the prefix is none of it."""
    trainer = _running_trainer()
    if trainer is None or getattr(trainer, "trains_prefixes", False):
        return
    base, name = prefix._adapter.base, type(trainer).__name__
    model = getattr(trainer, "model", None)
    if not isinstance(model, nn.Module) or not any(part is base for part in model.modules()):
        return
    own = "" if name == "Trainer" else f", here `class Mine(prefixattn.PrefixTrainer, {name}): pass`"
    raise RuntimeError(
        f"{name} would train {type(model).__name__} without its prefix, whose gradients it neither clips nor zeroes "
        "and which is in no checkpoint of it; use prefixattn.PrefixTrainer, or a class made of it and another trainer"
        f"{own}; if the prefix shall not be trained, call prefix.requires_grad_(False)"
    )


def _running_trainer() -> Any:
    """The Trainer that called, if one did: none is known here, and none says that it begins."""
    frame = sys._getframe(1) if "transformers.trainer" in sys.modules else None
    while frame is not None:
        # looking into a frame keeps alive what it holds, and this one holds no tensor
        if frame.f_code.co_name == "train" and frame.f_globals.get("__name__") == "transformers.trainer":
            return frame.f_locals.get("self")
        frame = frame.f_back
    return None


def _refuse_what_leaves_out(prefix: Any, optimizer: Optimizer) -> None:
    """An optimizer of nothing, or of the model, is a mistake if no other holds the prefix."""
    found, model = {id(p) for p in _parameters(optimizer)}, prefix._adapter.model
    if _holds(optimizer, prefix) or (found and not any(id(p) in found for p in model.parameters())):
        return
    # nowhere is a list of all optimizers
    if any(_holds(o, prefix) for o in gc.get_objects() if issubclass(type(o), Optimizer)):
        return
    raise RuntimeError(
        f"{type(optimizer).__name__} would step without the prefix on {type(model).__name__}, which got a gradient and "
        "is in no optimizer: the model is frozen, and its parameters() have none of the prefix; give the optimizer "
        "prefix.parameters(), or FactoredAdamW the prefix; if it shall not be trained, call "
        "prefix.requires_grad_(False)"
    )


def _compare_others(prefix: Any, optimizer: Optimizer, average: Average) -> None:
    """RuntimeError if what is trained beside the prefix is averaged by nobody, at the first step."""
    own = {id(p) for p in prefix.parameters()}
    others = {f"parameter {i}": p for i, p in enumerate(_parameters(optimizer))}
    others |= {} if prefix._adapter is None else dict(prefix._adapter.model.named_parameters())
    named = {id(p): name for name, p in others.items()}  # the model's names come last
    mine = {
        named[id(p)]: float(torch.linalg.vector_norm(p.grad))
        for p in others.values()
        if id(p) not in own and p.grad is not None and _is_whole(p)
    }
    found: Any = [None] * average.processes()
    dist.all_gather_object(found, mine, group=average.group)
    for name in sorted(set().union(*found)):
        norms = [norms.get(name) for norms in found]
        if None in norms or max(norms) - min(norms) > CLOSE * max(norms):
            raise RuntimeError(
                f"the processes have different gradients of {name}, of norm {norms}, process by process, which nobody "
                "averages: only the prefix's are; wrap the model in torch.nn.parallel.DistributedDataParallel"
            )


def _is_whole(p: Any) -> bool:
    """False if the process has a part of it, as under FSDP."""
    return not any(hasattr(p, name) for name in ("full_tensor", "_fsdp_flattened", "_is_flat_param"))
