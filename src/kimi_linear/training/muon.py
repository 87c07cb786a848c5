"""Muon for matrices and stacks of matrices: momentum, then an update with all singular values near one."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.ops.orthogonalise import orthogonalise

# Of an update with singular values of one, scaled by sqrt(max(R, C)): that of AdamW's updates in practice.
UPDATE_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Muon with the update scaled to the size of AdamW's.

        m <- momentum m + (1 - momentum) g;   u = momentum m + (1 - momentum) g
        w <- (1 - lr weight_decay) w - lr 0.2 sqrt(max(R, C)) orthogonalise(u)
        Moonlight, arXiv:2502.16982, §2.2, so one learning rate and one weight decay serve Muon and AdamW.

    Matrices of one shape are orthogonalised together, a stack [E, R, C] as E matrices.

    Args:
        params: Parameters [R, C] or [E, R, C].
        lr: Learning rate.
        weight_decay: Decoupled, times the learning rate.
        momentum: Of the running mean of gradients; the update looks ahead by one more of it (Nesterov).

    Example:
        >>> weight = nn.Parameter(torch.zeros(4, 8))
        >>> weight.grad = torch.randn(4, 8)
        >>> Muon([weight], lr=0.1).step()
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Muon.step takes no closure"
        for group in self.param_groups:
            members = [parameter for parameter in group["params"] if parameter.grad is not None]
            if members:
                self._step_group(group, members)

    def _step_group(self, group: dict[str, Any], members: list[Tensor]) -> None:
        momentum = group["momentum"]
        gradients = [parameter.grad for parameter in members if parameter.grad is not None]
        for parameter in members:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in members]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        alike = defaultdict(list)
        for parameter, update in zip(members, updates, strict=True):
            alike[parameter.shape[-2:]].append((parameter, update))
        for (R, C), pairs in alike.items():
            stacks = [update.reshape(-1, R, C) for _, update in pairs]
            together = orthogonalise(torch.cat(stacks) if len(stacks) > 1 else stacks[0])
            step = -group["lr"] * UPDATE_RMS * max(R, C) ** 0.5
            parts = together.split([len(stack) for stack in stacks])
            for (parameter, _), part in zip(pairs, parts, strict=True):
                parameter.add_(part.view_as(parameter), alpha=step)
