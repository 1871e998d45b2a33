"""Optimizers for which the gradient of a prefix network's large matrix stays two thin factors."""

from prefixattn.optim.adamw import FactoredAdamW
from prefixattn.optim.lazy_grad import DeferredGradient, FactoredGradient
from prefixattn.optim.sgd import FactoredSGD

__all__ = ["DeferredGradient", "FactoredAdamW", "FactoredGradient", "FactoredSGD"]
