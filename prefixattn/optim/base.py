"""`Factored`: what FactoredAdamW and FactoredSGD share, a torch optimizer around fused steps."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from prefixattn import backends
from prefixattn.optim.lazy_grad import FactoredGradient, LazyGradient, accumulate, accumulate_projected
from prefixattn.optim.network_grad import B2, W2, is_finite, local, stacked
from prefixattn.optim.processes import Average
from prefixattn.prefixes.ownership import Factorable, Hidden, MakesPrefix
from prefixattn.reparam.call import Form

Hyper = dict[str, Any]  # a parameter group
# h, dy (rows, or with a form the gradient of kv), the form, scale, dh wanted -> dh
FusedStep = Callable[[Tensor, Tensor, Form | None, float, bool], Tensor | None]


class Factored(torch.optim.Optimizer):
    """A step is a fused one for each owned network's large matrix; all other parameters take torch's ordinary step."""

    kept: ClassVar[set[str]] = set()  # keys of a parameter's state
    refused: ClassVar[dict[str, str]] = {}  # option of torch's optimizer -> why not

    def __init__(self, params: Any, defaults: Hyper, max_norm: float | None, process_group: Any, backend: str) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm!r}, expected a positive number or None")
        backends.check_name(backends.REPARAM, backend)
        self.max_norm, self.backend = max_norm, backend
        self.grad_norm: Tensor | None = None  # before clipping, of the last step with max_norm
        self.average = Average(process_group)  # of networks that are no part of a prefix on a model
        self.prefixes: weakref.WeakSet[Any] = weakref.WeakSet()  # those on models, which average by themselves
        if isinstance(params, Tensor):
            raise TypeError("params is a tensor, expected a module, or an iterable of modules, parameters or groups")
        params = [params] if isinstance(params, nn.Module) else list(params)
        if not params:
            raise ValueError("params is empty, expected modules, parameters or groups of them")
        self.given = 0  # modules
        self.networks: weakref.WeakSet[Any] = weakref.WeakSet()  # owned, simple shares too
        super().__init__(params if isinstance(params[0], dict) else [{"params": params}], defaults)
        if not self.given:
            warnings.warn(
                f"{type(self).__name__} got parameters and no module: it knows no network and makes whole gradients; "
                "give the prefix itself, not prefix.parameters()",
                stacklevel=3,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose "params" may hold modules too, whose networks it owns from then on."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group is {param_group!r:.80}, expected a dict with 'params'")
        group = {**self.defaults, "skipped_steps": 0, **param_group}
        self._check(group)
        modules, group["params"] = _expand(param_group["params"], f"group {len(self.param_groups)}")
        if not any(p.requires_grad for _, p in group["params"]):
            raise ValueError(
                "params holds no parameter that requires a gradient (a model with a prefix is frozen, and a folded "
                "prefix has nothing to train); expected the prefix itself"
            )
        super().add_param_group(group)
        self.given += len(modules)
        for module in modules:
            self.take_over(module)

    def take_over(self, module: nn.Module) -> None:
        """Becomes the owner of the prefixes in `module` whose large matrix (deep share) or vectors (simple) it has.

        The constructor and `add_param_group` do it. Needed by hand for what copies leave out: a copied or unpickled
        optimizer owns no network, and one whose network another optimizer owns since.
        """
        own = {id(p) for group in self.param_groups for p in group["params"]}
        # weights of which a process has a part are whole within the model's own passes alone
        prefixes: list[Any] = [part for part in module.modules() if hasattr(part, "sources")]
        whole = not any(hasattr(t, "full_tensor") for prefix in prefixes for t in prefix.sources())
        for prefix in prefixes:
            if self.average.group is not None:
                prefix.process_group = self.average.group
            self.prefixes.add(prefix)
        elsewhere = {id(part) for prefix in prefixes for part in prefix.modules()}
        for part in module.modules():
            if isinstance(part, MakesPrefix) and id(part) not in elsewhere:
                self.average.add([p for p in part.parameters() if id(p) in own])
            if isinstance(part, Factorable) and id(part.factored_parameter()) in own:
                if whole or not part.reads_the_model:
                    part.take_over(self._receive)
                    self.networks.add(part)
                    _owned.add(part)
                    watch_steps()

    def _receive(self, module: Any, dkv: Tensor, made: Any) -> None:
        """What a backward pass left in kv: dkv [N, 2, Hkv, P, D], any type; `made` is what made it."""
        parameters, before_reading = module.parameters_in_order(), self._before_reading()
        if isinstance(made, Hidden):
            accumulate(parameters, made, dkv, before_reading, self.backend)
        else:
            accumulate_projected(parameters[0], made, dkv, before_reading)

    def _before_reading(self) -> Callable[[], None]:
        me = weakref.ref(self)

        def before_reading() -> None:
            optimizer = me()
            if optimizer is not None:
                optimizer.reduce_gradients()

        return before_reading

    def reduce_gradients(self) -> None:
        """Averages over processes what no wrapper averages: the gradients of prefixes. All processes must call it.

        Nobody needs to: ordinary gradients are averaged when a backward pass ends, and those of a network by whatever
        reads their numbers first, a norm, GradScaler's unscale_ or `step`.
        """
        for average in [prefix.average for prefix in self.prefixes] + [self.average]:
            average()

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a gradient was not finite; saved with the state."""
        return max(group["skipped_steps"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with a gradient that is not finite it changes no parameter and no moment, and warns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False):
            self.reduce_gradients()
            self.average.stepped()
            if self._finite():
                if self.max_norm is not None:
                    self.grad_norm = self.clip_grad_norm_(self.max_norm)
                self._update()
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """torch.nn.utils.clip_grad_norm_ over all parameters of this optimizer, sharded ones among them."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = [local(torch.linalg.vector_norm(g)) for g in grads]
        if not norms:
            return torch.tensor(0.0)
        total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(factor.to(g.device))
        return total

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave. Values keep their own types: moments of 8 bits stay so.

        Raises ValueError, before anything changes, where a shape, a group or an option does not fit.
        """
        # torch.optim.AdamW's state fits, however its steps were computed
        how = ("foreach", "fused")
        found = state_dict["param_groups"]
        groups: list[Hyper] = [{k: None if k in how else v for k, v in group.items()} for group in found]
        sizes, here = ([len(g["params"]) for g in found] for found in (groups, self.param_groups))
        if sizes != here:
            raise ValueError(f"state_dict has groups of {sizes} parameters, expected {here}")
        for group in groups:
            self._check({**self.defaults, **group})
        pairs = [
            (name, p, state_dict["state"].get(key, {}))
            for saved, group in zip(groups, self.param_groups, strict=True)
            for key, p, name in zip(saved["params"], group["params"], group["param_names"], strict=True)
        ]
        for name, p, state in pairs:
            if foreign := set(state) - self.kept:
                expected = ", ".join(sorted(self.kept))
                raise ValueError(f"the state of {name} has {', '.join(sorted(foreign))}, expected only {expected}")
            self._check_state(name, p, state)
        # torch would give every value the type of its parameter
        super().load_state_dict({**state_dict, "param_groups": groups, "state": {}})
        for _, p, state in pairs:
            if state:
                self.state[p] = {key: _moved(key, value, p) for key, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (
            ("max_norm", None),
            ("backend", "auto"),
            ("grad_norm", None),
            ("average", None),
            ("given", 0),
            ("networks", weakref.WeakSet()),
            ("prefixes", weakref.WeakSet()),
        ):
            self.__dict__.setdefault(name, value)
        self.average = self.average or Average(None)
        for group in self.param_groups:
            group.setdefault("skipped_steps", 0)
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to no process group, as a copy of a network belongs to no optimizer
        return {**super().__getstate__(), "max_norm": self.max_norm, "backend": self.backend}

    # what a subclass says

    def _check(self, group: Hyper) -> None:
        for name, why in self.refused.items():
            if group.get(name):
                raise NotImplementedError(f"{name}={group[name]!r}: {why}")

    def _check_state(self, name: str, p: Tensor, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _prepared(self, p: Tensor, group: Hyper, h: Tensor, dy: Tensor, form: Form | None) -> FusedStep:
        """The fused step of p that takes factors as these; NotImplementedError if no backend has one."""
        raise NotImplementedError

    def _ordinary(self, group: Hyper, params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    # the step

    def _update(self) -> None:
        held = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        factored = [(group, p) for group, p in held if _factored(p.grad)]
        # whatever can be refused is, before the first change
        fused_steps = [self._prepared(p, group, *_sample(p)) for group, p in factored]
        coming = {id(source) for _, p in factored for source, _ in p.grad.value.parts}  # whose dh the fused step makes
        for _, p in held:
            if isinstance(p.grad, LazyGradient) and p.grad.which not in (W2, B2):
                for source, _ in p.grad.value.parts:
                    source.check(id(source) in coming)
        self._forget({id(p) for _, p in held})
        for (_, p), fused_step in zip(factored, fused_steps, strict=True):
            self._step_one(p, p.grad, fused_step)
        stepped = {id(p) for _, p in factored}
        # all small gradients before the first change of a small parameter, of which they are made
        made = {id(p): _numbers(p.grad) for _, p in held if id(p) not in stepped}
        for group in self.param_groups:
            params = [p for p in group["params"] if id(p) in made]
            if params:
                self._ordinary(group, params, [made[id(p)] for p in params])
        for _, p in held:
            torch.autograd.graph.increment_version(p)  # torch's fused kernels leave no trace of their own

    def _forget(self, changing: set[int]) -> None:
        """Frees leaves that a change of these parameters makes invalid."""
        for network in self.networks:
            if any(id(p) in changing for p in network.parameters_in_order()):
                network.forget()

    def _step_one(self, p: Tensor, grad: Any, fused_step: FusedStep) -> None:
        sources = [source for source, _ in grad.value.parts]
        scale: Any = 1.0
        if len(sources) == 1:
            scale = float(grad.value.parts[0][1])
            factors = _sample(p)
        else:
            factors = grad.factors() if sources else _sample(p)
        wanting = [source for source in sources if not source.knows_dh and _awaited(source)]
        if len(sources) > 1 or scale == 0:  # the fused step would add their dh up, or lose it
            for source in wanting:
                source.make_dh()
            wanting = []
        dh = fused_step(*factors, scale, bool(wanting))
        torch.autograd.graph.increment_version(p)  # a kernel writes where torch does not see it
        if dh is not None and wanting:
            wanting[0].dh = dh if scale == 1 else dh / scale

    def _finite(self) -> bool:
        """False, and said in words, if a gradient is not finite. One wait for a GPU."""
        flags: dict[Any, tuple[str, Tensor]] = {}
        for group in self.param_groups:
            named = list(zip(group["param_names"], group["params"], strict=True))
            for name, p in sorted(named, key=lambda pair: not isinstance(pair[1].grad, FactoredGradient)):
                grad = p.grad
                if grad is not None and grad.layout != torch.strided:
                    raise NotImplementedError(f"{name} has a sparse gradient; fused steps and moments are dense")
                if isinstance(grad, LazyGradient):
                    for source, _ in grad.value.parts:
                        flags.setdefault(id(source), (name, source.finite()))
                    grad = grad.value.dense
                if grad is not None and grad.numel():
                    flags[id(p)] = name, is_finite(grad)
        if (
            not flags
            or torch.stack([flag.to(next(iter(flags.values()))[1].device) for _, flag in flags.values()]).all()
        ):
            return True
        for group in self.param_groups:
            group["skipped_steps"] += 1
        bad = [name for name, flag in flags.values() if not flag]
        warnings.warn(
            f"the gradient of {', '.join(bad)} is not finite: this step changes no parameter and no moment "
            f"({self.skipped_steps} skipped so far)",
            RuntimeWarning,
            stacklevel=4,
        )
        return False


_owned: weakref.WeakSet[Any] = weakref.WeakSet()  # networks, by any optimizer


def _before_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Another optimizer may write to a parameter before it reads the gradient, which is made of the old numbers."""
    if not isinstance(optimizer, Factored):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if isinstance(p.grad, LazyGradient):
                    p.grad = p.grad.to_dense()


def _after_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """torch's fused optimizers change parameters without a trace in their versions."""
    if not isinstance(optimizer, Factored) and len(_owned):
        changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for network in list(_owned):
            if any(id(p) in changed for p in network.parameters_in_order()):
                network.forget()


@cache
def watch_steps() -> None:
    """Once, and not before there is an owned network: the hooks are of all optimizers."""
    register_optimizer_step_pre_hook(_before_any_step)
    register_optimizer_step_post_hook(_after_any_step)


def _factored(grad: Tensor | None) -> bool:
    return isinstance(grad, FactoredGradient) and grad.value.dense is None


def _sample(p: Tensor) -> tuple[Tensor, Tensor, Form | None]:
    """The first of the factors of p's gradient, without their scale."""
    parts = p.grad.value.parts  # type: ignore[union-attr]
    if parts:
        source = parts[0][0]
        return source.h, source.dkv, source.form
    w = stacked(p, W2)  # after zero_grad(set_to_none=False) moments decay
    return w.new_zeros(w.shape[0], 1, w.shape[2]), w.new_zeros(w.shape[0], 1, w.shape[1]), None


def _numbers(grad: Tensor) -> Tensor:
    return grad.to_read() if isinstance(grad, LazyGradient) else grad


def _awaited(source: Any) -> bool:
    """Somebody's gradient will be made of this source's dh."""
    refs = source.parameters[:W2]
    grads = [p.grad for p in (ref() for ref in refs if ref is not None) if p is not None]
    return any(isinstance(g, LazyGradient) and any(s is source for s, _ in g.value.parts) for g in grads)


def _moved(key: str, value: Any, p: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if key == "step" else value.to(p.device, copy=True)


def _expand(params: Any, where: str) -> tuple[list[nn.Module], list[tuple[str, Tensor]]]:
    """The modules among `params`, and all parameters with names, each once."""
    if isinstance(params, set):
        raise TypeError("params is a set, whose order changes between runs; expected a list")
    items: Iterable[Any] = [params] if isinstance(params, (nn.Module, Tensor)) else params
    modules: list[nn.Module] = []
    named: list[tuple[str, Tensor]] = []
    for i, item in enumerate(items):
        if isinstance(item, nn.Module):
            modules.append(item)
            named += item.named_parameters()
        elif isinstance(item, tuple) and len(item) == 2:
            named.append(item)
        elif isinstance(item, Tensor):
            named.append((f"parameter {i} of {where}", item))
        else:
            raise TypeError(f"params holds a {type(item).__name__}, expected modules and parameters")
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, p in named:
        unique.setdefault(id(p), (name, p))
    return modules, list(unique.values())
