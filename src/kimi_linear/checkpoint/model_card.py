"""README.md of a checkpoint: what the configuration and the tensors say of the model, and how to load it.

Nothing is claimed that cannot be computed: no training data, no scores.
"""

import json
from collections import Counter
from typing import Any

from kimi_linear.checkpoint.configs import OWN_TYPE
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.keys import ITEMSIZE, release_bytes
from kimi_linear.nn.component import ComponentConfig

CARD_NAME = "README.md"

_MIXERS = {
    "kda": "Kimi Delta Attention",
    "mla": "multi-head latent attention",
    "gdn": "Gated DeltaNet",
    "gqa": "grouped-query attention",
}
_PATH = "path/to/this/model"
_CONTEXTS = (1024, 32768, 131072, 1048576)


def model_card(
    config: KimiLinearConfig,
    dtype: str = "bfloat16",
    *,
    model_type: str = "kimi_linear",
    license: str | None = None,
    base_model: str | None = None,
) -> str:
    """Return the text of a model card.

    Args:
        config: The network.
        dtype: Of the stored weights.
        model_type: As config.json has it; decides which engines the card names.
        license: Identifier of the weights' licence, "mit" for instance; left out if unknown.
        base_model: What the model was made from, a hub name; left out if unknown.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> print(model_card(preset("48b-a3b"), license="mit").splitlines()[1])
        library_name: "transformers"
    """
    parts = [_front_matter(config, model_type, license, base_model), _title(config), *_tables(config, dtype)]
    return "\n\n".join([*parts, *_loading(model_type, dtype)]) + "\n"


def _front_matter(config: KimiLinearConfig, model_type: str, license: str | None, base_model: str | None) -> str:
    tags = ["kimi_linear", "linear-attention"]
    if any(block.ffn.kind == "moe" for block in config.layer_blocks):
        tags.append("mixture-of-experts")
    fields: dict[str, Any] = {
        "library_name": "kimi_linear" if model_type == OWN_TYPE else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
        "license": license,
        "base_model": base_model,
    }
    # JSON values are YAML values, whatever characters they hold.
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _title(config: KimiLinearConfig) -> str:
    return f"# A Kimi Linear model of {config.parameters():,} parameters"


def _tables(config: KimiLinearConfig, dtype: str) -> list[str]:
    mixers = Counter(block.mixer.kind for block in config.layer_blocks)
    dense = sum(block.ffn.kind == "swiglu" for block in config.layer_blocks)
    rows = {
        "layers": f"{config.num_layers}: "
        + ", ".join(f"{count} {_MIXERS.get(kind, kind)}" for kind, count in mixers.items()),
        "width": f"{config.hidden_size:,}",
        "vocabulary": f"{config.vocab_size:,}, {'tied' if config.tie_embeddings else 'separate'} output head",
        "context length": f"{config.max_length:,}",
        "parameters": f"{config.parameters():,}",
        "active per token": f"{config.active_parameters():,} (with the output head, without the embedding)",
        "weights": f"{release_bytes(config, dtype):,} bytes in {dtype}",
        "dense feed-forward layers": f"{dense}",
    }
    parts = dict.fromkeys(part for block in config.layer_blocks for part in (block.mixer, block.ffn))
    rows |= {f"`{part.kind}`": _sizes(part) for part in parts}
    contexts = sorted({n for n in _CONTEXTS if n < config.max_length} | {config.max_length})
    bytes_at = {f"{n:,}": f"{config.state_bytes(n, ITEMSIZE[dtype]):,}" for n in contexts}
    return [
        "## Network",
        _table("", "", rows),
        f"## Memory of one sequence\n\nThe recurrent states are float32, the rest is {dtype}.",
        _table("tokens", "bytes", bytes_at),
    ]


def _sizes(part: ComponentConfig) -> str:
    fields = {key: value for key, value in part.to_dict().items() if key != "kind" and value is not None}
    return ", ".join(f"{key} {value}" for key, value in fields.items())


def _table(left: str, right: str, rows: dict[str, str]) -> str:
    return "\n".join(
        [f"| {left} | {right} |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    )


def _loading(model_type: str, dtype: str) -> list[str]:
    ours = _python("from kimi_linear import KimiLinearForCausalLM", f'KimiLinearForCausalLM.from_pretrained("{_PATH}")')
    if model_type == OWN_TYPE:
        return ["## Loading", f"The model type is `{OWN_TYPE}`: the released type cannot hold this network.", ours]
    theirs = _python(
        "from transformers import AutoModelForCausalLM",
        f'AutoModelForCausalLM.from_pretrained("{_PATH}", dtype="{dtype}")',
    )
    return [
        "## Loading",
        "The names, shapes and config.json are those of the released checkpoints, so no engine needs remote code.",
        ours,
        f"With transformers 5.17 or newer:\n\n{theirs}",
        f"With vLLM:\n\n```bash\nvllm serve {_PATH}\n```",
        f"For llama.cpp, as a GGUF file:\n\n```bash\nkimi-linear export {_PATH} --format gguf\n```",
    ]


def _python(*lines: str) -> str:
    *imports, call = lines
    return "\n".join(["```python", *imports, "", f"model = {call}", "```"])
