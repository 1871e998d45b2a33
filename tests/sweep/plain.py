"""What the plain model does with its inputs: what the model with a prefix is held to."""

from typing import Any

import torch

from . import inputs as examples
from . import proofs
from .building import forward
from .proofs import tried


class Plain:
    """Measured before `attach`. What the model does not do by itself is None, and nothing is asked of it later."""

    def __init__(self, model: Any, inputs: examples.Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.state = {name: v.clone() for name, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
        self.implementations = implementations(model)
        self.out = forward(model, inputs)
        # Which product a linear layer takes depends on whether its weight wants a gradient, so the plain model's last
        # bits do: attach freezes, and what is compared to the bit while attached is the frozen plain model.
        model.requires_grad_(False)
        self.frozen = forward(model, inputs)
        places = [(n, p) for n in ("decoder_input_ids", "input_ids", "pixel_values") if n in inputs for p in (-1, 0)]
        self.dependence = {k: tried(lambda k=k: proofs.dependence(model, inputs, *k)) for k in places}
        text = "input_ids" in inputs and inputs["input_ids"].ndim == 2 and "attention_mask" in examples.names_of(model)
        sides = proofs.SIDES if text else ()
        self.padding = {s: tried(lambda s=s: proofs.padding_error(model, inputs, s)) for s in sides}
        self.widths = {
            n: tried(lambda n=n: proofs.masked(model, inputs, n)) is not None for n in ((-2, 3) if text else ())
        }
        self.labels = proofs.choose_labels(model, inputs)
        self.generated, self.steps, self.left = self._generation(text and not model.config.is_encoder_decoder)
        self.pictured, self.seen, self.image_step = self._image()
        parts = proofs.parts_of(model).items()
        self.parts = {n: (p, tried(lambda p=p: proofs.part_inputs(model, inputs, p))) for n, p in parts}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def _generation(self, padded: bool) -> tuple[Any, list[float] | None, float | None]:
        """What is generated, how far its steps are from a forward pass, and a padded sample's from the sample alone."""
        model, inputs = self.model, self.inputs
        if not tried(lambda: model.can_generate()):
            return None, None, None
        one, two = (tried(lambda: proofs.generated(model, inputs)) for _ in range(2))
        if one is None or two is None or not proofs.equal(one.logits, two.logits):
            return None, None, None  # also a model that goes on where the last call ended
        steps = tried(lambda: proofs.steps_off(model, inputs, one))
        return one, steps, tried(lambda: proofs.left_padded(model, inputs)) if padded else None

    def _image(self) -> tuple[examples.Inputs | None, Any, float | None]:
        """Inputs with an image, the output, and how far the first generated logits are from those of a forward pass."""
        model = self.model
        pictured = proofs.choose_image(model)
        if pictured is None:
            return None, None, None
        proofs.forget(model)
        seen = forward(model, pictured)
        step = tried(lambda: proofs.image_step(model, pictured)) if self.generated is not None else None
        proofs.forget(model)
        return pictured, seen, step


def implementations(model: Any) -> list[str | None]:
    return [getattr(m.config, "_attn_implementation", None) for m in model.modules() if "config" in m.__dict__]
