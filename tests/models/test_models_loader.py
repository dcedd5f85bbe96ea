"""Loading: strict about what is in the files, and every refusal names the file or tensor and a remedy."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from course_lib.errors import CorruptModelError, CourseError, ModelNotFoundError, UnsupportedModelError
from course_lib.models import loader
from course_lib.models.loader import load_model
from course_lib.models.registry import ARCHITECTURES, resolve_model_class

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"
CONFIG = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with one file and a folder with several shards of the same random model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, attention_bias=True)
    model = transformers.LlamaForCausalLM(config)
    single, sharded = tmp_path_factory.mktemp("single"), tmp_path_factory.mktemp("sharded")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(single)
    model.save_pretrained(sharded, max_shard_size="20KB")
    return single, sharded


@pytest.fixture
def single(pristine, tmp_path):
    return shutil.copytree(pristine[0], tmp_path / "single")


@pytest.fixture
def sharded(pristine, tmp_path):
    return shutil.copytree(pristine[1], tmp_path / "sharded")


def load(folder, **arguments):
    config = transformers.AutoConfig.from_pretrained(folder)
    return load_model(folder, config, torch.float32, "cpu", **arguments)


def rewrite(file, change):
    """Apply `change` to the dict of tensors in a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(error, folder, *words, **arguments):
    with pytest.raises(error) as caught:
        load(folder, **arguments)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# ---- what goes well ---------------------------------------------------------------------------------


