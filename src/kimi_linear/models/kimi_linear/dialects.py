"""Other layouts of a checkpoint in circulation, as data: which stored tensor holds which release tensor. No torch.

    transformers, saved       the dense layers' MLP under block_sparse_moe
    transformers, in memory   block_sparse_moe is mlp; experts stacked, gate and up in one; convolutions in one; the
                              forget gate a module of its own
    mlx-lm                    experts stacked under switch_mlp; kv_b_proj in two, the key part transposed; convolutions
                              with channels last

Each tensor is looked for on its own, so mixtures load too; what no rule explains is left over, and missed where it
should have been.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.keys import release_tensors
from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.mixers import MLAConfig

RELEASE, TRANSFORMERS, MLX = "release", "transformers", "mlx-lm"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """A piece of a stored tensor, and the release tensor, or rows of it, that it is.

    Args:
        stored: Name of the tensor in the file.
        shape: Of the whole stored tensor.
        release: Name of the release tensor.
        dialect: Whose layout this is.
        take: Index of the piece in the stored tensor.
        swap: Whether the piece's last two axes are exchanged.
        groups: The release tensor's rows are seen as so many groups of rows ...
        rows: ... and the piece is these rows of every group; None: all.
    """

    stored: str
    shape: Shape
    release: str
    dialect: str = RELEASE
    take: tuple[int | slice, ...] = ()
    swap: bool = False
    groups: int = 1
    rows: slice | None = None


# A release name, its name elsewhere and where that is; the tensor is the same, up to axes of size 1.
_RENAMED = (
    (re.compile(r"\.self_attn\.(f_[ab]_proj\.weight|dt_bias|A_log)$"), r".self_attn.forget_gate.\1", (TRANSFORMERS,)),
    (re.compile(r"\.mlp\.((?:gate|up|down)_proj\.weight)$"), r".block_sparse_moe.\1", (TRANSFORMERS,)),
    (re.compile(r"\.block_sparse_moe\.gate\.(e_score_correction_bias)$"), r".mlp.\1", (MLX,)),
    (re.compile(r"\.block_sparse_moe\."), ".mlp.", (TRANSFORMERS, MLX)),
    (re.compile(r"\.self_attn\.([qkv])_conv1d\.weight$"), r".self_attn.\1_conv.conv.weight", (MLX,)),
)


def locate(stored: Mapping[str, Shape], config: KimiLinearConfig) -> tuple[list[Move], list[str]]:
    """Return where each release tensor of a configuration is among stored ones, and the names of the missing.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> moves, missing = locate({"model.norm.weight": (64,)}, preset("tiny"))
        >>> moves[0].stored, "model.embed_tokens.weight" in missing
        ('model.norm.weight', True)
    """
    moves = [move for move in _joined(config) if move.stored in stored]
    found = {move.release for move in moves}
    missing = []
    for name, (shape, _) in release_tensors(config).items():
        if name in found:
            continue
        move = next((move for move in _spellings(name, shape) if move.stored in stored), None)
        if move is None:
            missing.append(name)
        else:
            moves.append(move)
    return moves, missing


def moves_into(layout: str, config: KimiLinearConfig) -> list[Move]:
    """Return what every tensor of the release's or of mlx-lm's layout is made of, its pieces in their order.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> [move.release[-19:] for move in moves_into(MLX, preset("tiny")) if "1.mlp.switch_mlp.up" in move.stored][:2]
        ['experts.0.w3.weight', 'experts.1.w3.weight']
    """
    moves = [move for move in _joined(config) if move.dialect == layout]
    joined = {move.release for move in moves}
    for name, (shape, _) in release_tensors(config).items():
        if name not in joined:
            spelled = list(_spellings(name, shape))
            moves.append(next((move for move in spelled if move.dialect == layout), spelled[0]))
    return moves


def _spellings(name: str, shape: Shape) -> Iterator[Move]:
    """Yield the tensor under its release name, then under those of other layouts."""
    yield Move(name, shape, name)
    for pattern, replacement, dialects in _RENAMED:
        if pattern.search(name):
            other = (shape[0], shape[2], 1) if name.endswith("_conv1d.weight") else shape
            for dialect in dialects:
                yield Move(pattern.sub(replacement, name), other, name, dialect)


def _joined(config: KimiLinearConfig) -> Iterator[Move]:
    """Yield the pieces of tensors that hold several release tensors, or a part of one."""
    shapes = {name: shape for name, (shape, _) in release_tensors(config).items()}
    for index, block in enumerate(config.layer_blocks):
        layer = f"model.layers.{index}"
        if isinstance(block.ffn, MoEConfig):
            yield from _experts(layer, block.ffn.num_experts, shapes)
        if isinstance(block.mixer, MLAConfig):
            yield from _latent_up(f"{layer}.self_attn", block.mixer)
        yield from _convolutions(f"{layer}.self_attn", shapes)


def _experts(layer: str, count: int, shapes: Mapping[str, Shape]) -> Iterator[Move]:
    F, D = shapes[f"{layer}.block_sparse_moe.experts.0.w1.weight"]
    for e in range(count):
        w1, w2, w3 = (f"{layer}.block_sparse_moe.experts.{e}.w{n}.weight" for n in (1, 2, 3))
        for prefix in (f"{layer}.mlp.experts", f"{layer}.block_sparse_moe.experts"):
            both = (f"{prefix}.gate_up_proj", (count, 2 * F, D))
            yield Move(*both, w1, TRANSFORMERS, (e, slice(0, F)))
            yield Move(*both, w3, TRANSFORMERS, (e, slice(F, 2 * F)))
            yield Move(f"{prefix}.down_proj", (count, D, F), w2, TRANSFORMERS, (e,))
        for name, release, shape in (("gate", w1, (F, D)), ("down", w2, (D, F)), ("up", w3, (F, D))):
            yield Move(f"{layer}.mlp.switch_mlp.{name}_proj.weight", (count, *shape), release, MLX, (e,))


def _latent_up(attention: str, mixer: MLAConfig) -> Iterator[Move]:
    H, L, N, V = mixer.num_heads, mixer.kv_lora_rank, mixer.qk_nope_head_dim, mixer.v_head_dim
    release = f"{attention}.kv_b_proj.weight"
    keys = (f"{attention}.embed_q.weight", (H, L, N), release, MLX)
    yield Move(*keys, swap=True, groups=H, rows=slice(0, N))
    yield Move(f"{attention}.unembed_out.weight", (H, V, L), release, MLX, groups=H, rows=slice(N, N + V))


def _convolutions(attention: str, shapes: Mapping[str, Shape]) -> Iterator[Move]:
    names = [f"{attention}.{letter}_conv1d.weight" for letter in "qkv"]
    if not all(name in shapes for name in names):
        return
    channels = sum(shapes[name][0] for name in names)
    start = 0
    for name in names:
        end = start + shapes[name][0]
        whole = (channels, *shapes[name][1:])
        yield Move(f"{attention}.conv1d.weight", whole, name, TRANSFORMERS, (slice(start, end),))
        start = end
