"""Our own model as a benchmark drives it: read a prompt, generate, take a training step."""

import dataclasses
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from kimi_linear.base.errors import ConfigError
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.mixers import GQAConfig, MLAConfig
from kimi_linear.ops.linear.packed import WeightFormat
from kimi_linear.training.precision import autocast

# Bytes of one weight as it is read; four-bit groups carry a scale.
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
GQA_GROUPS = 4


def gqa_like(config: KimiLinearConfig, groups: int = GQA_GROUPS) -> KimiLinearConfig:
    """Return the network with grouped-query attention in every layer, as many heads of the value dim as latent ones.

    Example:
        >>> gqa_like(preset("tiny")).layers
        ('gqa_dense', 'gqa', 'gqa', 'gqa')
    """
    mla = next(block.mixer for block in config.layer_blocks if isinstance(block.mixer, MLAConfig))
    mixer = GQAConfig(num_heads=mla.num_heads, num_kv_heads=max(1, mla.num_heads // groups), head_dim=mla.v_head_dim)
    layers = tuple("gqa_dense" if block.ffn.kind == "swiglu" else "gqa" for block in config.layer_blocks)
    blocks = {
        name: BlockConfig(mixer=mixer, ffn=block.ffn) for name, block in zip(layers, config.layer_blocks, strict=True)
    }
    return dataclasses.replace(config, blocks=blocks, layers=layers)


def named_config(name: str) -> KimiLinearConfig:
    """Return a preset, or with "-gqa" behind a size its grouped-query baseline."""
    return gqa_like(preset(name.removesuffix("-gqa"))) if name.endswith("-gqa") else preset(name)


def build(config: KimiLinearConfig, seed: int = 0) -> KimiLinearForCausalLM:
    """Return a float32 model with fresh weights."""
    return KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(seed))


def served_dtype(weights: str) -> torch.dtype:
    """Return the dtype of activations and caches beside weights of a kind."""
    return torch.float32 if weights == "float32" else torch.bfloat16


def for_inference(model: KimiLinearForCausalLM, weights: str) -> KimiLinearForCausalLM:
    """Return the model as it is served with weights of a kind: "float32", "bfloat16", "int8" or "int4".

    Raises:
        ConfigError: The weights cannot be held so here; plain ones always can.
    """
    model = model.to(served_dtype(weights)).eval()
    try:
        return model.prepare_for_inference(cast(WeightFormat, weights), keep_weights=False)
    except ConfigError:
        if weights in ("float32", "bfloat16"):
            return model
        raise


def prompt(tokens: int, vocab_size: int, batch: int = 1) -> Tensor:
    """Return token ids [B, T] that are the same for every engine."""
    # A multiplier prime to every vocabulary in use visits the ids without order; the last id may be special.
    return (torch.arange(batch * tokens) * 7919 % (vocab_size - 1)).view(batch, tokens)


class Engine:
    """A model held ready for one kind of weights.

    Args:
        model: In float32; with `weights` it is prepared for inference, without it trains.
        weights: As `for_inference`, or None to train.
    """

    def __init__(self, model: KimiLinearForCausalLM, weights: str | None) -> None:
        self.model = model if weights is None else for_inference(model, weights)
        self.config = model.config

    @classmethod
    def load(cls, checkpoint: str | Path, weights: str | None) -> "Engine":
        """Return the engine of a checkpoint directory."""
        return cls(KimiLinearForCausalLM.from_pretrained(checkpoint, dtype="float32"), weights)

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """Read a prompt into a fresh cache and return the seconds until the logits of its last token."""
        ids = prompt(tokens, self.config.vocab_size)
        started = time.perf_counter()
        cache = self.model.new_cache(1)
        self.model(ids, cache=cache, last_only=True)
        return time.perf_counter() - started

    @torch.inference_mode()
    def decode(self, tokens: int, steps: int) -> float:
        """Generate greedily behind a prompt and return the seconds of the steps alone."""
        ids = prompt(tokens, self.config.vocab_size)
        cache = self.model.new_cache(1)
        logits = self.model(ids, cache=cache, last_only=True).logits
        started = time.perf_counter()
        for _ in range(steps):
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = self.model(token, cache=cache, last_only=True).logits
        return time.perf_counter() - started

    def train(self, batch: int, tokens: int, precision: str = "bf16") -> float:
        """Return the seconds of one forward and backward pass."""
        ids = prompt(tokens, self.config.vocab_size, batch)
        self.model.train()
        started = time.perf_counter()
        with autocast(precision, torch.device("cpu")):
            loss = self.model(ids, labels=ids).loss
        loss.backward()
        taken = time.perf_counter() - started
        self.model.zero_grad(set_to_none=True)
        return taken

    @torch.inference_mode()
    def logits(self, tokens: int) -> Tensor:
        """Return the float32 logits [T, V] of a prompt."""
        return self.model(prompt(tokens, self.config.vocab_size)).logits[0].float()

    def weight_bytes(self, weights: str) -> float:
        """Return the bytes of weights that one token reads."""
        return self.config.active_parameters() * WEIGHT_BYTES[weights]
