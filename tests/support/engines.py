"""What the comparisons with other engines share: models whose rules are an engine's, and their greedy texts."""

from dataclasses import replace

import torch

from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.mixers import KDAConfig, MLAConfig

STEPS = 32


def with_parts(config: KimiLinearConfig, kind: type, **changes: object) -> KimiLinearConfig:
    """Return the configuration with fields of every mixer or feed-forward network of a kind changed."""
    blocks = {}
    for name, block in config.blocks.items():
        parts = {"mixer": block.mixer, "ffn": block.ffn}
        changed = {at: replace(part, **changes) for at, part in parts.items() if isinstance(part, kind)}  # type: ignore[type-var]
        blocks[name] = replace(block, **changed)  # type: ignore[arg-type]
    return replace(config, blocks=blocks)


def for_llama(config: KimiLinearConfig) -> KimiLinearConfig:
    """Return the nearest shape that llama.cpp can run: one number of heads, renormalised expert weights."""
    heads = next(block.mixer.num_heads for block in config.layer_blocks if isinstance(block.mixer, MLAConfig))
    return with_parts(with_parts(config, KDAConfig, num_heads=heads), MoEConfig, renormalize=True)


def computing_as(config: KimiLinearConfig, model: KimiLinearForCausalLM) -> KimiLinearForCausalLM:
    """Return a model's weights in float32 under another configuration."""
    other = KimiLinearForCausalLM(config)
    other.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return other.eval()


def greedy_text(model: KimiLinearForCausalLM, ids: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Return the greedy tokens behind a prompt and the logits [T + STEPS, V] up to the last of them.

    The prompt is read at once, the tokens one by one through the cache; there is one token more than is fed back.
    """
    cache, logits, tokens, fed = model.new_cache(1), [], [], ids
    with torch.no_grad():
        for _ in range(STEPS + 1):
            logits.append(model(fed, cache=cache).logits[0])
            fed = logits[-1][-1:].argmax(-1, keepdim=True)
            tokens.append(int(fed))
    return tokens, torch.cat(logits)
