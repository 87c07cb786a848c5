"""Other engines behind the protocol of `recipes.compare`, and the names a user gives them by."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.recipes.compare import Engine, OurEngine, Trace, watching

# transformers' names for the kinds of layers.
_KINDS = {"linear_attention": "kda", "full_attention": "mla"}
# Tokens of which llama.cpp gives the probability: more than any vocabulary of this family.
_MOST_TOKENS = 1 << 18


class TransformersEngine:
    """transformers' own Kimi Linear, in float32 on the CPU.

    Args:
        path: A checkpoint directory of the released type, or a hub name in the local cache.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: It cannot load the checkpoint; says why.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import transformers
        except ImportError as error:
            raise _not_installed("transformers", "transformers") from error
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                os.fspath(path), dtype=torch.float32, local_files_only=True
            )
        except Exception as error:  # whatever a third party raises becomes one sentence
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"transformers cannot load {path}: {reason.rstrip('.')}.") from error
        self._model: Any = model.eval()
        self.name = f"transformers:{path}"
        self.vocab_size: int | None = model.config.vocab_size
        self.kinds = tuple(_KINDS.get(kind, kind) for kind in model.config.layer_types)
        self.directory: Path | None = Path(path) if Path(path).is_dir() else None

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        """Return the likeliest tokens behind a prompt, through its cache."""
        tokens, cache, found = torch.tensor([list(ids)]), None, list[int]()
        for _ in range(steps):
            output = self._model(tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(int(output.logits[0, -1].argmax()))
            tokens = torch.tensor([[found[-1]]])
        return found

    @torch.no_grad()
    def trace(self, ids: Sequence[int], last: int) -> Trace:
        """Run over a sequence."""
        decoder = self._model.model
        with watching(decoder.layers, decoder.norm) as stream:
            logits = self._model(torch.tensor([list(ids)]), use_cache=False).logits
        return Trace(logits[0, -last:], stream=stream)


class LlamaCppEngine:
    """llama.cpp through xllamacpp: probabilities of next tokens only, computed with a float16 cache.

    Args:
        path: A GGUF file.

    Raises:
        ConfigError: xllamacpp is not installed.
        CheckpointError: There is no such file, or it cannot be loaded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file():
            raise CheckpointError(f"{path} is not a file, expected a GGUF file for llama.cpp.")
        try:
            import xllamacpp
        except ImportError as error:
            raise _not_installed("xllamacpp", "peers") from error
        params = xllamacpp.CommonParams()
        params.model.path = os.fspath(path)
        params.n_ctx, params.n_parallel, params.verbosity = 8192, 1, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise CheckpointError(f"llama.cpp cannot load {path}: {str(error).rstrip('.')}.") from error
        self.name = f"llama.cpp:{path}"
        self.vocab_size: int | None = None
        self.kinds: tuple[str, ...] = ()
        self.directory: Path | None = None

    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        """Return the likeliest tokens behind a prompt; each is asked for on its own."""
        found = list(ids)
        for _ in range(steps):
            found.append(int(self._next(found).argmax()))
        return found[len(ids) :]

    def trace(self, ids: Sequence[int], last: int) -> Trace:
        """Return the probabilities behind the last positions; each is asked for on its own."""
        rows = [self._next(ids[:end]) for end in range(len(ids) - last + 1, len(ids) + 1)]
        width = max(len(row) for row in rows)
        padded = [torch.nn.functional.pad(row, (0, width - len(row)), value=-torch.inf) for row in rows]
        return Trace(torch.stack(padded), normalised=True)

    def _next(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the log-probability of every token behind a sequence."""
        # Half a character as the token that is picked would be answered without probabilities; they are those before
        # the bias.
        request = {"prompt": list(ids), "n_predict": 1, "temperature": 0.0, "logit_bias": [["a", 1e3]]}
        reply = self._server.handle_completions({**request, "cache_prompt": False, "logprobs": _MOST_TOKENS})
        if "choices" not in reply or not reply["choices"][0]["logprobs"]:
            raise ConfigError(f"llama.cpp gives no probabilities behind this prompt: {str(reply)[:120]}.")
        best = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        row = torch.full((max(entry["id"] for entry in best) + 1,), -torch.inf, dtype=torch.float64)
        row[[entry["id"] for entry in best]] = torch.tensor([entry["logprob"] for entry in best], dtype=torch.float64)
        return row


def _not_installed(package: str, extra: str) -> ConfigError:
    return ConfigError(f"{package} is not installed; pip install 'kimi-linear[{extra}]'.")


_ENGINES: dict[str, Callable[[str], Engine]] = {
    "ours": OurEngine,
    "reference": lambda path: OurEngine(path, "float64", "reference"),
    "transformers": TransformersEngine,
    "llama.cpp": LlamaCppEngine,
}


def open_engine(spec: str) -> Engine:
    """Return the engine that a text such as "transformers:runs/model" names; a plain path is this package's.

    Raises:
        ConfigError: The engine is not installed.
        CheckpointError: It cannot load what it was given.
    """
    kind, separator, path = spec.partition(":")
    if separator and kind in _ENGINES:
        if not path:
            raise ConfigError(f"{spec!r} names no checkpoint; give {kind}:PATH.")
        return _ENGINES[kind](path)
    return OurEngine(spec)
