"""Whether another thread is inside a model, when that is about to change."""

import sys
import threading
from types import FrameType

from torch import nn

# each call of a module runs this, whether the module has hooks or not
_CALL = nn.Module._call_impl.__code__


def inside_elsewhere(model: nn.Module) -> bool:
    """True if a thread other than this one is in a forward pass of `model`, or of a part of it."""
    stacks = [frame for thread, frame in sys._current_frames().items() if thread != threading.get_ident()]
    if not stacks:
        return False
    modules = {id(module) for module in model.modules()}
    return any(_meets(frame, modules) for frame in stacks)


def _meets(frame: FrameType | None, modules: set[int]) -> bool:
    while frame is not None:
        if frame.f_code is _CALL and id(frame.f_locals.get("self")) in modules:
            return True
        frame = frame.f_back
    return False