def test_every_tensor_lands_in_its_own_rows(single):
    """q, k, v and gate, up sit in the fused matrices in that order; nothing else is uninitialised."""
    model, tensors = load(single), load_file(single / SINGLE)
    layer, prefix = model.model.layers[1], "model.layers.1."
    attention = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
    for kind in ("weight", "bias"):
        expected = torch.cat([tensors[f"{name}.{kind}"] for name in attention])
        assert torch.equal(getattr(layer.self_attn.qkv_proj, kind), expected)
    expected = torch.cat([tensors[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(layer.mlp.gate_up_proj.weight, expected)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert model.slots.keys() == tensors.keys()


def test_shards_and_single_file_give_the_same_model(single, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = load(single).state_dict(), load(sharded).state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_reopening_the_file_in_between_loses_nothing(single, monkeypatch):
    whole = load(single).state_dict()
    monkeypatch.setattr(loader, "MAPPED_BYTES", 1)
    assert all(torch.equal(whole[name], tensor) for name, tensor in load(single).state_dict().items())


def test_saving_over_the_folder_does_not_change_a_loaded_model(single):
    model = load(single)
    before = model.embedding_weight().clone()
    file = single / SINGLE
    size = file.stat().st_size
    with file.open("r+b") as opened:  # the same inode, as a map would see it
        opened.seek(0)
        opened.write(b"\xff" * size)
    assert torch.equal(model.embedding_weight(), before)


def test_parameters_are_dtype_cast_and_need_no_gradient(single):
    config = transformers.AutoConfig.from_pretrained(single)
    model = load_model(single, config, torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.lm_head.weight, load_file(single / SINGLE)["lm_head.weight"].bfloat16())


def test_old_rotary_buffers_are_ignored(single):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(single / SINGLE, lambda t: t.update({name: torch.ones(4)}))
    load(single)


def test_a_stored_copy_of_a_tied_head_is_ignored_and_a_different_head_refused(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    refused(CorruptModelError, single, SINGLE, "lm_head.weight", "tie_word_embeddings")
    embedding = "model.embed_tokens.weight"
    rewrite(single / SINGLE, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert load(single).lm_head is None


def test_meta_device_takes_no_memory():
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=2)
    model = resolve_model_class(config)(config, dtype=torch.bfloat16, device="meta", max_model_len=16)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_dummy_weights_are_seeded_finite_and_leave_torchs_generator_alone(single):
    for file in single.glob("*.safetensors"):
        file.unlink()
    before = torch.get_rng_state()
    first, again, other = (load(single, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    tables = [model.model.embed_tokens.weight for model in (first, again, other)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert torch.equal(first.model.norm.weight, torch.ones(32))
    assert not first.model.layers[0].self_attn.qkv_proj.bias.any()
    for model in (first, other):
        for layer in model.attention_layers():
            layer.forward = lambda query, key, value, metadata: query
        with torch.inference_mode():
            logits = model.compute_logits(model(torch.arange(8), torch.arange(8), None))
        assert logits.isfinite().all() and logits.std() > 0


# ---- damaged files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -5000, -1])
def test_truncated_file(single, keep):
    file = single / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    refused(CorruptModelError, single, str(file), "truncated", "download it again")


def test_truncated_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    refused(CorruptModelError, sharded, str(file), "truncated")


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"dtype":"F32"', b'"dtype":"X32"'),
        (b'{"__metadata__"', b'["__metadata__"'),
        (b'"data_offsets":[0,', b'"data_offsets":[8,'),
    ],
)
def test_tampered_header(single, old, new):
    file = single / SINGLE
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    refused(CorruptModelError, single, str(file), "altered")


def test_no_flipped_header_byte_escapes_as_another_error(single):
    """Whatever one wrong byte does, it is a refusal with a sentence, or harmless (in the metadata)."""
    file, rng = single / SINGLE, random.Random(0)
    data = file.read_bytes()
    config = transformers.AutoConfig.from_pretrained(single)
    header_end = 8 + int.from_bytes(data[:8], "little")
    refusals = 0
    for _ in range(150):
        damaged, place = bytearray(data), rng.randrange(header_end)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            load_model(single, config, torch.float32, "cpu")
        except CourseError as error:
            refusals += 1
            assert str(file) in str(error) or str(single) in str(error)
    assert refusals > 120


# ---- the wrong set of tensors -----------------------------------------------------------------------


def test_missing_tensor(single):
    rewrite(single / SINGLE, lambda t: t.pop(NORM))
    refused(CorruptModelError, single, NORM, "LlamaForCausalLM", "download")


def test_missing_head_hints_at_tying(single):
    rewrite(single / SINGLE, lambda t: t.pop("lm_head.weight"))
    refused(CorruptModelError, single, "lm_head.weight", "tie_word_embeddings")


def test_unexpected_tensor(single):
    rewrite(single / SINGLE, lambda t: t.update({"model.layers.7.mlp.gate_proj.weight": torch.ones(48, 32)}))
    refused(CorruptModelError, single, SINGLE, "model.layers.7.mlp.gate_proj.weight", "config.json")


@pytest.mark.parametrize("shape", [[33], [1], [32, 1]])
def test_wrong_shape(single, shape):
    rewrite(single / SINGLE, lambda t: t.update({NORM: torch.ones(shape)}))
    refused(CorruptModelError, single, SINGLE, NORM, str(shape), "[32]")


def test_part_of_a_fused_matrix_of_another_shape(single):
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(single / SINGLE, lambda t: t.update({name: torch.ones(32, 32)}))
    refused(CorruptModelError, single, name, "[32, 32]", "[16, 32]")


def test_integer_tensor(single):
    rewrite(single / SINGLE, lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}))
    refused(UnsupportedModelError, single, SINGLE, NORM, "int8", "float16")


def test_quantized_checkpoint(single):
    config = json.loads((single / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (single / "config.json").write_text(json.dumps(config))
    refused(UnsupportedModelError, single, str(single), "quantized", "bfloat16")


def test_missing_shard(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    refused(CorruptModelError, sharded, str(file), INDEX, "download")


def test_index_promises_a_tensor_to_the_wrong_shard(sharded):
    index = json.loads((sharded / INDEX).read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][NORM])
    index["weight_map"][NORM] = other
    (sharded / INDEX).write_text(json.dumps(index))
    refused(CorruptModelError, sharded, str(sharded / other), NORM, "index")


def test_tensor_in_two_shards(sharded):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[NORM])
    rewrite(sharded / other, lambda t: t.update({NORM: torch.ones(32)}))
    refused(CorruptModelError, sharded, str(sharded), NORM, "two files")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(CorruptModelError, sharded, INDEX, "download")


def test_index_cannot_point_outside_the_folder(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}}))
    refused(CorruptModelError, sharded, INDEX, "outside")


def test_shards_without_index(sharded):
    (sharded / INDEX).unlink()
    refused(CorruptModelError, sharded, INDEX, "model-00001-of-")


def test_pickle_only(single):
    (single / SINGLE).rename(single / "pytorch_model.bin")
    refused(UnsupportedModelError, single, "pytorch_model.bin", "pickle", "save_pretrained")


def test_no_weights(single):
    (single / SINGLE).unlink()
    refused(ModelNotFoundError, single, str(single), SINGLE)


def test_unknown_load_format(single):
    refused(ValueError, single, "load_format", "npcache", "dummy", load_format="npcache")


# ---- models that are not supported ------------------------------------------------------------------


def test_unsupported_architecture_lists_the_supported_ones():
    with pytest.raises(UnsupportedModelError) as caught:
        resolve_model_class(SimpleNamespace(architectures=["FalconForCausalLM"]))
    assert all(name in str(caught.value) for name in ["FalconForCausalLM", *ARCHITECTURES])


def test_misspelt_architecture_is_recognised():
    with pytest.raises(UnsupportedModelError, match="Did you mean LlamaForCausalLM"):
        resolve_model_class(SimpleNamespace(architectures=["LLaMAForCausalLM"]))


def test_no_architecture():
    with pytest.raises(UnsupportedModelError, match='"architectures"'):
        resolve_model_class(SimpleNamespace(architectures=None))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_listed_architecture_exists(name):
    assert resolve_model_class(SimpleNamespace(architectures=[name])).__name__ == name


def test_other_activation(single):
    config = transformers.AutoConfig.from_pretrained(single)
    config.hidden_act = "gelu"
    with pytest.raises(UnsupportedModelError, match="hidden_act='gelu'.*'silu'"):
        load_model(single, config, torch.float32, "cpu")
