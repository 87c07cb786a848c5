"""The demonstration, step by step; each step writes its result, so running it again skips what is done.

train/             the training run, as `kimi-linear train` leaves it
samples.json       continuations of the prompts
speed.json         training with and without the native kernels
decode.json        cache bytes and decode time against context, hybrid and full attention
results.json       everything the report shows
report.html, *.png
"""

import dataclasses
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kimi_linear.base.config import read_json
from kimi_linear.base.files import atomic_file
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.evaluation.decode_cost import measure_decode
from kimi_linear.inference.params import SamplingParams
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.ops.native import why_unavailable
from kimi_linear.recipes.demo import plots, report, speed
from kimi_linear.recipes.train import DataConfig, EvalConfig, RunConfig, RunResult, train
from kimi_linear.training.callbacks.jsonl import read_metrics
from kimi_linear.training.data import TextSource, Tokenizer, compressed_bits_per_byte
from kimi_linear.training.loop import TrainConfig
from kimi_linear.training.optim import OptimConfig
from kimi_linear.training.schedule import ScheduleConfig

Report = Callable[[str], None]

PROMPTS = (
    "The people of the United States",
    "My fellow citizens, the state of our Union",
    "I recommend to Congress that",
)
SAMPLING: dict[str, Any] = {"max_new_tokens": 120, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demonstration does.

    Args:
        directory: Where everything goes.
        minutes: Training time.
        model: Preset of the hybrid; `<model>-mla` is the full-attention model it is compared with.
        compare_seconds: Training time with, and again without, the native kernels.
        contexts: Context lengths of the decode comparison.
        seed: Of weights, data order and samples.
    """

    directory: str = "runs/demo"
    minutes: float = 3.0
    model: str = "demo"
    compare_seconds: float = 30.0
    contexts: tuple[int, ...] = CONTEXTS
    seed: int = 0


def demo(config: DemoConfig, *, say: Report = print) -> Path:
    """Run every step that is not done yet and return the path of the report.

    Args:
        config: What to do.
        say: Takes one line of progress.

    Raises:
        KimiLinearError: As `kimi_linear.recipes.train.train`.
    """
    directory = Path(config.directory)
    say(f"[1/5] training for {config.minutes:g} minutes on the presidential addresses that ship with the package")
    result = train(training_run(config), report=say)
    if result.status != "finished":
        return directory
    say("[2/5] generating")
    samples = _cached(directory / "samples.json", _key(config, result), lambda: _samples(config, result))
    say("[3/5] measuring cache and decode time against context")
    decode = _cached(directory / "decode.json", _key(config, result), lambda: _decode(config, result))
    say(f"[4/5] training for {config.compare_seconds:g} seconds with the native kernels and as long without them")
    trained = _cached(
        directory / "speed.json",
        _key(config, result),
        lambda: speed.compare(result.run_dir, config.compare_seconds),
    )
    say("[5/5] writing the report")
    results = _results(config, result, samples, decode, trained)
    _write_json(directory / "results.json", results)
    _draw(directory, result, results)
    report.write_report(directory / "report.html", results)
    for line in summary(results):
        say(line)
    return directory / "report.html"


def training_run(config: DemoConfig) -> RunConfig:
    """Return the training run of the demonstration."""
    return RunConfig(
        run_dir=str(Path(config.directory) / "train"),
        model=config.model,
        data=DataConfig(seq_len=256, batch_size=16),
        evaluation=EvalConfig(batches=8),
        train=TrainConfig(max_minutes=config.minutes, eval_every=100, checkpoint_minutes=1.0),
        optim=OptimConfig(name="muon", learning_rate=1e-2),
        schedule=ScheduleConfig(name="wsd", warmup=0.03, decay=0.5, final=0.05),
        seed=config.seed,
    )


def summary(results: dict[str, Any]) -> list[str]:
    """Return the essentials as lines for a terminal."""
    quality, train_result, decode = results["quality"], results["train"], results["decode"]
    compressors = ", ".join(f"{name} {value:.2f}" for name, value in quality["compressors"].items())
    lines = [
        "",
        f"trained     {train_result['tokens']:,} tokens in {train_result['seconds'] / 60:.1f} min, "
        f"{train_result['tokens_per_second']:,.0f} tokens/s",
        f"kernels     {report.speed_sentence(results['speed'])}",
        f"held out    {quality['bits_per_byte']:.3f} bits a byte ({compressors})",
        "",
        f"{'context':>9}  {'cache: hybrid':>14}  {'full':>10}  {'ratio':>6}  {'ms/token: hybrid':>17}  "
        f"{'full':>8}  {'ratio':>6}",
    ]
    for context, ours, full, ratio, ours_ms, full_ms, time_ratio in report.decode_rows(decode):
        lines.append(f"{context:>9}  {ours:>14}  {full:>10}  {ratio:>6}  {ours_ms:>17}  {full_ms:>8}  {time_ratio:>6}")
    for sample in results["samples"][:1]:
        lines += ["", f"{sample['prompt']}{sample['continuation']}"]
    return lines


def _samples(config: DemoConfig, result: RunResult) -> list[dict[str, str]]:
    model = _served(load_model(result.model_dir))
    tokenizer = Tokenizer.load(result.run_dir)
    samples = []
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(prompt)]])
        output = model.generate(ids, SamplingParams(**SAMPLING, seed=config.seed + number))
        text = tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special=True)
        samples.append({"prompt": prompt, "continuation": text})
    return samples


def _decode(config: DemoConfig, result: RunResult) -> dict[str, Any]:
    """Measure the trained hybrid and a fresh full-attention model: what a step costs does not depend on the weights."""
    hybrid = _served(load_model(result.model_dir))
    full = _served(KimiLinearForCausalLM(_full_attention(config, hybrid)).eval())
    contexts = list(config.contexts)
    readings = {"hybrid": measure_decode(hybrid, contexts), "full_attention": measure_decode(full, contexts)}
    return {name: [dataclasses.asdict(reading) for reading in costs] for name, costs in readings.items()}


def _served(model: KimiLinearForCausalLM) -> KimiLinearForCausalLM:
    """Return the model with its weights packed for inference, where there are native kernels."""
    return model if why_unavailable() else model.prepare_for_inference("float32")


def _full_attention(config: DemoConfig, hybrid: KimiLinearForCausalLM) -> Any:
    """Return the configuration of the same shape with latent attention everywhere."""
    return dataclasses.replace(preset(f"{config.model}-mla"), vocab_size=hybrid.config.vocab_size)


def _results(
    config: DemoConfig, result: RunResult, samples: Any, decode: Any, trained: dict[str, Any]
) -> dict[str, Any]:
    network = preset(config.model)
    held_out = "".join(TextSource("sotu", "validation")).encode()
    names = " ".join(network.layers)
    return {
        "model": {
            "parameters": network.parameters(),
            "active_parameters": network.active_parameters(),
            "description": f"{len(network.layers)} layers ({names}), width {network.hidden_size}.",
        },
        "full_attention": {"parameters": preset(f"{config.model}-mla").parameters()},
        "train": {
            "steps": result.step,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens / result.seconds,
            "precision": result.precision["name"],
        },
        "quality": {
            "bits_per_byte": result.metrics["bits_per_byte"],
            "bytes": len(held_out),
            "compressors": compressed_bits_per_byte(held_out),
        },
        "samples": samples,
        "speed": trained,
        "decode": decode,
        "machine": {"cpu": _cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


def _draw(directory: Path, result: RunResult, results: dict[str, Any]) -> None:
    metrics = read_metrics(Path(result.run_dir) / "metrics.jsonl")
    steps = [entry for entry in metrics if entry["kind"] == "step"]
    tokens_at = {entry["step"]: entry["tokens"] for entry in steps}
    evals = [(tokens_at[e["step"]], e["bits_per_byte"]) for e in metrics if e["kind"] == "eval"]
    plots.loss_curve(directory / "loss.png", [e["tokens"] for e in steps], [e["loss"] for e in steps], evals)
    quality = results["quality"]
    bars = {"this model": quality["bits_per_byte"], **quality["compressors"]}
    plots.bars(directory / "bits_per_byte.png", bars, "bits a byte of held-out text (less is better)")
    decode = results["decode"]
    contexts = [reading["context"] for reading in decode["hybrid"]]
    names = {"hybrid": "hybrid, 3 KDA : 1 MLA", "full_attention": "full attention (MLA)"}
    caches = {names[key]: [r["cache_bytes"] / 2**20 for r in readings] for key, readings in decode.items()}
    times = {names[key]: [1e3 * r["seconds"] for r in readings] for key, readings in decode.items()}
    plots.lines(directory / "cache.png", contexts, caches, "context, tokens", "cache, MiB")
    plots.lines(directory / "decode.png", contexts, times, "context, tokens", "ms a token")


def _key(config: DemoConfig, result: RunResult) -> dict[str, Any]:
    """Return what a step's result depends on; where it lies is no part of it."""
    demo = {**dataclasses.asdict(config), "contexts": list(config.contexts)}
    del demo["directory"]
    return {"demo": demo, "tokens": result.tokens}


def _cached(path: Path, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """Return the result kept at `path` for this key, or compute and keep it."""
    if path.exists():
        kept = read_json(path)
        if kept.get("key") == key:
            return kept["value"]
    value = compute()
    _write_json(path, {"key": key, "value": value})
    return value


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _cpu() -> str:
    """Return the processor's name, and how many the machine has."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} processors"
