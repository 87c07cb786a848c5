"""The training loop: accumulation, clipping, budgets, stops, events, precision."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from kimi_linear.base.errors import ConfigError
from kimi_linear.training.callbacks import Callback
from kimi_linear.training.loop import TrainConfig, TrainingError
from kimi_linear.training.optim import OptimConfig
from training.toy import ToyBatches, ToyLM, toy_trainer


class Recorder(Callback):
    """Keeps every event."""

    def __init__(self):
        self.events, self.records, self.results = [], [], []

    def on_start(self, step):
        self.events.append(("start", step))

    def on_step(self, record):
        self.events.append(("step", record.step))
        self.records.append(record)

    def on_eval(self, record):
        self.events.append(("eval", record.step))

    def on_checkpoint(self, step, path):
        self.events.append(("checkpoint", step))

    def on_end(self, result):
        self.results.append(result)

    @property
    def losses(self):
        return [record.loss for record in self.records]


class Signals(Callback):
    """Sends this process a signal after a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step(self, record):
        if record.step == self.step:
            os.kill(os.getpid(), self.number)


class Merged:
    """Two micro-batches of another source as one row."""

    def __init__(self, source):
        self.source = source

    def __next__(self):
        first, second = next(self.source), next(self.source)
        ids = torch.cat([first.input_ids, second.input_ids])
        return replace(first, input_ids=ids, labels=torch.cat([first.labels, second.labels]))

    def state(self):
        return self.source.state()

    def load_state(self, state):
        self.source.load_state(state)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_training_lowers_the_loss_of_a_batch_seen_again():
    class Same(ToyBatches):
        def __next__(self):
            self.index = 0
            return super().__next__()

    recorder = Recorder()
    result = toy_trainer(max_steps=60, batches=Same(), callbacks=[recorder]).fit()
    assert result.status == "finished"
    assert result.step == 60
    assert recorder.losses[-1] < 0.5 * recorder.losses[0]


def test_accumulation_equals_one_big_batch():
    # Muon's iteration runs in bfloat16 and would blur the comparison; AdamW at a large eps is linear in the gradient.
    optim = OptimConfig(name="adamw", eps=1.0)
    small, big = Recorder(), Recorder()
    accumulated = toy_trainer(accumulation=2, optim=optim, callbacks=[small])
    accumulated.fit()
    merged = toy_trainer(batches=Merged(ToyBatches()), optim=optim, callbacks=[big])
    merged.fit()
    assert small.losses == pytest.approx(big.losses, rel=1e-6)
    assert [r.grad_norm for r in small.records] == pytest.approx([r.grad_norm for r in big.records], rel=1e-5)
    assert [r.tokens for r in small.records] == [r.tokens for r in big.records] == [24 * i for i in range(1, 7)]
    for (name, x), y in zip(accumulated.model.state_dict().items(), merged.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7, msg=name)


def test_a_micro_batch_without_targets_changes_nothing():
    class Blank(ToyBatches):
        def __next__(self):
            batch = super().__next__()
            return replace(batch, labels=torch.full_like(batch.labels, -100)) if self.index % 2 == 0 else batch

    class Odd(ToyBatches):
        def __next__(self):
            batch = super().__next__()
            self.index += 1
            return batch

    with_blanks, without = Recorder(), Recorder()
    toy_trainer(accumulation=2, batches=Blank(), callbacks=[with_blanks]).fit()
    toy_trainer(batches=Odd(), callbacks=[without]).fit()
    assert with_blanks.losses == without.losses


def test_no_target_at_all_is_one_sentence():
    class Blank(ToyBatches):
        def __next__(self):
            batch = super().__next__()
            return replace(batch, labels=torch.full_like(batch.labels, -100))

    with pytest.raises(TrainingError, match="step 1 has no token to predict"):
        toy_trainer(batches=Blank()).fit()


def test_gradients_are_clipped_by_their_global_norm():
    seen = []
    trainer = toy_trainer(max_steps=2, max_grad_norm=0.05, optim=OptimConfig(name="adamw"))
    step = trainer.optimizers.step

    def spy(multiplier):
        norms = [p.grad.norm() for p in trainer.model.parameters()]
        seen.append(torch.stack(norms).norm().item())
        step(multiplier)

    trainer.optimizers.step = spy
    recorder = Recorder()
    trainer.callbacks = [recorder]
    trainer.fit()
    assert all(record.grad_norm > 0.1 for record in recorder.records)
    assert seen == pytest.approx([0.05, 0.05], rel=1e-4)


def test_without_a_bound_gradients_stay_as_they_are():
    free, loose = Recorder(), Recorder()
    toy_trainer(max_grad_norm=None, callbacks=[free]).fit()
    toy_trainer(max_grad_norm=1e9, callbacks=[loose]).fit()
    assert free.losses == loose.losses


