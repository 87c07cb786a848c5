import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimi_linear.base.errors import CheckpointError, DeviceError, DtypeError, KimiLinearError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.models.kimi_linear.presets import preset


class AllocationWatch(TorchDispatchMode):
    """Sums the bytes of every tensor that an operation allocates, views and in-place results left out."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        shared = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.nbytes += 0 if tensor.untyped_storage().data_ptr() in shared else tensor.nbytes
        return result


@pytest.fixture(scope="module")
def model():
    return KimiLinearForCausalLM(preset("tiny"), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config.update(changes)
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def error_of(directory):
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_missing_and_unexpected_tensors_are_named(saved):
    def change(tensors):
        tensors["model.norm.weights"] = tensors.pop("model.norm.weight")

    edit_tensors(saved, change)
    message = error_of(saved)
    assert "1 missing (model.norm.weight)" in message
    assert "1 unexpected (model.norm.weights)" in message


def test_only_ten_names_of_many_are_listed(saved):
    def change(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    edit_tensors(saved, change)
    message = error_of(saved)
    assert "72 missing" in message
    assert message.count("experts.") == 10
    assert "and 62 more" in message


def test_another_shape_is_named_with_both_shapes(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}))
    assert "1 of another shape (model.norm.weight [65] instead of [64])" in error_of(saved)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_another_kind_of_dtype_is_named(saved, dtype):
    edit_tensors(saved, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64).to(dtype)}))
    assert "1 of a dtype other than F64, F32, F16, BF16 (model.norm.weight " in error_of(saved)


def test_nothing_is_built_before_every_tensor_is_checked(saved, monkeypatch):
    edit_tensors(saved, lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(KimiLinearForCausalLM, "__init__", lambda *args, **kwargs: pytest.fail("built too early"))
    error_of(saved)


def test_the_other_shapes_in_circulation_are_accepted(saved, model):
    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith("A_log"):
                tensors[name] = tensor.flatten()
            if "conv1d" in name:
                tensors[name] = tensor.squeeze(1)

    edit_tensors(saved, change)
    loaded = load_model(saved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_tensors_other_tools_add_are_skipped(saved):
    extra = {"model.layers.3.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.mtp.layers.0.weight": torch.ones(4)}
    edit_tensors(saved, lambda tensors: tensors.update(extra))
    load_model(saved)


def test_a_tied_model_does_not_take_an_output_head_of_its_own(tmp_path, saved):
    edit_config(saved, tie_word_embeddings=True)
    assert "lm_head.weight is not model.embed_tokens.weight; set tie_word_embeddings to false" in error_of(saved)


@pytest.mark.parametrize(
    "field",
    [
        {"attn_res_block_size": 4},
        {"hidden_act": "situ"},
        {"routed_expert_hidden_size": 512},
        {"latent_moe_use_norm": True},
        {"mla_use_output_gate": True},
        {"q_lora_rank": 1536},
    ],
)
def test_a_look_alike_of_the_same_model_type_is_refused_by_the_field(saved, field):
    edit_config(saved, **field)
    message = error_of(saved)
    assert next(iter(field)) in message
    assert "config.json" in message


@pytest.mark.parametrize("field", [{"gate_lower_bound": -5.0}, {"use_full_rank_gate": True}])
def test_a_look_alike_is_refused_by_its_linear_attention_too(saved, field):
    linear = json.loads((saved / "config.json").read_text())["linear_attn_config"]
    edit_config(saved, linear_attn_config={**linear, **field})
    assert next(iter(field)) in error_of(saved)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ('{"model_type": "kimi_linear"', "not valid JSON"),
        ("[]", "expected an object"),
        ("{}", "model_type is None"),
        ('{"model_type": "llama"}', "model_type is 'llama'"),
        ('{"model_type": "kimi_linear"}', "is missing"),
        ('{"model_type": "kimi_linear_hybrid"}', "'vocab_size' is missing"),
        ('{"model_type": "kimi_linear_hybrid", "vocab_sise": 4}', "did you mean 'vocab_size'"),
    ],
)
def test_a_configuration_that_is_not_one(saved, text, expected):
    (saved / "config.json").write_text(text)
    message = error_of(saved)
    assert expected in message
    assert "config.json" in message


@pytest.mark.parametrize("change", [{"vocab_size": "many"}, {"linear_attn_config": 3}, {"num_hidden_layers": [4]}])
def test_a_value_of_the_wrong_type_is_one_sentence(saved, change):
    edit_config(saved, **change)
    assert "config.json" in error_of(saved)


def test_a_configuration_of_another_size_does_not_fit_the_tensors(saved):
    edit_config(saved, vocab_size=300)
    assert "lm_head.weight [256, 64] instead of [300, 64]" in error_of(saved)


@pytest.mark.parametrize(
    "text", ["{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, -1]}', '{"eos_token_id": true}']
)
def test_a_generation_config_that_is_not_one(saved, text):
    (saved / "generation_config.json").write_text(text)
    assert "generation_config.json" in error_of(saved)


def test_a_generation_config_may_be_missing_or_name_one_token(saved):
    (saved / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load_model(saved).end_token_ids == (7,)
    (saved / "generation_config.json").unlink()
    assert load_model(saved).end_token_ids == ()


def test_a_directory_without_a_configuration(tmp_path):
    assert "has no config.json" in error_of(tmp_path)


def test_a_hub_name_is_loaded_from_the_cache_and_never_downloaded(saved, tmp_path, monkeypatch, model):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="download it first"):
        load_model("someone/some-model")
    snapshots = tmp_path / "cache" / "models--someone--some-model" / "snapshots"
    snapshots.mkdir(parents=True)
    # As in a real cache, the files of a snapshot are links.
    (snapshots / "0123abcd").mkdir()
    for path in saved.iterdir():
        (snapshots / "0123abcd" / path.name).symlink_to(path)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("0123abcd")
    loaded = load_model("someone/some-model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int64, "torch.bfloat16", 16])
def test_a_dtype_that_weights_do_not_have(saved, dtype):
    with pytest.raises(DtypeError, match="expected one of float64, float32, float16, bfloat16"):
        load_model(saved, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_here(saved, device):
    with pytest.raises(DeviceError, match="cannot be used here"):
        load_model(saved, device=device)


def test_every_error_is_one_that_the_command_line_shows_as_a_sentence():
    assert issubclass(CheckpointError, KimiLinearError)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_allocates_the_model_once(saved, dtype):
    with AllocationWatch() as watch:
        loaded = load_model(saved, dtype=dtype)
    assert watch.nbytes == sum(tensor.nbytes for tensor in loaded.state_dict().values())


def test_the_weights_do_not_depend_on_the_file_afterwards(saved, model):
    loaded = load_model(saved)
    with (saved / "model.safetensors").open("r+b") as file:
        file.seek(0, 2)
        size = file.tell()
        file.seek(0)
        file.write(b"\0" * size)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_loaded_model_can_be_trained(saved):
    loaded = load_model(saved).train()
    ids = torch.arange(16)[None]
    loaded(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in loaded.named_parameters() if parameter.grad is not None}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.A_log", "lm_head.weight"} <= trained
