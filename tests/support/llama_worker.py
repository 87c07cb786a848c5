"""A process that asks llama.cpp, so that its threads, its log and its end stay out of the tests' own.

Reads a list of requests from standard input as JSON, writes the list of replies. A request is a GGUF file, a prompt of
token ids, a number of tokens to generate, and whether attention and its cache are in float32 instead of 16 bits.
"""

import json
import sys
from typing import Any


def ask(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the greedy tokens: each with its id and the likeliest ids and their log probabilities."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx = params.n_batch = params.n_ubatch = 128
    params.n_parallel, params.verbosity, params.cache_ram_mib, params.warmup = 1, -1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if request["float32"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    reply = xllamacpp.Server(params).handle_completions(
        {"prompt": request["prompt"], "n_predict": request["tokens"], "temperature": 0.0, "ignore_eos": True}
        | {"cache_prompt": False, "logprobs": 5}
    )
    # Tokens that are a part of a character only are left out of the reply.
    entries = (reply["choices"][0]["logprobs"] or {"content": []})["content"]
    return [
        {"id": entry["id"], "top": [[best["id"], best["logprob"]] for best in entry["top_logprobs"]]}
        for entry in entries
    ]


if __name__ == "__main__":
    json.dump([ask(request) for request in json.load(sys.stdin)], sys.stdout)
