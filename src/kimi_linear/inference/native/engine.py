"""A prepared model: when the native path takes a call, and what it computes."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.base.errors import ConfigError
from kimi_linear.base.registry import unknown_name
from kimi_linear.inference.native.layers import Parts, describe_model, reasons_against
from kimi_linear.inference.native.modules import Stand
from kimi_linear.inference.native.step import Stepper
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.nn.state import Cache
from kimi_linear.ops import native
from kimi_linear.ops.linear.packed import FORMATS, PackedLinear, WeightFormat
from kimi_linear.ops.native.library import DTYPES

# Steps in which all parameters are looked at for changes: after streaming the weights every look is a cache miss.
_TURNS = 8


class NativeModel:
    """Packed weights of a model, and the calls that run on them.

    Copies of a prepared model (copy.deepcopy, pickle) are not prepared.

    Args:
        model: On the CPU, of float32 or bfloat16.
        weights: What the matrices are packed as. The embedding, norms, convolutions, routers and the latent attention's
            kv_b_proj stay in the model's dtype.
        keep_weights: Keep the parameters that are packed. Without them the model can no longer train, save or run on
            anything but this path.
    """

    def __init__(self, model: KimiLinearLM, weights: WeightFormat, keep_weights: bool) -> None:
        _check(model, weights)
        self.weights = weights
        self.keeps_weights = keep_weights
        self._model = model
        self._prepare()
        if not keep_weights:
            self._release()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def takes(self) -> bool:
        """Whether the next call of the model runs here: no gradients, not training, not compiling, no autocast.

        Packs again first if a parameter has changed since it was packed.
        """
        if not self._fits() or (self._is_stale(self._watched) and not self._prepare_again()):
            self.require_weights()
            return False
        return True

    def step(self, input_ids: Tensor, cache: Cache) -> Tensor | None:
        """Return the logits [B, 1, V] behind one new token a row, and move the cache on; None if that is no such call.

        Each call looks at an eighth of the parameters for changes, so what changes all of them (a step of an
        optimiser, load_state_dict) is seen at once, and what changes a single one within eight tokens.
        """
        step = self._step
        if step is None or not self._fits() or self._is_stale(next(self._turns)):
            return None
        return step(input_ids, cache)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return the normed hidden states [B, T, D]; arguments as for the decoder."""
        with self._stand.inside():
            return self._model.model(input_ids, None if cache is None else cache.layers, cu_seqlens)

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [..., D]."""
        return self._head(hidden)

    def require_weights(self) -> None:
        """Raise ConfigError if the parameters were released."""
        if not self.keeps_weights:
            raise ConfigError(
                "this model was prepared with keep_weights=False: it only runs without gradients, in evaluation mode, "
                "with the weights it was prepared with; load it again, or prepare it with keep_weights=True."
            )

    def _fits(self) -> bool:
        if self._model.training or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        return not torch.is_grad_enabled() or not any(p.requires_grad for p in self._model.parameters())

    def _prepare(self) -> None:
        model, parts = self._model, Parts(self.weights)
        self._head = PackedLinear(model.head_weight, format=self.weights)
        described = describe_model(model.model, self._head, parts) if not reasons_against(model.model) else None
        if described is None:
            parts = parts_of_linears(model.model, self.weights)
        self._stand = Stand(parts)
        self._replaced = [*parts.replaced, *([] if model.lm_head is None else [(model.lm_head, "weight")])]
        dtype = model.model.embed_tokens.weight.dtype
        self._step = None if described is None else Stepper(described, model.config, dtype)
        self._watch()

    def _watch(self) -> None:
        parameters = [_Watched(module, name) for module in self._model.modules() for name in module._parameters]
        modules = [_WatchedModule(module, name) for module in self._model.modules() for name in module._modules]
        kept = [one for one in parameters if one.parameter is not None]
        self._watched: list[_Watched | _WatchedModule] = [*kept, *modules]
        # One token looks at one of these lists, the next at the next.
        self._turns = itertools.cycle([self._watched[i::_TURNS] for i in range(_TURNS)])

    def _is_stale(self, watched: "list[_Watched | _WatchedModule]") -> bool:
        return any(one.has_changed() for one in watched)

    def _prepare_again(self) -> bool:
        """Pack again; False if the model no longer fits (moved, cast, with adapters), so that the plain modules run."""
        self.require_weights()
        if _reasons(self._model):
            # A step looks at some of the parameters only; those may be as they were.
            self._step = None
            return False
        self._prepare()
        return True

    def _release(self) -> None:
        for module, name in self._replaced:
            parameter = module._parameters[name]
            assert parameter is not None
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        self._watch()


class _Watched:
    """A parameter as it was when it was packed."""

    __slots__ = ("_address", "_name", "_parameters", "_version", "parameter")

    def __init__(self, module: nn.Module, name: str) -> None:
        self._parameters: dict[str, Any] = module._parameters
        self._name = name
        self.parameter = self._parameters[name]
        self._version = self._count()
        self._address = None if self.parameter is None else self.parameter.data_ptr()

    def _count(self) -> int:
        # Tensors made in inference mode count no versions.
        parameter = self.parameter
        return 0 if parameter is None or parameter.is_inference() else int(parameter._version)

    def has_changed(self) -> bool:
        """Whether it was replaced, written to or moved since."""
        parameter = self.parameter
        if self._parameters[self._name] is not parameter:
            return True
        return parameter is not None and (self._count() != self._version or parameter.data_ptr() != self._address)


class _WatchedModule:
    """A module in its place, as it was when the weights were packed; adapters take its place later."""

    __slots__ = ("_module", "_modules", "_name")

    def __init__(self, parent: nn.Module, name: str) -> None:
        self._modules = parent._modules
        self._name = name
        self._module = self._modules[name]

    def has_changed(self) -> bool:
        """Whether another module stands there now."""
        return self._modules[self._name] is not self._module


def parts_of_linears(root: nn.Module, format: WeightFormat) -> Parts:
    """Return the packed linear layers of a network that the native step does not know."""
    parts = Parts(format)
    for module in root.modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            parts.one(module, [])
    return parts


def _reasons(model: KimiLinearLM) -> list[str]:
    """Return why a model cannot be prepared; empty if it can."""
    weight = model.model.embed_tokens.weight
    reasons = []
    if weight.device.type != "cpu":
        reasons.append(f"it is on {weight.device}, and this runs on the CPU")
    elif weight.dtype not in DTYPES:
        reasons.append(f"it is {weight.dtype}, expected float32 or bfloat16")
    elif missing := native.why_unavailable():
        reasons.append(missing)
    elif added := {name for name, _ in model.named_parameters()} - model.config.shapes().keys():
        reasons.append(
            f"it has {min(added)}, which its configuration lacks, as adapters do; merge them into the weights"
        )
    return reasons


def _check(model: KimiLinearLM, weights: str) -> None:
    if weights not in FORMATS:
        raise ConfigError(unknown_name("kind of weights", weights, list(FORMATS)))
    if reasons := _reasons(model):
        raise ConfigError(f"the model cannot be prepared for inference: {'; '.join(reasons)}.")
