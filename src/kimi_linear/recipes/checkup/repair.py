"""A repaired copy of a checkpoint; the original is only read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.assemble import assemble, mapped_tensors
from kimi_linear.checkpoint.configs import CONFIG_NAME, GENERATION_NAME, generation_json, model_json
from kimi_linear.checkpoint.layout import check_fits, narrow_router_biases, with_tied_head
from kimi_linear.checkpoint.model_card import model_card
from kimi_linear.checkpoint.reader import PICKLES, list_names
from kimi_linear.checkpoint.save import is_weights, write_checkpoint
from kimi_linear.checkpoint.writer import explain_write_errors, parse_size
from kimi_linear.models.kimi_linear.release_config import unknown_keys
from kimi_linear.recipes.checkup.checks import check
from kimi_linear.recipes.checkup.evidence import Evidence, gather, optional_json
from kimi_linear.recipes.checkup.finding import Finding
from kimi_linear.recipes.checkup.side_files import as_ids, end_tokens
from kimi_linear.recipes.checkup.tensors import compare_duplicates, usable

_DECAYS = ("A_log", "dt_bias")


@dataclass(frozen=True)
class Repair:
    """What became of the findings: those that the copy has no more, and those that it still has."""

    target: Path
    fixed: tuple[Finding, ...]
    left: tuple[Finding, ...]


def repair(path: str | os.PathLike[str], target: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> Repair:
    """Write a copy in the release's layout, with every released key, a fresh index, and all end tokens.

    Weights go from the mapped files to the copy one tensor at a time. Decays below float32 are stored as float32 and
    router biases as the weights, where that loses nothing; a tied output head is stored once more, for engines that
    never tie; every other number stays as it is. Unknown keys of config.json are kept; Python files that its auto_map
    names, and pickle files, are not copied.

    Args:
        path: The checkpoint.
        target: A directory that is new or empty, outside of the checkpoint.
        max_shard_size: Bytes of tensors in a file.

    Raises:
        CheckpointError: The checkpoint lacks what a copy needs (a readable configuration, a tensor), the target is
            not such a directory, or the disk is full; nothing is written then.
    """
    limit = parse_size(max_shard_size)
    evidence = gather(path)
    out = _check_target(evidence.directory, Path(target).expanduser().resolve())
    config = evidence.config
    if config is None:
        raise CheckpointError(f"this cannot be repaired: {evidence.problem}")
    tensors = _tensors(evidence)
    if evidence.is_released_type:
        tensors = with_tied_head(tensors, config)
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    kept = {key: evidence.given[key] for key in unknown_keys(dict(evidence.given)) if key in evidence.given}
    described = {**(kept if evidence.is_released_type else {}), **model_json(config, dtype)}
    generation, _ = optional_json(evidence.directory / GENERATION_NAME)
    ends = end_tokens(evidence) | as_ids((generation or {}).get("eos_token_id"))
    stated = {**(generation or {}), **generation_json(config, sorted(ends))}
    card = model_card(config, dtype, model_type=described["model_type"])
    with explain_write_errors(out):
        write_checkpoint(out, tensors, described, stated, _side_files(evidence), card, limit)
    after = _problems(gather(out))
    texts = {finding.text for finding in after}
    fixed = tuple(finding for finding in _problems(evidence) if finding.text not in texts)
    return Repair(out, fixed, tuple(after))


def _problems(evidence: Evidence) -> list[Finding]:
    return [finding for finding in check(evidence) if finding.severity != "ok"]


def _check_target(source: Path, out: Path) -> Path:
    source = source.resolve()
    if out == source or source in out.parents:
        raise CheckpointError(f"{out} is the checkpoint itself or inside it; give another directory for the copy.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already; give a new or empty directory for the copy.")
    return out


def _tensors(evidence: Evidence) -> dict[str, Tensor]:
    """Return the release's tensors, as views of the mapped files wherever they need no change."""
    assert evidence.config is not None
    _, different = compare_duplicates(evidence)
    if different:
        raise CheckpointError(
            f"this cannot be repaired: several files hold {list_names(different)} with different values; "
            "remove the wrong ones."
        )
    stored = usable(evidence)
    moves = check_fits(stored, evidence.config, evidence.directory)
    mapped = mapped_tensors({name: tensor.file for name, tensor in stored.items()})
    tensors = assemble(mapped, moves, evidence.config)
    dtype = tensors["model.embed_tokens.weight"].dtype
    return narrow_router_biases(_with_float32_decays(tensors), dtype)


def _with_float32_decays(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(_DECAYS) and torch.equal(tensor.float().to(tensor.dtype), tensor):
            changed[name] = tensor.float()
    return changed


def _side_files(evidence: Evidence) -> dict[str, Path]:
    """Return the files to copy: all but weights, pickles, what is written anew and what auto_map points to."""
    hooks = evidence.given.get("auto_map")
    code = {f"{str(value).split('.')[0]}.py" for value in hooks.values()} if isinstance(hooks, dict) else set()
    left_out = {CONFIG_NAME, GENERATION_NAME} | code
    return {
        file.name: file
        for file in sorted(evidence.directory.iterdir())
        if file.is_file() and not is_weights(file.name) and file.name not in left_out and file.suffix not in PICKLES
    }
