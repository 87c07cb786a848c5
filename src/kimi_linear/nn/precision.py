"""What stays in float32 whatever the rest of a module is cast to."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Float32Parameters(nn.Module):
    """A module whose parameters named in `FLOAT32` are never narrowed by `.to(dtype)`, `.half()` or loading.

    They move between devices as usual and widen to float64 with `.double()`. Decay rates and the router's bias live
    here: in bfloat16 a bias would lose most of its update steps, and a decay near 1 would lose its distance from 1.
    """

    FLOAT32: ClassVar[frozenset[str]] = frozenset()

    def _kept(self) -> list[Tensor]:
        parameters = [self._parameters[name] for name in self.FLOAT32]
        kept = [parameter for parameter in parameters if parameter is not None]
        return [*kept, *(parameter.grad for parameter in kept if parameter.grad is not None)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Parameters":
        kept = {id(tensor) for tensor in self._kept()}

        def keep_float32(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if id(tensor) in kept and applied.dtype.itemsize < 4:
                # From the original, so that its low bits are not lost on the way.
                return tensor.to(applied.device)
            return applied

        super()._apply(keep_float32, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the loaded tensor itself becomes the parameter, so it is widened here.
        for name in self.FLOAT32:
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.dtype.itemsize < 4:
                state_dict[prefix + name] = loaded.float()
        super()._load_from_state_dict(state_dict, prefix, *args)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
