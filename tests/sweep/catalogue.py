"""Every model class that transformers' auto classes name, and the smallest config of each that is still itself."""

import importlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name


class Unit(NamedTuple):
    """A model class with one of the kinds of config that it takes."""

    model_type: str
    cls: str
    tasks: tuple[str, ...]  # the auto classes that name it, "CAUSAL_LM" for MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    @property
    def name(self) -> str:
        return f"{self.model_type}/{self.cls}"


def units() -> list[Unit]:
    """All, sorted by name."""
    found: dict[tuple[str, str], list[str]] = {}
    for table in sorted(vars(modeling_auto)):
        if not re.fullmatch(r"MODEL_\w*(MAPPING|TOKENIZATION)_NAMES", table):
            continue
        task = re.sub(r"^MODEL_(FOR_)?|_?(MAPPING)?_NAMES$", "", table) or "BASE"
        for model_type, classes in getattr(modeling_auto, table).items():
            for cls in classes if isinstance(classes, (tuple, list)) else (classes,):
                found.setdefault((model_type, cls), []).append(task)
    return sorted(Unit(model_type, cls, tuple(tasks)) for (model_type, cls), tasks in found.items())


def model_class(unit: Unit) -> Any:
    library = importlib.import_module("transformers")
    if hasattr(library, unit.cls):
        return getattr(library, unit.cls)
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(unit.model_type)}")
    return getattr(module, unit.cls)


def config_class(unit: Unit) -> Any:
    return CONFIG_MAPPING[unit.model_type]


def tensors(out: Any) -> Iterator[Any]:
    """The floating-point tensors of an output, in a fixed order; caches are no output."""
    import torch

    if isinstance(out, torch.Tensor):
        if out.is_floating_point() or out.is_complex():
            yield out
    elif isinstance(out, dict):
        for name, value in out.items():
            if "past_key_values" not in name and "cache" not in name:
                yield from tensors(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from tensors(value)
