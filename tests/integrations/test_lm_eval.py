"""Our model class for lm-eval: likelihoods are the model's own, whoever else is in the batch; the tasks run offline."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'kimi-linear[peers]'")

from lm_eval.api.instance import Instance

from kimi_linear import KimiLinearForCausalLM, preset
from kimi_linear.base.errors import ConfigError
from kimi_linear.evaluation.bits_per_byte import bits_per_byte
from kimi_linear.integrations.lm_eval import KimiLinearEvalLM, task_dir
from kimi_linear.training.data import TextSource, Tokenizer, ValidationBatches, prepare_shards
from support.source_tree import ROOT, SOURCE

TEXT = "the quick brown fox jumps over the lazy dog and runs far away from the old grey house by the river " * 3
TOKENIZER = Tokenizer.train([TEXT], vocab_size=300)
PAIRS = [
    ("the quick", " brown fox"),
    ("the quick", " lazy"),
    ("over the lazy dog and", " runs"),
    ("", "the old"),
    ("a", "b"),
]


def network() -> KimiLinearForCausalLM:
    config = dataclasses.replace(preset("tiny"), vocab_size=300, eos_token_id=TOKENIZER.eos_id)
    model = KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        # Fresh weights are too small for neighbours, or a lost token, to show.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def evaluator(**options: object) -> KimiLinearEvalLM:
    return KimiLinearEvalLM(network(), TOKENIZER, **options)  # type: ignore[arg-type]


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def direct(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Score by one plain call over the whole."""
    with torch.no_grad():
        logits = network()(torch.tensor([[*context, *continuation]])).logits[0].double()
    before = logits[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    total = before.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
    return total, bool((before.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("add_bos_token", [False, True])
def test_likelihoods_are_those_of_a_plain_call(batch_size: int, add_bos_token: bool) -> None:
    found = evaluator(batch_size=batch_size, add_bos_token=add_bos_token).loglikelihood(
        asked("loglikelihood", *PAIRS), disable_tqdm=True
    )
    eos = [TOKENIZER.eos_id]
    for (context, continuation), (value, is_greedy) in zip(PAIRS, found, strict=True):
        whole, start = TOKENIZER.encode(context + continuation), TOKENIZER.encode(context)
        prefix = eos if add_bos_token or not context else []
        expected = direct([*prefix, *start], whole[len(start) :])
        assert value == pytest.approx(expected[0], rel=1e-4)
        assert is_greedy == expected[1]


def test_the_most_likely_continuation_is_greedy() -> None:
    model, context = network(), TOKENIZER.encode("the lazy dog")
    best = model.generate([context], max_new_tokens=3, temperature=0.0, stop_token_ids=())[0, -3:].tolist()
    other = [*best[:2], (best[2] + 1) % 300]
    lm = evaluator()
    pairs = [(tuple(context), tuple(best)), (tuple(context), tuple(other))]
    assert [one.is_greedy for one in lm._score(pairs, quiet=True)] == [True, False]


def test_a_long_context_is_cut_on_the_left() -> None:
    tokens = TOKENIZER.encode(TEXT)[:30]
    lm = evaluator(max_length=8)
    found = lm._loglikelihood_tokens([(("", ""), tokens[:28], tokens[28:])], disable_tqdm=True)
    assert found[0][0] == pytest.approx(direct(tokens[21:28], tokens[28:])[0], rel=1e-4)
    with pytest.raises(ConfigError, match="expected at most max_length = 8"):
        lm._loglikelihood_tokens([(("", ""), tokens[:1], tokens[1:])], disable_tqdm=True)


def test_rolling_likelihood_is_our_own_bits_per_byte(tmp_path: Path) -> None:
    words = TEXT.split(" ")
    cuts = [" ".join(words[:count]) for count in range(len(words))]
    texts = [next(cut for cut in cuts[20:] if len(TOKENIZER.encode(cut)) % 16 == 0), "brown fox", "x"]
    (tmp_path / "texts").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "texts" / f"{index}.txt").write_text(text)
    shards = prepare_shards(tmp_path / "shards", TextSource(str(tmp_path / "texts"), split="all"), TOKENIZER)
    batches = ValidationBatches(shards, seq_len=17, batch_size=2)
    expected = bits_per_byte(network(), ((b.input_ids, b.cu_seqlens, b.labels, b.num_bytes) for b in batches))
    found = evaluator(max_length=16).loglikelihood_rolling(
        asked("loglikelihood_rolling", *((text,) for text in [*texts, ""])), disable_tqdm=True
    )
    assert found[-1] == 0
    assert -sum(found) / math.log(2) / sum(len(text.encode()) for text in texts) == pytest.approx(expected, rel=1e-5)


def test_texts_end_at_the_first_stop_string() -> None:
    lm, model = evaluator(batch_size=2), network()
    prompt = TOKENIZER.encode("the lazy dog")
    free = TOKENIZER.decode(model.generate([prompt], max_new_tokens=12, temperature=0.0)[0, len(prompt) :].tolist())
    stop = free[3:5]
    requests = [("the lazy dog", {"until": [stop], "max_gen_toks": 12}), ("the old", {"until": [], "max_gen_toks": 4})]
    found = lm.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    assert found[0] == free[: free.index(stop)]
    again = evaluator(batch_size=1).generate_until(asked("generate_until", *requests[::-1]), disable_tqdm=True)
    assert again == found[::-1]


def test_what_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown key 'num_beams'"):
        evaluator().generate_until(asked("generate_until", ("a", {"until": ["b"], "num_beams": 4})), disable_tqdm=True)
    with pytest.raises(ConfigError, match="leaves no room in max_length = 16"):
        evaluator(max_length=16).generate_until(asked("generate_until", ("a", {"max_gen_toks": 16})), disable_tqdm=True)
    with pytest.raises(ConfigError, match="batch_size is 'auto'"):
        evaluator(batch_size="auto")
    with pytest.raises(ConfigError, match="without a tokenizer"):
        KimiLinearEvalLM(network())
    with pytest.raises(ConfigError, match="the tokenizer has 300 tokens, the model 256"):
        KimiLinearEvalLM(KimiLinearForCausalLM(preset("tiny")), TOKENIZER)


def test_the_documents_are_what_the_script_makes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_eval_tasks", ROOT / "scripts" / "build_eval_tasks.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.build(tmp_path)
    shipped = sorted(Path(task_dir()).glob("*.jsonl"))
    assert [file.name for file in shipped] == sorted(file.name for file in tmp_path.iterdir())
    for file in shipped:
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_documents_are_solvable() -> None:
    """By the rule each task states; the last words by having been said."""
    documents = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in Path(task_dir()).glob("*.jsonl")
    }
    assert {name: len(lines) for name, lines in documents.items()} == dict.fromkeys(documents, 200)
    for one in documents["recall"]:
        *pairs, key = one["context"].split(", ")
        assert dict(pair.split() for pair in pairs)[key] == one["target"]
    for one in documents["arithmetic"]:
        a, sign, b, _ = one["context"].splitlines()[-1].split()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign] == int(one["target"])
    for one in documents["copy"]:
        assert one["context"].splitlines()[-2] == f"Text: {one['target']}"
    for one in documents["last_word"]:
        assert one["target"] in one["context"].split()


EVALUATE = """
import json, sys
import kimi_linear.integrations.lm_eval as ours
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

results = simple_evaluate(
    model="kimi-linear", model_args={"pretrained": sys.argv[1], "max_gen_toks": 8}, tasks=["kimi_linear_offline"],
    task_manager=TaskManager(include_path=ours.task_dir()), limit=1, batch_size=4, bootstrap_iters=0,
)["results"]
print(json.dumps(results))
"""


def test_the_offline_tasks_run_by_name(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", EVALUATE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert 1 < results["kimi_held_out"]["bits_per_byte,none"] < 50
    for name in ("last_word", "recall", "arithmetic"):
        assert 0 <= results[f"kimi_{name}"]["acc,none"] <= 1
    assert 0 <= results["kimi_copy"]["exact_match,stripped"] <= 1
