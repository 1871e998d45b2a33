"""What the settings of a run have in common, whatever they are of: how they are checked, and made of a config."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

from bench.paper.runs import Refusal


class Settings:
    """Base of a frozen dataclass whose fields are the keys of a run's config.

    Raises:
        Refusal: in one line, a value that is none of WORDS, no integer from LEAST, no finite number from 0 of RATES.
    """

    WORDS: ClassVar[Mapping[str, Sequence[str]]] = {}
    LEAST: ClassVar[Mapping[str, int]] = {}
    RATES: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            for kind, word in ((bool, "true or false"), (str, "a text")):
                if isinstance(each.default, kind) and not isinstance(value, kind):
                    raise Refusal(f"{each.name} is {value!r}, expected {word}")
        for name, words in self.WORDS.items():
            if getattr(self, name) not in words:
                raise Refusal(f"{name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, words))}")
        for name, bound in self.LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise Refusal(f"{name} is {value!r}, expected an integer from {bound}")
        for name in self.RATES:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
                raise Refusal(f"{name} is {value!r}, expected a finite number from 0")

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(config) - known):
            raise Refusal(f"a run has no setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
        return cls(**config)
