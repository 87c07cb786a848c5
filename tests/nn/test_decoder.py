"""The block and the network as a loop: what reads and writes the residual stream, and recomputation from outside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.decoder import Decoder, checkpoint_blocks
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import KDAConfig, MLAConfig
from kimi_linear.nn.residual.standard import StandardResidual

KDA = BlockConfig(mixer=KDAConfig(num_heads=2, head_dim=8), ffn=SwiGLUConfig(intermediate_size=16))
MLA = BlockConfig(
    mixer=MLAConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    ffn=MoEConfig(num_experts=4, top_k=2, intermediate_size=8),
)


def build() -> Decoder:
    torch.manual_seed(0)
    return Decoder([KDA, MLA], vocab_size=32, hidden_size=16, norm_eps=1e-5, pad_token_id=0).double()


def ids() -> Tensor:
    return torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_network_is_a_loop_of_normed_residual_sublayers() -> None:
    decoder = build()
    x = decoder.embed_tokens(ids())
    for block in decoder.blocks():
        x = x + block.self_attn(block.input_layernorm(x))
        x = x + block.mlp(block.post_attention_layernorm(x))
    assert torch.equal(decoder(ids()), decoder.norm(x))


class Recorder(StandardResidual):
    """Writes down who reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def start(self, embedding: Tensor) -> Tensor:
        self.calls.append("start")
        return super().start(embedding)

    def read(self, stream: Tensor, sublayer: int) -> Tensor:
        self.calls.append(("read", sublayer))
        return super().read(stream, sublayer)

    def write(self, stream: Tensor, output: Tensor, sublayer: int) -> Tensor:
        self.calls.append(("write", sublayer))
        return super().write(stream, output, sublayer)

    def finish(self, stream: Tensor) -> Tensor:
        self.calls.append("finish")
        return super().finish(stream)


@torch.no_grad()
def test_every_sublayer_reads_and_writes_once_in_order() -> None:
    decoder = build()
    decoder.residual = Recorder()
    decoder(ids())
    steps = [(step, sublayer) for sublayer in range(4) for step in ("read", "write")]
    assert decoder.residual.calls == ["start", *steps, "finish"]


def test_the_padding_row_gets_no_gradient() -> None:
    decoder = build()
    decoder(torch.tensor([[0, 1, 0, 2]])).square().sum().backward()
    grad = decoder.embed_tokens.weight.grad
    assert grad is not None
    assert float(grad[0].abs().max()) == 0.0
    assert float(grad[1].abs().max()) > 0.0


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_recomputed_blocks_have_the_same_names_outputs_and_gradients() -> None:
    plain, recomputed = build(), build()
    checkpoint_blocks(recomputed)
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    outputs = [decoder(ids()) for decoder in (plain, recomputed)]
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(*outputs)
    expected, found = gradients(plain), gradients(recomputed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_recomputation_keeps_fewer_tensors_for_the_backward_pass() -> None:
    def saved_bytes(decoder: Decoder) -> int:
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(torch.randint(1, 32, (4, 64)))
        return sum(sizes.values())

    plain, recomputed = build(), build()
    checkpoint_blocks(recomputed)
    assert saved_bytes(recomputed) < saved_bytes(plain) / 3


@pytest.mark.parametrize("grad", [False, True])
def test_recomputed_blocks_update_a_state_once(grad: bool) -> None:
    plain, recomputed = build(), build()
    checkpoint_blocks(recomputed)
    states = [d.new_states(2, device=torch.device("cpu"), dtype=torch.float64) for d in (plain, recomputed)]
    with torch.set_grad_enabled(grad):
        outputs = [decoder(ids(), state) for decoder, state in zip((plain, recomputed), states, strict=True)]
    assert torch.equal(*outputs)
    assert [s.lengths.tolist() for state in states for s in state[1:]] == [[7, 7], [7, 7]]
    assert torch.equal(states[0][0].recurrent, states[1][0].recurrent)
