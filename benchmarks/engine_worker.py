"""A process that holds one engine with one model and does what it is told: read a prompt, generate, train.

The engines: "kimi-linear" (ours), "transformers", "llama.cpp" (built for this processor by llama-cpp-python) and
"xllamacpp" (llama.cpp as its portable wheel ships it). Each is imported only where it was asked for.
"""

import ctypes
import time
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

import serving

GGUF = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
# llama.cpp's defaults: tokens of a call, and tokens of one pass through the network inside it.
BATCH, MICRO_BATCH = 2048, 512


def prompt(tokens: int, vocab_size: int) -> list[int]:
    """Return the token ids every engine reads; the same as `kimi_linear.recipes.bench.engine.prompt`."""
    return [n * 7919 % (vocab_size - 1) for n in range(tokens)]


class Engine(Protocol):
    """What an engine can do; each method returns the seconds of what counts."""

    version: str

    def prefill(self, tokens: int) -> float:
        """Read a prompt into a fresh cache, until the logits of its last token."""

    def decode(self, tokens: int, steps: int) -> float:
        """Generate greedily behind a prompt; without the time of the prompt."""

    def train(self, batch: int, tokens: int, precision: str) -> float:
        """Take the gradients of a loss."""

    def logits(self, tokens: int) -> np.ndarray:
        """Return what the engine says about the logits of a prompt."""


def ours(given: dict[str, Any]) -> Engine:
    """Return our engine."""
    import torch

    import kimi_linear
    from kimi_linear.recipes.bench.engine import Engine as Ours

    torch.set_num_threads(given["threads"])

    class Adapter(Ours):
        version = kimi_linear.__version__

        def logits(self, tokens: int) -> np.ndarray:
            return super().logits(tokens).numpy()

    return Adapter.load(given["checkpoint"], given["weights"])


