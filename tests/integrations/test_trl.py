"""TRL's SFTTrainer on a tiny model: the loss falls, alone, packed, recomputed and with LoRA, and a run resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kimi-linear[peers]'")
pytest.importorskip("trl", reason="trl is not installed: pip install 'kimi-linear[peers]'")

from kimi_linear import load_model
from support.source_tree import SOURCE

# In a process of its own: TRL brings warnings, progress bars and hundreds of modules.
RUNS = """
import dataclasses, json, sys, torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from kimi_linear import preset
from kimi_linear.integrations.transformers import (
    KimiLinearHybridConfig, KimiLinearHybridForCausalLM, wrap_tokenizer
)
from kimi_linear.text.tokenizer import Tokenizer

texts = [f"The capital of country {i} is city {i % 7}. " * 2 for i in range(48)]
tokenizer = Tokenizer.train(texts, vocab_size=300)
network = dataclasses.replace(preset("tiny"), vocab_size=300, eos_token_id=tokenizer.eos_id)

def run(name, lora=None, resume=None, **options):
    torch.manual_seed(0)
    settings = dict(
        output_dir=f"{sys.argv[1]}/{name}", max_steps=8, save_steps=4, logging_steps=1, learning_rate=3e-3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, lr_scheduler_type="constant", max_length=64,
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, seed=1,
    )
    trainer = SFTTrainer(
        model=KimiLinearHybridForCausalLM(KimiLinearHybridConfig(network)),
        args=SFTConfig(**{**settings, **options}),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=wrap_tokenizer(tokenizer),
        peft_config=lora,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    keys = ("loss", "grad_norm", "mean_token_accuracy")
    return [{key: float(entry[key]) for key in keys} for entry in trainer.state.log_history if "loss" in entry]

lora = LoraConfig(r=8, target_modules="all-linear", target_parameters=["experts.w1", "experts.w2", "experts.w3"])
print(json.dumps({
    "whole": run("whole"),
    "resumed": run("whole", resume=f"{sys.argv[1]}/whole/checkpoint-4"),
    "recomputed": run("recomputed", gradient_checkpointing=True),
    "packed": run("packed", packing=True, gradient_accumulation_steps=1),
    "lora": run("lora", lora=lora, learning_rate=1e-2),
}))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    directory = tmp_path_factory.mktemp("trl")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(directory / "datasets"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", RUNS, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), directory


# Adapters on weights that were never trained learn less.
@pytest.mark.parametrize(("name", "share"), [("whole", 0.8), ("packed", 0.8), ("lora", 0.9)])
def test_the_loss_falls_and_the_accuracy_rises(name: str, share: float, runs: tuple[dict[str, Any], Path]) -> None:
    log = runs[0][name]
    assert len(log) == 8
    assert log[-1]["loss"] < share * log[0]["loss"]
    assert log[-1]["mean_token_accuracy"] > log[0]["mean_token_accuracy"] + 0.2


def test_recomputing_activations_changes_no_figure(runs: tuple[dict[str, Any], Path]) -> None:
    assert runs[0]["recomputed"] == runs[0]["whole"]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(runs: tuple[dict[str, Any], Path]) -> None:
    assert len(runs[0]["resumed"]) == 8
    assert runs[0]["resumed"][4:] == runs[0]["whole"][4:]


def test_what_a_trainer_saves_is_a_checkpoint_of_ours(runs: tuple[dict[str, Any], Path]) -> None:
    for checkpoint in ("whole", "whole/checkpoint-8"):
        assert load_model(runs[1] / checkpoint).config.vocab_size == 300
    assert (runs[1] / "whole" / "tokenizer.json").is_file()
