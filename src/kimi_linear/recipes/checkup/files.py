"""Checks of the weight files: whole, named as usual, and as the index says."""

import re
from collections.abc import Iterator

from kimi_linear.checkpoint.reader import PICKLES, list_names
from kimi_linear.checkpoint.writer import INDEX_NAME, SINGLE_NAME
from kimi_linear.recipes.checkup.evidence import Evidence
from kimi_linear.recipes.checkup.finding import ALL, LLAMA, OURS, SGLANG, TRANSFORMERS, VLLM, Finding

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def shards(evidence: Evidence) -> Iterator[Finding]:
    """Name damaged, misaligned and oddly named files, missing numbers, and pickle files."""
    for shard in evidence.shards:
        if shard.problem:
            yield Finding("files", "error", shard.problem, ALL, "download it again")
        if shard.misaligned:
            text = (
                f"{shard.path.name}: {len(shard.misaligned)} tensors do not start at a multiple of their element's "
                f"size, the first {min(shard.misaligned)}; what maps the file has to copy them."
            )
            yield Finding("files", "warning", text, ALL, "write the file anew", fixable=True)
    names = [shard.path.name for shard in evidence.shards]
    odd = [name for name in names if name != SINGLE_NAME and not _SHARD.fullmatch(name)]
    if odd:
        text = f"files are not named as usual ({list_names(odd)}); llama.cpp's converter looks for model*.safetensors."
        yield Finding("files", "warning", text, (LLAMA,), "write them under the usual names", fixable=True)
    numbers = [match for match in map(_SHARD.fullmatch, names) if match]
    absent = [
        f"model-{n:05d}-of-{total}.safetensors"
        for total in sorted({match[2] for match in numbers})
        for n in range(1, min(int(total), 10_000) + 1)
        if f"model-{n:05d}-of-{total}.safetensors" not in names
    ]
    if absent:
        yield Finding("files", "error", f"shards are missing: {list_names(absent)}.", ALL, "download them")
    pickles = sorted(path.name for path in evidence.directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        text = f"pickle files lie beside the weights ({list_names(pickles)}); they can run code when they are loaded."
        yield Finding("files", "warning", text, (TRANSFORMERS, VLLM, SGLANG), "remove them", fixable=True)
    if not evidence.shards and not pickles:
        yield Finding("files", "error", "there is no safetensors file.", ALL, "download the weights")


def index(evidence: Evidence) -> Iterator[Finding]:
    """See whether there is an index where one is needed, and whether it names what is there."""
    names = {shard.path.name for shard in evidence.shards}
    if evidence.index is None:
        if evidence.index_problem:
            yield Finding("index", "error", evidence.index_problem, ALL, "write it anew", fixable=True)
        elif names and names != {SINGLE_NAME}:
            text = f"{len(names)} weight files and no {INDEX_NAME}."
            yield Finding("index", "error", text, (OURS, TRANSFORMERS), "write the index", fixable=True)
        return
    if SINGLE_NAME in names:
        text = f"{SINGLE_NAME} and {INDEX_NAME} are both there: some engines read the one, some the other."
        yield Finding("index", "error", text, ALL, "write one set of files", fixable=True)
    absent = sorted(set(evidence.weight_map.values()) - names)
    if absent:
        yield Finding("index", "error", f"the index names missing files: {list_names(absent)}.", ALL, "download them")
    yield from _disagreements(evidence, set(absent))
    total = evidence.index.get("metadata")
    size = total.get("total_size") if isinstance(total, dict) else None
    actual = sum(tensor.nbytes for tensor in evidence.stored.values())
    if size != actual and not absent:
        text = f"the index says total_size {size}, the tensors have {actual} bytes."
        yield Finding("index", "warning", text, (TRANSFORMERS,), "write the index anew", fixable=True)


def _disagreements(evidence: Evidence, absent: set[str]) -> Iterator[Finding]:
    where = evidence.weight_map
    held = {name: {shard.path.name for shard in evidence.shards if name in shard.tensors} for name in evidence.stored}
    unlisted = held.keys() - where.keys()
    wrong = [name for name, file in where.items() if file not in absent and file not in held.get(name, ())]
    for names, what in ((unlisted, "does not name"), (wrong, "looks in the wrong file for")):
        if names:
            text = f"the index {what} {len(names)} tensors ({list_names(names)})."
            yield Finding("index", "error", text, (OURS, TRANSFORMERS), "write the index anew", fixable=True)
