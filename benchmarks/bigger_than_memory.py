"""Generate with a model that is several times larger than the memory the process may map.

    python benchmarks/bigger_than_memory.py --limit 2.5GiB

Writes random bfloat16 weights in the widths of the released 48B model (a dense layer and MoE layers with all 256
experts, the last of them with latent attention), shard by shard, into a temporary directory; it takes 13 GB there and
is removed. Then a process whose address space is limited (RLIMIT_AS, as `ulimit -v` sets it) generates from it, and
says what it held beside what was promised. --small is a narrow model, whose process may map a third of the file beside
what the interpreter maps already: torch alone maps more than a small file.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving import limit_memory, resident

LAYERS = ("kda_dense", "kda", "kda", "mla")


def slice_config(small: bool) -> Any:
    """Return the first layers of the released model, or the same narrow."""
    from kimi_linear.models.kimi_linear.presets import preset
    from kimi_linear.nn.config import BlockConfig
    from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
    from kimi_linear.nn.mixers import KDAConfig, MLAConfig

    released = preset("48b-a3b")
    by_kind = {(type(b.mixer), type(b.ffn)): b for b in released.layer_blocks}
    names = {(KDAConfig, SwiGLUConfig): "kda_dense", (KDAConfig, MoEConfig): "kda", (MLAConfig, MoEConfig): "mla"}
    blocks = {name: by_kind[kinds] for kinds, name in names.items()}
    if not small:
        return dataclasses.replace(released, blocks=blocks, layers=LAYERS)
    mixers = {
        KDAConfig: KDAConfig(num_heads=4, head_dim=64),
        MLAConfig: MLAConfig(num_heads=4, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
    }
    for name, block in blocks.items():
        width = {"intermediate_size": 1024 if name == "kda_dense" else 160}
        blocks[name] = BlockConfig(mixer=mixers[type(block.mixer)], ffn=dataclasses.replace(block.ffn, **width))
    sizes = {"hidden_size": 512, "vocab_size": 16384, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return dataclasses.replace(released, blocks=blocks, layers=LAYERS, **sizes)


def draw(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return random values of the size that a trained tensor of the name has."""
    import torch

    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    if name.endswith(("A_log", "dt_bias")):
        return torch.empty(shape, dtype=torch.float32).uniform_(-4, 1)
    # Rows that keep the size of what they multiply; selection biases that are small beside the scores.
    scale = 0.01 if len(shape) == 1 else 1.0 if "embed_tokens" in name else shape[-1] ** -0.5
    return torch.randn(shape).mul_(scale).to(dtype)


def write_checkpoint(directory: Path, config: Any, shard_bytes: int = 10**9) -> None:
    """Write random weights, holding one shard at a time."""
    import torch

    from kimi_linear.checkpoint.configs import CONFIG_NAME, model_json
    from kimi_linear.checkpoint.writer import INDEX_NAME, split_shards, write_shard
    from kimi_linear.models.kimi_linear.keys import release_tensors

    empty = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in release_tensors(config).items()
    }
    shards = split_shards(empty, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / file, {name: draw(name, tuple(x.shape), x.dtype) for name, x in shard.items()})
        weight_map.update(dict.fromkeys(shard, file))
        print(f"wrote {file}", file=sys.stderr)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / CONFIG_NAME).write_text(json.dumps(model_json(config, "bfloat16")))


def child(given: dict[str, Any]) -> dict[str, Any]:
    """Limit this process, generate, and return what it took."""
    if given["limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (given["limit"], given["limit"]))
    import torch

    from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
    from kimi_linear.models.kimi_linear.presets import preset

    torch.set_num_threads(given["threads"])
    baseline = resident()
    if given["extra"]:
        # What the first model loads, of whatever size, is larger than a narrow one.
        KimiLinearForCausalLM(preset("tiny")).generate([[1, 2]], max_new_tokens=2)
        limit_memory(given["extra"])
    model = load_model(given["directory"], stream_weights=True)
    streamed = model.streamed
    assert streamed is not None
    prompt = torch.randint(2, model.config.vocab_size, (1, given["prompt"]), generator=torch.Generator().manual_seed(1))
    times, reads = [time.perf_counter()], [0]
    for _ in model.stream(prompt, max_new_tokens=given["tokens"], temperature=0.0, stop_token_ids=()):
        times.append(time.perf_counter())
        reads.append(streamed.bytes_read)
    return {
        "limit": resource.getrlimit(resource.RLIMIT_AS)[0],
        "baseline": baseline,
        "bound": streamed.resident_bound(rows=1, tokens=given["prompt"], context=given["prompt"] + given["tokens"]),
        "peak_resident": resident("VmHWM"),
        "peak_mapped": resident("VmPeak"),
        "stored": streamed.stored_bytes,
        "prefill_seconds": times[1] - times[0],
        "prefill_bytes": reads[1],
        "token_seconds": (times[-1] - times[1]) / (len(times) - 2),
        "token_bytes": (reads[-1] - reads[1]) // (len(reads) - 2),
    }


def report(found: dict[str, Any], gigabytes_per_second: float) -> list[str]:
    """Return the lines to print."""
    rate = 1e-9 * found["token_bytes"] / found["token_seconds"]
    memory = f"memory's {gigabytes_per_second:.1f}"
    added = found["peak_resident"] - found["baseline"]
    times = found["stored"] / found["limit"]
    kept = "kept" if added <= found["bound"] else "BROKEN"

    def gib(count: float) -> str:
        return f"{count / 2**30:.3f} GiB"

    return [
        f"weights in files         {gib(found['stored'])}",
        f"limit on address space   {gib(found['limit'])}; the weights are {times:.2f} times that",
        f"address space, peak      {gib(found['peak_mapped'])}",
        f"resident set, before     {gib(found['baseline'])}: the interpreter with torch",
        f"resident set, peak       {gib(found['peak_resident'])}, so {gib(added)} were added",
        f"promised bound on that   {gib(found['bound'])}: {kept}",
        f"prompt                   {found['prefill_seconds']:.2f} s, {gib(found['prefill_bytes'])} read",
        f"each further token       {found['token_seconds']:.3f} s, {gib(found['token_bytes'])} read",
        f"reading                  {rate:.1f} GB/s, {rate / gigabytes_per_second:.0%} of {memory}",
    ]


def run_child(directory: Path, options: argparse.Namespace, **limits: int) -> dict[str, Any]:
    given = {
        "directory": str(directory),
        "threads": options.threads,
        "prompt": options.prompt,
        "tokens": options.tokens,
    }
    command = [sys.executable, __file__, "--child", json.dumps({**given, "limit": 0, "extra": 0, **limits})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def forget_pages(directory: Path) -> None:
    """Drop the files from the page cache, so that the first read of each byte is the disk's."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--limit", default="2.5GiB", help="of the address space; not with --small")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--cold", action="store_true", help="begin with none of the file in the page cache")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the files go for the time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return 0
    import torch

    from kimi_linear.checkpoint.writer import parse_size
    from kimi_linear.recipes.bench.ceilings import Memory

    torch.set_num_threads(options.threads)
    config = slice_config(options.small)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        directory = Path(name)
        write_checkpoint(directory, config)
        stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        limits = {"extra": stored // 3} if options.small else {"limit": parse_size(options.limit)}
        if options.cold:
            forget_pages(directory)
        found = run_child(directory, options, **limits)
    rate = Memory(2**26 if options.small else 2**28).read(0.1 if options.small else 0.5)
    print("\n".join(report(found, rate)))
    return 0 if found["peak_resident"] - found["baseline"] <= found["bound"] else 1


if __name__ == "__main__":
    sys.exit(main())
