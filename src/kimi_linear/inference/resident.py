"""How much memory a model takes whose weights are read layer by layer.

    bound = fixed + layer + expert + matrix + head + caches + activations                                        (1)

    fixed        the process's own: modules loaded and buffers kept on the way, the checkpoint's tensor names
    layer        the largest layer's weights without its routed experts, as computed with
    expert       the largest routed expert's matrices
    matrix       float32 values of the largest matrix: what a conversion, or a product's own layout of it, may copy
    head         a block of rows of the output head
    caches       of all rows, with room for twice the context as they grow by doubling, twice if rows can be dropped
    activations  for each token of a call what a layer's matrices return, in float32, three times; latent attention's
                 keys and values of every token in the context, twice; logits in float64, four times

Measured beside it: VmHWM less VmRSS before the model was opened.
"""

import math

from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.mixers import MLAConfig

# Of (1), in bytes.
FIXED = 192 * 2**20
_HEAD_BYTES = 64 * 2**20
_COPIES = 3
_ROUTED = "mlp.experts."


def head_rows(model: KimiLinearLM) -> int:
    """Return how many rows of the output head are computed at a time."""
    weight = model.model.embed_tokens.weight
    return max(1, _HEAD_BYTES // (weight.shape[1] * weight.itemsize))


def resident_bound(model: KimiLinearLM, *, rows: int, tokens: int, context: int) -> int:
    """Return (1) in bytes; arguments as for `StreamedModel.resident_bound`."""
    config = model.config
    itemsize = model.model.embed_tokens.weight.itemsize
    layers = [dict(block.named_parameters()) for block in model.model.blocks()]
    layer = max(sum(p.nbytes for name, p in each.items() if not name.startswith(_ROUTED)) for each in layers)
    expert = max(sum(p[0].nbytes for name, p in each.items() if name.startswith(_ROUTED)) for each in layers)
    head = min(_HEAD_BYTES, config.vocab_size * config.hidden_size * itemsize)
    matrix = max(head, *(4 * math.prod(p.shape[-2:]) for each in layers for p in each.values()))
    caches = rows * config.state_bytes(2 * context, itemsize) * (1 if rows == 1 else 2)
    # For one of an expert's matrices the shape without the first axis counts.
    outputs = max(sum(p.shape[-2] for p in each.values() if p.dim() > 1) for each in layers)
    activations = 4 * rows * (_COPIES * tokens * outputs + 8 * config.vocab_size)
    if tokens > 1:
        activations += rows * context * max(_history(block, itemsize) for block in config.layer_blocks)
    return FIXED + layer + expert + matrix + head + caches + activations


def _history(block: BlockConfig, itemsize: int) -> int:
    """Return the bytes that attention of many tokens at once makes of each token that it sees."""
    mixer = block.mixer
    if not isinstance(mixer, MLAConfig):
        return 2 * (mixer.state_bytes(2, itemsize) - mixer.state_bytes(1, itemsize))
    heads = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim + mixer.v_head_dim
    return 4 * mixer.num_heads * heads * itemsize
