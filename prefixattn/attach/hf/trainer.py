"""`PrefixTrainer`: transformers' Trainer for the prefix on a frozen model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from prefixattn.attach.bank import PrefixBank
from prefixattn.attach.base import Attached
from prefixattn.attach.find import attached
from prefixattn.attach.hf.labelled import is_shifted, labelled_loss
from prefixattn.optim import FactoredAdamW, FactoredSGD
from prefixattn.prefixes import files, saving


class _ZeroGrad(TrainerCallback):
    """After a step the Trainer zeroes the gradients of the model, to which the prefix's parameters do not belong."""

    def __init__(self, prefix: Attached) -> None:
        self.prefix = prefix

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.prefix.zero_grad()


@contextmanager
def _beside(model: Any) -> Iterator[None]:
    """Tells the Trainer, who refuses to train quantised weights, that something is trained beside them.

    Raises:
        ValueError: gradients do not pass through the quantised weights.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    # an unpacked model keeps its quantizer (a GGUF in transformers 5.23): its weights are plain and train nothing new
    packed = any(not (p.is_floating_point() and p.element_size() > 1) for p in model.parameters())
    if packed and not quantizer.is_trainable:
        raise ValueError(
            f"model is {type(model).__name__} with weights packed by {type(quantizer).__name__}, through which "
            "transformers passes no gradients; load it unpacked (GgufConfig(dequantize=True) of a GGUF file)"
        )
    told = "_hf_peft_config_loaded" in vars(model)
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if told:
            model._hf_peft_config_loaded = before
        else:
            del model._hf_peft_config_loaded


def _only_loss(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """What the Trainer takes for a model's output."""
    return {"loss": labelled_loss(model, **inputs)}


class PrefixTrainer(Trainer):
    """Trains the active prefix of `model`, and whatever else of the model requires a gradient (a head, say).

    Its checkpoints hold the prefix in place of the model, and the optimizer's state;
    `train(resume_from_checkpoint=...)` goes on from them. The optimizer is FactoredAdamW for each of
    TrainingArguments' plain AdamWs and FactoredSGD for "sgd", with the arguments' rates; any other can be given by
    `optimizers=`. `max_grad_norm` clips what is trained. Where the model is a language model that `labelled_loss` takes
    and nothing else is asked of the loss (smoothing, a function of your own), training steps compute logits at labelled
    positions only; `labelled=False` leaves the loss to the model.

    It goes before another Trainer among the bases of a class: ``class Mine(PrefixTrainer, SFTTrainer)``.
    """

    trains_prefixes = True  # which prefixattn.attach.training asks of a Trainer
    prefix: Attached
    optimizer: Any

    def __init__(self, model: nn.Module | None = None, *args: Any, labelled: bool = True, **kwargs: Any) -> None:
        prefix = None if model is None else attached(model)
        if prefix is None:
            raise ValueError(f"model is {type(model).__name__} without a prefix; call prefixattn.attach before")
        self.prefix = prefix
        with _beside(model):
            super().__init__(model, *args, **kwargs)
        self.labelled = (
            labelled
            and is_shifted(self.model) is not None
            and not getattr(self.model.config, "output_router_logits", False)
            and self.label_smoother is None
            and self.compute_loss_func is None
            and super().compute_loss.__func__ is Trainer.compute_loss  # another's reads more than the loss
        )
        self.add_callback(_ZeroGrad(prefix))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            # on CPUs it is not asked whether there is something to reduce, without which that cannot be wrapped
            if self.accelerator.distributed_type == "MULTI_CPU" and not any(
                p.requires_grad for p in model.parameters()
            ):
                kwargs["evaluation_mode"] = True
            return prepare(model, *args, **kwargs)

        self.accelerator.prepare_model = prepare_model

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if isinstance(self.prefix, PrefixBank) and "prefix_ids" not in self._signature_columns:
            self._signature_columns.append("prefix_ids")  # the model's forward does not name it

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.labelled and not return_outputs and "labels" in inputs:
            model = partial(_only_loss, model)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args, name = self.args, str(getattr(self.args.optim, "value", self.args.optim))
            groups: list[dict[str, Any]] = [{"params": self.prefix}]
            if others := [p for p in self.model.parameters() if p.requires_grad]:
                groups.append({"params": others})
            common = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            if name in ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla"):
                betas = (args.adam_beta1, args.adam_beta2)
                made: Any = FactoredAdamW(groups, **common, betas=betas, eps=args.adam_epsilon)
            elif name == "sgd":
                made = FactoredSGD(groups, **common)
            else:
                raise NotImplementedError(
                    f"optim is {name!r}; PrefixTrainer makes 'adamw_torch', 'adamw_torch_fused' or 'sgd', and takes "
                    "any optimizer of the prefix by optimizers=(optimizer, None)"
                )
            self.optimizer = made
        return self.optimizer

    def _trained(self) -> list[nn.Parameter]:
        return [*self.prefix.parameters(), *self._others().values()]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(self._trained(), self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float:
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(self._trained(), float("inf"))
        return float(grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.prefix.save_pretrained(folder)
        others = {name: p.detach().cpu().contiguous() for name, p in self._others().items()}
        with saving.saver(folder) as saver:
            if others:
                saver.write(OTHERS, [serialized(others)])
                saver.place(OTHERS)
            else:
                saver.remove(OTHERS)  # of another run
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        others, path = self._others(), folder / OTHERS
        found = {}
        if others or path.is_file():
            with files.described(path):
                found = saving.whole(folder, (OTHERS,), lambda: _read(path, others))
        self.prefix.restore(folder)
        with torch.no_grad():
            for name, t in found.items():
                others[name].copy_(t)

    def _others(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


OTHERS = "trained_parameters.safetensors"  # of the model, beside the prefix


def _read(path: Path, own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The tensors of a file that holds the parameters `own`; else ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the model trains {files.shown(sorted(own), 400)} beside the prefix")
    shapes = {name: list(p.shape) for name, p in own.items()}
    if (header := files.read_header(path)).shapes != shapes:
        words = files.shown(header.shapes, 400)
        raise ValueError(f"{path} holds {words}, but the model trains {files.shown(shapes, 400)}")
    try:
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    return found
