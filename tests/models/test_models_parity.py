"""Logits of tiny random models equal transformers' to float32 rounding, through the paged cache."""

import copy

import pytest
import torch
import transformers

from course_lib.errors import UnsupportedModelError
from course_lib.models.loader import load_model
from course_lib.models.qwen2 import Qwen2ForCausalLM

VOCAB, LENGTH = 160, 90
TOLERANCE = 2e-5  # logits have a standard deviation of about 1


def llama(**changes):
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    return transformers.LlamaConfig(**{**settings, **changes})


def like_llama(config_class, **changes):
    base = llama()
    keys = [
        *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    ]
    settings = {key: getattr(base, key) for key in keys}
    return config_class(**{**settings, **changes})


def rope(kind, **settings):
    return {"rope_type": kind, "rope_theta": 1000.0, **settings}


LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
CONFIGS = {
    "llama": lambda: llama(),
    "llama-untied-mha": lambda: llama(num_key_value_heads=6, tie_word_embeddings=False),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-head-dim": lambda: llama(head_dim=24, rms_norm_eps=1e-3),
    "llama-llama3": lambda: llama(rope_parameters=LLAMA3),
    "llama-linear": lambda: llama(rope_parameters=rope("linear", factor=3.0)),
    "llama-yarn": lambda: llama(rope_parameters=YARN),
    "llama-yarn-options": lambda: llama(
        rope_parameters={**YARN, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.3}
    ),
    "llama-yarn-untruncated": lambda: llama(
        rope_parameters={**YARN, "truncate": False, "attention_factor": 1.2}
    ),
    "llama-dynamic": lambda: llama(max_position_embeddings=48, rope_parameters=rope("dynamic", factor=2.0)),
    "mistral": lambda: like_llama(transformers.MistralConfig, sliding_window=9),
    "mistral-no-window": lambda: like_llama(transformers.MistralConfig, sliding_window=None),
    "qwen2": lambda: like_llama(transformers.Qwen2Config, tie_word_embeddings=True),
    "qwen2-window": lambda: like_llama(
        transformers.Qwen2Config, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": lambda: like_llama(transformers.Qwen3Config, head_dim=32),
    "qwen3-biases-layer-types": lambda: like_llama(
        transformers.Qwen3Config,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def random_model(config, seed=0):
    """A transformers model in which every parameter matters: also norms and biases are random."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(mean=1.0, std=0.3)
            else:
                parameter.normal_(std=0.12 if parameter.dim() > 1 else 0.3)
    return model


def sequences(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def reread(folder, dtype):
    """transformers' own reading; unlike `model.to(dtype)` it keeps RoPE's frequencies in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


@torch.inference_mode()
def reference_logits(model, sequence):
    return model(torch.tensor([sequence])).logits[0]


def largest_difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def save_once(tmp_path_factory, configs):
    """name -> (transformers model, its folder, its config as read back), made once per name."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = random_model(configs[name]())
            model.save_pretrained(folder)
            made[name] = model, folder, transformers.AutoConfig.from_pretrained(folder)
        return made[name]

    return get


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_once(tmp_path_factory, CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, saved, paged_run):
    reference, folder, config = saved(name)
    model = load_model(folder, config, torch.float32, "cpu", max_model_len=LENGTH)
    # dynamic RoPE depends on the length; ours is that of max_model_len, so only that length compares
    prompts = sequences(LENGTH) if name == "llama-dynamic" else sequences(1, 2, 33, LENGTH)
    expected = [reference_logits(reference, prompt) for prompt in prompts]
    assert min(logits.std().item() for logits in expected) > 0.3, "the random model says nothing"
    assert largest_difference(paged_run(model, prompts).all_logits(), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-biases-layer-types"])
def test_chunks_and_single_tokens_give_the_same_logits(name, saved, paged_run):
    reference, folder, config = saved(name)
    model = load_model(folder, config, torch.float32, "cpu", max_model_len=LENGTH)
    prompts = sequences(24, 19)
    run = paged_run(model, prompts)
    steps = [[5, 13], [1, 1], [12, 1], [1, 1], [1, 1], [1, 1], [3, 1]]
    pieces = [run.advance(step) for step in steps]
    ours = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    assert largest_difference(ours, [reference_logits(reference, prompt) for prompt in prompts]) < TOLERANCE


def test_float16_checkpoint_computed_in_float32(saved, paged_run, tmp_path):
    reference, _, _ = saved("qwen2")
    copy.deepcopy(reference).half().save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = load_model(tmp_path, config, torch.float32, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    prompts = sequences(20)
    expected = [reference_logits(reread(tmp_path, torch.float32), prompts[0])]
    assert largest_difference(paged_run(model, prompts).all_logits(), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_sixteen_bit_is_as_close_to_the_truth_as_transformers(name, dtype, saved, paged_run):
    reference, folder, config = saved(name)
    prompts = sequences(40)
    truth = reference_logits(reference, prompts[0])
    rounded = reference_logits(reread(folder, dtype), prompts[0]).float()
    ours = paged_run(load_model(folder, config, dtype, "cpu"), prompts).all_logits()[0]
    assert ours.dtype == dtype
    assert (ours.float() - truth).square().mean() < 1.5 * (rounded - truth).square().mean()


def test_embeddings_as_input_and_int32_indices(saved):
    """`inputs_embeds` replaces the look-up and survives; int32 indices do as well as int64."""
    _, folder, config = saved("llama")
    model = load_model(folder, config, torch.float32, "cpu")
    ids, positions = torch.arange(6, dtype=torch.int32), torch.arange(6, dtype=torch.int32)
    for layer in model.attention_layers():
        layer.forward = lambda query, key, value, metadata: query
    with torch.inference_mode():
        embeds = model.embedding_weight()[:6].clone()
        before = embeds.clone()
        from_embeds = model(None, positions, None, inputs_embeds=embeds)
        from_ids = model(ids, positions, None)
    assert torch.equal(from_embeds, from_ids)
    assert torch.equal(embeds, before)


def test_attention_layers_come_in_order_with_their_windows(saved):
    def windows(name):
        _, folder, config = saved(name)
        layers = load_model(folder, config, torch.float32, "cpu").attention_layers()
        assert [layer.layer_idx for layer in layers] == [0, 1, 2]
        return [layer.sliding_window for layer in layers]

    assert windows("mistral") == [9, 9, 9]
    assert windows("qwen2-window") == [None, 7, 7]
    assert windows("qwen3-biases-layer-types") == [7, None, 7]
    assert windows("qwen3") == [None, None, None]


@pytest.mark.parametrize("kind", ["chunked_attention", "sliding_attention"])
def test_unknown_layer_type_and_window_without_size_are_refused(kind):
    config = like_llama(transformers.Qwen2Config)
    config.layer_types = [kind] * 3
    with pytest.raises(UnsupportedModelError, match=r"layer_types\[0\].*supported"):
        Qwen2ForCausalLM(config, dtype=torch.float32, device="meta", max_model_len=8)
