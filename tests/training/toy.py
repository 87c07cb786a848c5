"""A model, batches and files as small as they can be, with the interfaces of the real ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kimi_linear.training.checkpoint import CheckpointStore
from kimi_linear.training.loop import TrainConfig, Trainer
from kimi_linear.training.optim import OptimConfig, build_optimizers
from kimi_linear.training.schedule import ScheduleConfig, build_schedule

VOCAB = 13
WIDTH = 8


@dataclass
class Output:
    loss: Tensor


class Mixer(nn.Module):
    """Stands for a KDA layer: the kinds of parameter it has, a causal sum over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.q_conv1d = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, bias=False)
        self.A_log = nn.Parameter(torch.zeros(2))
        self.dt_bias = nn.Parameter(torch.zeros(WIDTH))
        self.o_norm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(self.q_proj(x).mT, (3, 0))
        x = self.q_conv1d(x).mT + self.dt_bias
        return self.o_norm(x) * self.A_log.exp().repeat_interleave(WIDTH // 2)


class Experts(nn.Module):
    """Stands for a mixture of experts: a router with a selection bias, and stacked weights."""

    def __init__(self, num_experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, num_experts, bias=False)
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(num_experts))
        self.w1 = nn.Parameter(torch.randn(num_experts, WIDTH, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.gate(x) + self.gate.e_score_correction_bias, -1)
        return torch.einsum("bte,btd,efd->btf", weights, x, self.w1)

    @torch.no_grad()
    def update_router_bias(self) -> None:
        self.gate.e_score_correction_bias += 0.01 * torch.arange(3.0)


class ToyLM(nn.Module):
    def __init__(self, seed: int = 0, tie_embeddings: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.self_attn = Mixer()
        self.mlp = Experts()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> Output:
        x = self.embed_tokens(input_ids)
        x = x + self.self_attn(x)
        x = x + self.mlp(x)
        logits = self.lm_head(x).float()
        return Output(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@dataclass
class ToyBatch:
    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    @property
    def num_targets(self) -> int:
        return int((self.labels != -100).sum())


class ToyBatches:
    """Batch number i is a function of i; a share of the labels, another in every batch, is ignored."""

    def __init__(self, length: int = 12) -> None:
        self.length = length
        self.index = 0

    def __next__(self) -> ToyBatch:
        generator = torch.Generator().manual_seed(self.index)
        self.index += 1
        tokens = torch.randint(VOCAB, (1, self.length + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, : self.index % 5] = -100
        return ToyBatch(tokens[:, :-1], labels, torch.tensor([0, self.length], dtype=torch.int32))

    def state(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def toy_trainer(
    directory: Path | None = None, *, model: ToyLM | None = None, optim: OptimConfig | None = None, **options: Any
) -> Trainer:
    """Return a trainer over a new toy model; `options` that are fields of TrainConfig go there."""
    fields = {name: options.pop(name) for name in list(options) if name in TrainConfig.__dataclass_fields__}
    config = TrainConfig(**{"max_steps": 6, "precision": "fp32", **fields})
    model = model or ToyLM()
    optimizers = build_optimizers(model, optim or OptimConfig(learning_rate=0.01))
    if directory is not None:
        options["store"] = CheckpointStore(directory, config.keep_checkpoints)
    options.setdefault("batches", ToyBatches())
    return Trainer(
        model=model,
        optimizers=optimizers,
        schedule=build_schedule(ScheduleConfig()),
        config=config,
        after_step=[model.mlp.update_router_bias],
        **options,
    )
