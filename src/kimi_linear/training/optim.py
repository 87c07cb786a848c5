"""Optimizers of a run: Muon for the hidden matrices, AdamW for the rest, and their state as plain tensors.

Muon's update has the size of AdamW's (muon.py), so one learning rate and one weight decay serve both. AdamW is torch's
own, whose fused step already runs at the memory's bandwidth.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.base.errors import CheckpointError, ConfigError, DtypeError
from kimi_linear.base.registry import unknown_name
from kimi_linear.training.muon import Muon

_NAMES = ("muon", "adamw")

# What a parameter is, by its checkpoint name; the first pattern that matches decides, then the number of dimensions.
_ROLES = (
    (re.compile(r"(^|\.)embed_tokens\.weight$"), "embedding"),
    (re.compile(r"(^|\.)lm_head\.weight$"), "head"),
    (re.compile(r"conv1d\.weight$"), "conv"),
    (re.compile(r"(^|\.)A_log$|bias$"), "vector"),
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Which optimizer, and its constants. `learning_rate` is the peak; the schedule multiplies it."""

    name: str = "muon"
    learning_rate: float = 1.1e-3
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            raise ConfigError(f"optim.name: {unknown_name('optimizer', self.name, list(_NAMES))}")
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.eps <= 0:
            raise ConfigError(
                f"optim: learning_rate {self.learning_rate} and eps {self.eps} must be above 0, "
                f"weight_decay {self.weight_decay} at least 0."
            )
        if len(self.betas) != 2 or not all(0 <= value < 1 for value in (*self.betas, self.momentum)):
            raise ConfigError(f"optim: betas {self.betas} and momentum {self.momentum} must be in [0, 1), two betas.")


@dataclass(frozen=True)
class _Part:
    """One torch optimizer with the names of its tensors, in the optimizer's own order."""

    name: str
    optimizer: torch.optim.Optimizer
    names: tuple[str, ...]


class Optimizers:
    """The optimizers of a model behind one `step`. Build it with `build_optimizers`, after moving the model."""

    def __init__(self, parts: list[_Part], learning_rate: float) -> None:
        self._parts = parts
        self._peak = learning_rate

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return self._peak

    @torch.no_grad()
    def step(self, multiplier: float) -> None:
        """Update the parameters from their gradients, at `multiplier` times the peak learning rate, and drop those."""
        for part in self._parts:
            for group in part.optimizer.param_groups:
                group["lr"] = self._peak * multiplier
            part.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self._parts:
            part.optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state as flat tensors, named `optimizer/parameter/quantity`; they share storage with it."""
        return {
            f"{part.name}/{name}/{quantity}": value
            for part in self._parts
            for name, tensor in zip(part.names, _tensors(part.optimizer), strict=True)
            for quantity, value in part.optimizer.state.get(tensor, {}).items()
        }

    def groups(self) -> list[dict[str, Any]]:
        """Return names and constants of every group, ready for JSON."""
        found = []
        for part in self._parts:
            names = iter(part.names)
            for group in part.optimizer.param_groups:
                constants = {key: value for key, value in group.items() if key not in {"params", "lr"}}
                members = [next(names) for _ in group["params"]]
                found.append({"optimizer": part.name, "parameters": members, **constants})
        return found

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` gave; every optimized tensor must be of the same name and shape.

        Raises:
            CheckpointError: A tensor belongs to no parameter, or its shape is another one.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, _, quantity = key.rpartition("/")
            states.setdefault(owner, {})[quantity] = value
        for part in self._parts:
            for name, tensor in zip(part.names, _tensors(part.optimizer), strict=True):
                state = states.pop(f"{part.name}/{name}", None)
                if state is not None:
                    _check_shapes(name, tensor, state)
                    part.optimizer.state[tensor] = {q: _placed(value, tensor) for q, value in state.items()}
        if states:
            raise CheckpointError(f"the optimizer state holds {next(iter(states))!r}, which this model does not have.")


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Sort a model's parameters into groups and build their optimizers.

    | role      | which                                            | optimizer     | weight decay             |
    | --------- | ------------------------------------------------ | ------------- | ------------------------ |
    | matrix    | 2-D, and each matrix of a 3-D stack of experts   | Muon or AdamW | yes                      |
    | head      | `lm_head`                                        | AdamW         | yes                      |
    | embedding | `embed_tokens`                                   | AdamW         | if `decay_embeddings`    |
    | conv      | `*conv1d.weight`                                 | AdamW         | no                       |
    | vector    | norms, biases, `A_log`, `dt_bias`, router bias   | AdamW         | no                       |

    Parameters that need no gradient are left out.

    Args:
        model: The network; trained parameters must be float32, the master weights.
        config: Names and constants.

    Raises:
        DtypeError: A trained parameter is not float32.
        ConfigError: A parameter has a shape no rule covers, or nothing is to be trained.

    Example:
        >>> optimizers = build_optimizers(nn.Linear(4, 4), OptimConfig())
    """
    matrices: dict[str, nn.Parameter] = {}
    decayed: dict[str, nn.Parameter] = {}
    exempt: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise DtypeError(
                f"parameter {name} is {parameter.dtype}, expected torch.float32: train float32 weights and choose "
                f'precision="bf16" for the arithmetic.'
            )
        role = _role(name, parameter)
        if role == "matrix" and config.name == "muon":
            matrices[name] = parameter
        elif role in {"matrix", "head"} or (role == "embedding" and config.decay_embeddings):
            decayed[name] = parameter
        else:
            exempt[name] = parameter
    parts = [part for part in (_muon(matrices, config), _adamw(decayed, exempt, config)) if part is not None]
    if not parts:
        raise ConfigError(f"{type(model).__name__} has no parameter that needs a gradient; nothing to train.")
    return Optimizers(parts, config.learning_rate)


def _role(name: str, parameter: Tensor) -> str:
    for pattern, role in _ROLES:
        if pattern.search(name):
            return role
    if parameter.ndim <= 1:
        return "vector"
    if parameter.ndim <= 3:
        return "matrix"
    raise ConfigError(f"parameter {name} has shape {tuple(parameter.shape)}; expected at most 3 dimensions.")


def _muon(matrices: dict[str, nn.Parameter], config: OptimConfig) -> _Part | None:
    if not matrices:
        return None
    optimizer = Muon(
        matrices.values(), lr=config.learning_rate, weight_decay=config.weight_decay, momentum=config.momentum
    )
    return _Part("muon", optimizer, tuple(matrices))


def _adamw(decayed: dict[str, nn.Parameter], exempt: dict[str, nn.Parameter], config: OptimConfig) -> _Part | None:
    groups = [
        {"params": list(members.values()), "weight_decay": weight_decay}
        for members, weight_decay in ((decayed, config.weight_decay), (exempt, 0.0))
        if members
    ]
    if not groups:
        return None
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    return _Part("adamw", optimizer, (*decayed, *exempt))


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _check_shapes(name: str, tensor: Tensor, state: dict[str, Tensor]) -> None:
    for quantity, value in state.items():
        # AdamW's step count is a scalar; everything else is shaped like the parameter.
        if value.ndim > 0 and value.shape != tensor.shape:
            raise CheckpointError(
                f"the optimizer state {quantity} of {name} is {tuple(value.shape)}, expected {tuple(tensor.shape)}."
            )


def _placed(value: Tensor, tensor: Tensor) -> Tensor:
    return value.to(tensor.device, copy=True)