class Transformers:
    """The network of the transformers library."""

    def __init__(self, given: dict[str, Any]) -> None:
        serving.hide_fla()
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(given["threads"])
        self.torch, self.version = torch, version("transformers")
        dtype = getattr(torch, given["weights"] or "float32")
        self.model = AutoModelForCausalLM.from_pretrained(given["checkpoint"], dtype=dtype)
        self.vocab_size = self.model.config.vocab_size

    def _ids(self, tokens: int) -> Any:
        return self.torch.tensor([prompt(tokens, self.vocab_size)])

    def prefill(self, tokens: int) -> float:
        """Read a prompt."""
        ids = self._ids(tokens)
        with self.torch.inference_mode():
            started = time.perf_counter()
            self.model(ids, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - started

    def decode(self, tokens: int, steps: int) -> float:
        """Generate greedily behind a prompt."""
        with self.torch.inference_mode():
            out = self.model(self._ids(tokens), use_cache=True, logits_to_keep=1)
            started = time.perf_counter()
            for _ in range(steps):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            return time.perf_counter() - started

    def train(self, batch: int, tokens: int, precision: str) -> float:
        """Take gradients of the loss."""
        ids = self._ids(tokens).expand(batch, -1)
        self.model.train()
        started = time.perf_counter()
        with self.torch.autocast("cpu", dtype=self.torch.bfloat16, enabled=precision == "bf16"):
            loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        taken = time.perf_counter() - started
        self.model.zero_grad(set_to_none=True)
        return taken

    def logits(self, tokens: int) -> np.ndarray:
        """Return the logits [T, V] of a prompt."""
        with self.torch.inference_mode():
            return self.model(self._ids(tokens)).logits[0].float().numpy()


class LlamaCpp:
    """llama.cpp through its C interface."""

    def __init__(self, given: dict[str, Any]) -> None:
        import llama_cpp

        self.api, self.version = llama_cpp, f"llama-cpp-python {version('llama-cpp-python')}"
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        path = f"{given['gguf']}-{GGUF[given['weights']]}.gguf"
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise OSError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = given["context"], BATCH, MICRO_BATCH
        params.n_threads = params.n_threads_batch = given["threads"]
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.about = llama_cpp.llama_print_system_info().decode()

    def _read(self, ids: list[int]) -> None:
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            tokens = (self.api.llama_token * len(part))(*part)
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(part))) != 0:
                raise RuntimeError("llama_decode failed")

    def _last(self) -> np.ndarray:
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,))

    def _begin(self, tokens: int) -> list[int]:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return prompt(tokens, self.vocab_size)

    def prefill(self, tokens: int) -> float:
        """Read a prompt."""
        ids = self._begin(tokens)
        started = time.perf_counter()
        self._read(ids)
        self._last()
        return time.perf_counter() - started

    def decode(self, tokens: int, steps: int) -> float:
        """Generate greedily behind a prompt."""
        self._read(self._begin(tokens))
        started = time.perf_counter()
        for _ in range(steps):
            self._read([int(self._last().argmax())])
        self._last()
        return time.perf_counter() - started

    def train(self, batch: int, tokens: int, precision: str) -> float:
        """Refuse."""
        raise NotImplementedError("llama.cpp does not train this network")

    def logits(self, tokens: int) -> np.ndarray:
        """Return the logits [T, V] of a prompt: of its first half read at once, and of the rest token by token."""
        ids = self._begin(tokens)
        rows = []
        for end in (tokens // 2, *range(tokens // 2 + 1, tokens + 1)):
            self._read(ids[len(rows) and end - 1 : end])
            rows.append(self._last().copy())
        # The positions that were read at once but the last are not asked for.
        return np.stack(rows)


class XLlamaCpp:
    """llama.cpp through the server of xllamacpp, with the times it reports."""

    def __init__(self, given: dict[str, Any]) -> None:
        import xllamacpp

        self.version = f"xllamacpp {version('xllamacpp')}"
        params = xllamacpp.CommonParams()
        params.model.path = f"{given['gguf']}-{GGUF[given['weights']]}.gguf"
        params.n_ctx, params.n_batch, params.n_ubatch = given["context"], BATCH, MICRO_BATCH
        params.n_parallel, params.verbosity, params.cache_ram_mib = 1, -1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
        self.server = xllamacpp.Server(params)
        self.vocab_size = given["vocab_size"]
        self.about = xllamacpp.get_system_info()

    def _complete(self, tokens: int, steps: int) -> dict[str, Any]:
        request = {"prompt": prompt(tokens, self.vocab_size), "n_predict": steps, "temperature": 0.0}
        reply = self.server.handle_completions({**request, "ignore_eos": True, "cache_prompt": False, "logprobs": 5})
        if "timings" not in reply:
            raise RuntimeError(f"xllamacpp answered {str(reply)[:120]}")
        return reply

    def prefill(self, tokens: int) -> float:
        """Read a prompt."""
        return 1e-3 * self._complete(tokens, 1)["timings"]["prompt_ms"]

    def decode(self, tokens: int, steps: int) -> float:
        """Generate greedily behind a prompt."""
        return 1e-3 * self._complete(tokens, steps)["timings"]["predicted_ms"]

    def train(self, batch: int, tokens: int, precision: str) -> float:
        """Refuse."""
        raise NotImplementedError("llama.cpp does not train this network")

    def logits(self, tokens: int) -> np.ndarray:
        """Return token and log probability of the five likeliest next tokens behind a prompt, [5, 2]."""
        best = self._complete(tokens, 1)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return np.array([[entry["id"], entry["logprob"]] for entry in best])


ENGINES = {"kimi-linear": ours, "transformers": Transformers, "llama.cpp": LlamaCpp, "xllamacpp": XLlamaCpp}


def training_peak(engine: Engine, batch: int, tokens: int, precision: str) -> int:
    """Return the bytes that a training step adds at its peak."""
    engine.train(1, 64, precision)
    serving.forget_peak()
    before = serving.resident()
    engine.train(batch, tokens, precision)
    return serving.resident("VmHWM") - before


def start(given: dict[str, Any]) -> tuple[serving.Handler, dict[str, Any]]:
    """Return the handler of an engine, and what to say about it."""
    engine = ENGINES[given["engine"]](given)

    def handle(request: dict[str, Any]) -> Any:
        arguments = {name: value for name, value in request.items() if name not in ("do", "path")}
        match request["do"]:
            case "prefill" | "decode" | "train":
                return getattr(engine, request["do"])(**arguments)
            case "logits":
                return np.save(request["path"], engine.logits(**arguments))
            case "training_peak":
                return training_peak(engine, **arguments)
        raise ValueError(f"unknown command {request['do']!r}")

    return handle, {"version": engine.version, "about": getattr(engine, "about", "")}


if __name__ == "__main__":
    serving.serve(start)
