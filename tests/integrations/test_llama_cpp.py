"""llama.cpp runs the GGUF files we write and says what our own model says.

llama.cpp has one number of heads for both kinds of attention and always renormalises expert weights, so the awkward
shapes are taken with those; and it takes the model's epsilon for the latent norm, so ours is built with that too.
llama.cpp picks greedily, and our model scores the very tokens it picked, so the two never part. Attention in float32
must agree to 1e-3 in every log probability of the five likeliest tokens, and in the likeliest token at every step. In
16 bits, its default, the same holds to 0.05, except where rounding tips a near-tie between experts: two shapes with
many expert layers are left out there.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint.gguf.export import export_gguf
from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.mixers import KDAConfig
from kimi_linear.text.tokenizer import Tokenizer
from support import awkward
from support.awkward import AWKWARD, build, prompt, with_latent_norm_eps
from support.engines import STEPS, computing_as, for_llama
from support.released_text import released_tokenizer, write_release

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'kimi-linear[peers]'")
pytest.importorskip("gguf", reason="gguf is not installed: pip install 'kimi-linear[gguf]'")

WORKER = Path(__file__).parents[1] / "support" / "llama_worker.py"
TIPS = ("two-dense", "released-order")
_KDA, _MLA = KDAConfig(num_heads=2, head_dim=32), AWKWARD["wide-keys"].blocks["M"].mixer
# No experts; and rows of whole blocks of 32 everywhere, with every expert chosen so that rounding tips no choice.
DENSE = build(
    *(_KDA, replace(_MLA, num_heads=2), MoEConfig(num_experts=1, top_k=1, intermediate_size=1), 96, "kmk"),
    vocab_size=131,
    hidden_size=64,
)
BLOCKS = build(
    *(_KDA, replace(_MLA, num_heads=2), MoEConfig(num_experts=4, top_k=4, intermediate_size=64), 96, "kMK"),
    vocab_size=131,
    hidden_size=64,
)

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the band plays on.",
    "  it's 12345 o'clock -- isn't it?\n\n\tdef f(x):\n        return x ** 2\n",
    "Äpfel, 漢字かな交じり文 and 🙂🙂 emoji",
    "<|endoftext",
]


def agreeing(config: Any, directory: Path) -> KimiLinearForCausalLM:
    """Our model of a checkpoint in float32, with llama.cpp's epsilon for the latent norm."""
    return computing_as(with_latent_norm_eps(config, config.norm_eps), load_model(directory))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Our model and llama.cpp's answer by shape and way of computing; one process answers all."""
    folder = tmp_path_factory.mktemp("gguf")
    ways, models = {}, {}
    for name, shape in AWKWARD.items():
        config = for_llama(shape)
        awkward.lively_model(name, config).save_pretrained(folder / name)
        export_gguf(folder / name, folder / f"{name}.gguf", "f32")
        ours = agreeing(config, folder / name)
        for way in ("float32", "default"):
            ways[name, way], models[name, way] = folder / f"{name}.gguf", ours
    for name, config, types in (("dense", DENSE, ["f32"]), ("blocks", BLOCKS, ["bf16", "q8_0", "q4_0"])):
        awkward.lively_model("odd-heads", config).save_pretrained(folder / name)
        for type in types:
            path = folder / f"{name}-{type}.gguf"
            assert export_gguf(folder / name, path, type).widened == ()
            ways[name, type], models[name, type] = path, agreeing(config, path)
    kinds = ("trained", "released")
    for kind in kinds:
        write_texts(folder / kind)
    requests = [
        {"path": str(path), "prompt": ids(name), "tokens": STEPS + 1, "float32": way in ("float32", "f32")}
        for (name, way), path in ways.items()
    ]
    requests += [
        {"path": str(folder / f"{kind}.gguf"), "prompt": prompt, "tokens": 16, "float32": True}
        for kind in kinds
        for text in TEXTS
        for prompt in (text, Tokenizer.load(folder / kind).encode(text))
    ]
    done = subprocess.run([sys.executable, WORKER], input=json.dumps(requests), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    replies = json.loads(done.stdout)
    texts, pairs = replies[-4 * len(TEXTS) :], 2 * len(TEXTS)
    replies = [*replies[: -4 * len(TEXTS)], texts[:pairs], texts[pairs:]]
    for kind in kinds:
        models["texts", kind], ways["texts", kind] = None, None
    return {key: (models[key], reply) for key, reply in zip(ways, replies, strict=True)}


def write_texts(folder: Path) -> None:
    """A model with a tokenizer, trained here or of the released kind, as a checkpoint and as a GGUF file beside it."""
    if folder.name == "trained":
        tokenizer = Tokenizer.train(TEXTS * 3, vocab_size=320)
    else:
        tokenizer = released_tokenizer()
    model = awkward.lively_model("odd-heads", replace(BLOCKS, vocab_size=tokenizer.vocab_size, eos_token_id=None))
    model.save_pretrained(folder)
    if folder.name == "trained":
        tokenizer.save(folder)
    else:
        write_release(folder)
    assert export_gguf(folder, folder.with_suffix(".gguf"), "f32").has_tokenizer


def ids(name: str) -> list[int]:
    return prompt(name if name in AWKWARD else "odd-heads")[0].tolist()


def differences(asked: dict[tuple[str, str], Any], name: str, way: str) -> tuple[float, float]:
    """How far apart the likeliest log probabilities are, and how much likelier our first choice is for us than theirs.

    Over the token behind the prompt and every decoded one; 0.0 if all first choices are the same.
    """
    model, reply = asked[name, way]
    assert len(reply) == STEPS + 1
    given = ids(name)
    with torch.no_grad():
        logits = model(torch.tensor([[*given, *(entry["id"] for entry in reply)]])).logits[0]
    ours = logits[len(given) - 1 : -1].float().log_softmax(-1)
    apart = max(abs(ours[t, i].item() - p) for t, entry in enumerate(reply) for i, p in entry["top"])
    worse = max((row.max() - row[entry["id"]]).item() for row, entry in zip(ours, reply, strict=True))
    return apart, worse


@pytest.mark.parametrize(("name", "way"), [*((name, "float32") for name in AWKWARD), ("dense", "f32")])
def test_prefill_and_decode_agree_with_attention_in_float32(
    asked: dict[tuple[str, str], Any], name: str, way: str
) -> None:
    apart, worse = differences(asked, name, way)
    assert worse == 0.0
    assert apart < 1e-3


@pytest.mark.parametrize("name", [name for name in AWKWARD if name not in TIPS])
def test_prefill_and_decode_agree_with_llama_s_own_settings(asked: dict[tuple[str, str], Any], name: str) -> None:
    apart, worse = differences(asked, name, "default")
    # A first choice that is as likely as ours within the rounding is a tie.
    assert worse < 0.05
    assert apart < 0.05


@pytest.mark.parametrize("type", ["bf16", "q8_0", "q4_0"])
def test_llama_runs_smaller_types(asked: dict[tuple[str, str], Any], type: str) -> None:
    """Beside our model of the same file; llama.cpp rounds activations too, to 16 or to 8 bits."""
    model, reply = asked["blocks", type]
    apart, worse = differences(asked, "blocks", type)
    first = model(torch.tensor([ids("blocks")]), last_only=True).logits.argmax()
    assert reply[0]["id"] == int(first)
    assert worse < 0.1
    assert apart < (0.05 if type == "bf16" else 0.15)


@pytest.mark.parametrize("kind", ["trained", "released"])
def test_llama_cuts_text_as_our_tokenizer_does(asked: dict[tuple[str, str], Any], kind: str) -> None:
    """A prompt as text and as our ids: what follows is the same to the last bit."""
    _, replies = asked["texts", kind]
    from_text, from_ids = replies[::2], replies[1::2]
    assert all(from_text)
    assert from_text == from_ids
    assert len({json.dumps(reply) for reply in from_text}) == len(TEXTS)
