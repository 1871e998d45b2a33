"""What frozen blocks make of images, kept."""

from torch import Tensor

from bench.paper.visual.methods import Tuned


class Features:
    """What blocks before `first` make of images that no augmentation changes: computed once, exactly what they give.

    `first` is the first block that is trained. Only timm's VisionTransformer is known to be the blocks in their order.
    """

    def __init__(self, tuned: Tuned) -> None:
        self.model, self.first = tuned.model, tuned.first

    @staticmethod
    def possible(tuned: Tuned) -> bool:
        from timm.models import VisionTransformer

        return tuned.first > 0 and type(tuned.model) is VisionTransformer and not len(tuned.added)

    def before(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block in model.blocks[: self.first]:
            x = block(x)
        if self.first < len(model.blocks):
            return x  # [B, N, width]
        made: Tensor = model.forward_head(model.norm(x), pre_logits=True)
        return made  # [B, width]

    def after(self, x: Tensor) -> Tensor:
        model = self.model
        if self.first == len(model.blocks):
            logits: Tensor = model.head(x)
            return logits
        for block in model.blocks[self.first :]:
            x = block(x)
        logits = model.forward_head(model.norm(x))
        return logits