def test_the_learning_rate_follows_the_schedule_up_to_its_end():
    recorder = Recorder()
    trainer = toy_trainer(max_steps=10, callbacks=[recorder])
    trainer.fit()
    expected = [0.01 * trainer.schedule((i + 1) / 10) for i in range(10)]
    assert [record.learning_rate for record in recorder.records] == pytest.approx(expected)
    assert recorder.records[-1].learning_rate == pytest.approx(0.001)


class Clock:
    """Time that passes only while a batch is fetched."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def batches(self, seconds):
        clock = self

        class Timed(ToyBatches):
            def __next__(self):
                clock.now += seconds
                return super().__next__()

        return Timed()


def test_a_time_budget_ends_the_run_and_drives_the_schedule(monkeypatch):
    clock, recorder = Clock(monkeypatch), Recorder()
    trainer = toy_trainer(max_steps=None, max_minutes=2.0, batches=clock.batches(6.0), callbacks=[recorder])
    result = trainer.fit()
    assert (result.status, result.step, result.seconds) == ("finished", 20, 120.0)
    # The first step cannot know how long it takes; from then on the rate is that of where the step ends.
    expected = [trainer.schedule(0.0), *(trainer.schedule((i + 1) / 20) for i in range(1, 20))]
    assert [record.learning_rate / 0.01 for record in recorder.records] == pytest.approx(expected)
    assert [record.seconds_left for record in recorder.records] == pytest.approx([114.0 - 6.0 * i for i in range(20)])
    assert {round(record.tokens_per_second, 6) for record in recorder.records} == {2.0}


def test_a_time_budget_counts_on_after_a_resume(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    options = {"max_steps": None, "max_minutes": 1.0}
    stop = Signals(signal.SIGTERM, 4)
    assert toy_trainer(tmp_path, batches=clock.batches(6.0), callbacks=[stop], **options).fit().seconds == 24.0
    clock.now += 3600
    result = toy_trainer(tmp_path, batches=clock.batches(6.0), **options).fit()
    assert (result.status, result.step, result.seconds) == ("finished", 10, 60.0)


def test_a_callback_can_stop_the_loop():
    class StopAt3(Callback):
        def on_step(self, record):
            if record.step == 3:
                trainer.stop()

    trainer = toy_trainer(max_steps=10, callbacks=[StopAt3()])
    result = trainer.fit()
    assert (result.status, result.step) == ("interrupted", 3)


def test_the_nearer_of_two_budgets_counts(monkeypatch):
    clock = Clock(monkeypatch)
    assert toy_trainer(max_steps=3, max_minutes=10.0, batches=clock.batches(6.0)).fit().step == 3
    assert toy_trainer(max_steps=500, max_minutes=1.0, batches=clock.batches(6.0)).fit().step == 10


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(poison):
    class Poisoned(ToyLM):
        calls = 0

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            self.calls += 1
            return replace(output, loss=output.loss * (poison if self.calls == 3 else 1.0))

    trainer = toy_trainer(model=Poisoned())
    recorder = Recorder()
    trainer.callbacks = [recorder]
    trainer.optimizers.step = lambda m, step=trainer.optimizers.step: (step(m), before.update(weights(trainer.model)))
    before = {}
    with pytest.raises(TrainingError, match=f"step 3: the loss is {poison}; .* Lower learning_rate"):
        trainer.fit()
    assert len(recorder.records) == 2
    assert recorder.results[0].status == "failed"
    bias = "mlp.gate.e_score_correction_bias"
    for name, tensor in trainer.model.state_dict().items():
        assert name == bias or torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_gradient_that_is_not_finite_stops_too():
    trainer = toy_trainer()
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="step 1: the norm of the gradient is"):
        trainer.fit()


def test_hooks_run_after_every_step():
    trainer = toy_trainer(max_steps=5)
    trainer.fit()
    torch.testing.assert_close(trainer.model.mlp.gate.e_score_correction_bias, 0.05 * torch.arange(3.0))


def test_events_come_in_order():
    recorder = Recorder()
    trainer = toy_trainer(max_steps=5, eval_every=2, callbacks=[recorder], evaluate=lambda model: {"score": 1.0})
    assert trainer.fit().metrics["score"] == 1.0
    steps = [("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("eval", 4), ("step", 5), ("eval", 5)]
    assert recorder.events == [("start", 0), *steps]
    assert [result.status for result in recorder.results] == ["finished"]


def test_evaluation_runs_in_eval_mode_without_gradients_and_returns_to_training():
    modes = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {}

    trainer = toy_trainer(max_steps=2, eval_every=1, evaluate=evaluate)
    trainer.fit()
    assert modes == [(False, False)] * 2
    assert trainer.model.training


def test_evaluation_changes_no_loss():
    with_eval, without = Recorder(), Recorder()
    toy_trainer(
        eval_every=1, evaluate=lambda model: {"w": model.lm_head.weight.sum().item()}, callbacks=[with_eval]
    ).fit()
    toy_trainer(callbacks=[without]).fit()
    assert with_eval.losses == without.losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_equals_an_unbroken_one(tmp_path, number):
    whole, first, second = Recorder(), Recorder(), Recorder()
    unbroken = toy_trainer(max_steps=8, accumulation=2, callbacks=[whole])
    unbroken.fit()
    handler = signal.getsignal(number)
    interrupted = toy_trainer(tmp_path, max_steps=8, accumulation=2, callbacks=[Signals(number, 3), first]).fit()
    assert (interrupted.status, interrupted.step) == ("interrupted", 3)
    assert first.events[-1] == ("checkpoint", 3)
    assert signal.getsignal(number) is handler
    resumed = toy_trainer(tmp_path, model=ToyLM(seed=9), max_steps=8, accumulation=2, callbacks=[second])
    assert resumed.fit().status == "finished"
    assert second.events[0] == ("start", 3)
    assert first.losses + second.losses == whole.losses
    for (name, x), y in zip(resumed.model.state_dict().items(), unbroken.model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_signal_at_the_last_step_is_a_finished_run():
    assert toy_trainer(max_steps=3, callbacks=[Signals(signal.SIGTERM, 3)]).fit().status == "finished"


def test_a_second_interrupt_acts_at_once(tmp_path):
    class Twice(Signals):
        def on_step(self, record):
            super().on_step(record)
            super().on_step(record)

    # A job that a shell started in the background ignores interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            toy_trainer(tmp_path, callbacks=[Twice(signal.SIGINT, 2)]).fit()
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(toy_trainer(max_steps=2).fit()))
    thread.start()
    thread.join()
    assert results[0].status == "finished"


def test_resuming_a_finished_run_takes_no_step(tmp_path):
    toy_trainer(tmp_path).fit()
    recorder = Recorder()
    result = toy_trainer(tmp_path, callbacks=[recorder]).fit()
    assert (result.status, result.step) == ("finished", 6)
    assert recorder.events == [("start", 6)]


def test_seconds_and_tokens_go_on_counting_after_a_resume(tmp_path):
    first = toy_trainer(tmp_path, callbacks=[Signals(signal.SIGTERM, 2)]).fit()
    second = toy_trainer(tmp_path).fit()
    assert second.seconds > first.seconds
    assert (first.tokens, second.tokens) == (24, 72)


def test_checkpoints_come_by_steps_and_at_both_ends(tmp_path):
    recorder = Recorder()
    toy_trainer(tmp_path, max_steps=5, checkpoint_every=2, callbacks=[recorder]).fit()
    assert [step for kind, step in recorder.events if kind == "checkpoint"] == [0, 2, 4, 5]


def test_checkpoints_come_by_time(tmp_path):
    recorder = Recorder()
    toy_trainer(tmp_path, max_steps=3, checkpoint_minutes=1e-9, callbacks=[recorder]).fit()
    assert [step for kind, step in recorder.events if kind == "checkpoint"] == [0, 1, 2, 3]


def test_parameters_and_gradient_state_stay_float32_under_bf16():
    trainer = toy_trainer(precision="bf16")
    kinds = []
    trainer.model.mlp.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    trainer.fit()
    assert set(kinds) == {torch.bfloat16}
    assert {tensor.dtype for tensor in trainer.model.state_dict().values()} == {torch.float32}
    assert {tensor.dtype for tensor in trainer.optimizers.state_tensors().values()} == {torch.float32}


def test_automatic_precision_is_measured_once_and_kept(tmp_path, monkeypatch):
    from kimi_linear.training import precision

    taken = iter([9.0, 9.0] + [2.0, 1.0] * 3)
    monkeypatch.setattr(precision, "_time", lambda *args: next(taken))
    recorder = Recorder()
    first = toy_trainer(tmp_path, precision="auto", callbacks=[Signals(signal.SIGTERM, 2), recorder])
    first.fit()
    assert first.precision == precision.Precision("bf16", 2.0, 1.0)
    second = toy_trainer(tmp_path, precision="auto")
    # Nothing is left to measure with, so a second measurement would fail.
    second.fit()
    assert second.precision == first.precision


def test_measuring_precision_leaves_no_trace():
    recorders = [Recorder(), Recorder()]
    automatic = toy_trainer(precision="auto", callbacks=[recorders[0]])
    automatic.fit()
    assert automatic.precision.fp32_seconds > 0
    assert automatic.precision.bf16_seconds > 0
    toy_trainer(precision=automatic.precision.name, callbacks=[recorders[1]]).fit()
    assert recorders[0].losses == recorders[1].losses


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "max_steps and max_minutes are both missing"),
        ({"max_steps": 0}, "max_steps is 0, expected more than 0"),
        ({"max_steps": 1, "accumulation": 0}, "accumulation is 0"),
        ({"max_steps": 1, "max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"max_steps": 1, "max_minutes": float("nan")}, "max_minutes is nan"),
        ({"max_steps": 1, "precision": "fp16"}, "unknown precision 'fp16'"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**fields)
