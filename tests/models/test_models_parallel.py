"""One model on several ranks: the logits of one rank alone, from a part of the weights and the counted traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from course_lib.errors import CorruptModelError
from course_lib.layers.cpu_matmul import is_packed
from course_lib.layers.embedding import LMHead, TokenEmbedding
from course_lib.layers.few_rows_weight import FourBitWeight, HalfWeight
from course_lib.layers.linear import GateUpLinear, Linear, QKVLinear, RowParallelLinear
from course_lib.layers.weights import OtherStage
from course_lib.models import loader
from course_lib.models.causal_lm import CausalLM
from course_lib.models.loader import load_model, read_tensors
from course_lib.models.registry import resolve_model_class
from course_lib.parallel.group import ParallelGroups
from course_lib.parallel.layout import ParallelLayout
from tests.models.test_few_rows_weight import on_a_grid
from tests.models.test_models_parity import like_llama, llama, random_model, save_once, sequences
from tests.parallel.ranks import SilentGroup, run_ranks, silent_ranks

TOLERANCE = 1e-5  # logits have a standard deviation of about 1
CPU = torch.device("cpu")
VOCAB = 157  # of which 2 ranks hold 80 each, 3 ranks 64: the last is padded
CONFIGS = {
    "llama": lambda: llama(vocab_size=VOCAB, tie_word_embeddings=False),
    "llama-tied": lambda: llama(vocab_size=VOCAB, tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-mha": lambda: llama(num_key_value_heads=6),
    "llama-3-kv-heads": lambda: llama(vocab_size=VOCAB, num_key_value_heads=3, tie_word_embeddings=True),
    "mistral": lambda: like_llama(transformers.MistralConfig, sliding_window=9),
    "qwen2": lambda: like_llama(transformers.Qwen2Config, tie_word_embeddings=True),
    "qwen3": lambda: like_llama(
        transformers.Qwen3Config, head_dim=32, attention_bias=True, use_sliding_window=True, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_once(tmp_path_factory, CONFIGS)


def load(saved, name, parallel: ParallelGroups | None = None, dtype=torch.float32, **arguments) -> CausalLM:
    _, folder, config = saved(name)
    return load_model(folder, config, dtype, CPU, max_model_len=64, parallel=parallel, **arguments)


# ---- the same logits --------------------------------------------------------------------------------

LAYOUTS = [
    *((name, ParallelLayout(tensor=2)) for name in CONFIGS if name != "llama-3-kv-heads"),
    *((name, ParallelLayout(tensor=3)) for name in ("llama-mha", "llama-3-kv-heads")),  # 112 inner: 38, 37, 37
    *((name, ParallelLayout(tensor=6)) for name in ("llama", "llama-biases", "qwen3")),  # 2 KV heads
    *((name, ParallelLayout(pipeline=2)) for name in CONFIGS if name != "llama-3-kv-heads"),
    ("llama-tied", ParallelLayout(tensor=2, pipeline=3)),
]


def layout_id(value: object) -> str | None:
    return f"tp{value.tensor}-pp{value.pipeline}" if isinstance(value, ParallelLayout) else None


@pytest.mark.parametrize("name, layout", LAYOUTS, ids=layout_id)
def test_logits_equal_those_of_one_rank(name, layout, saved, paged_run):
    """Prompts in chunks, then single tokens, through a cache of each rank's own heads and layers."""
    prompts, steps = sequences(21, 13), [[16, 12], [4, 0], [1, 1]]

    def work(parallel: ParallelGroups) -> list[torch.Tensor]:
        run = paged_run(load(saved, name, parallel), prompts)
        return [logits for step in steps for logits in run.advance(step)]

    (expected,) = run_ranks(ParallelLayout(), work)
    assert torch.cat(expected).std() > 0.3, "the random model says nothing"
    results = run_ranks(layout, work)
    for rank, found in enumerate(results):
        if layout.coordinates(rank).pipeline < layout.pipeline - 1:
            assert found == []
            continue
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape and ours.is_contiguous()
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name, ranks", [("llama", 2), ("llama-tied", 2), ("llama-mha", 3)])
def test_every_rank_has_the_same_logits_to_the_bit(name, ranks, saved, paged_run):
    """They all sample, each for itself: one differing bit could be one differing token."""
    prompts = sequences(9)
    results = run_ranks(
        ParallelLayout(ranks), lambda parallel: paged_run(load(saved, name, parallel), prompts).all_logits()[0]
    )
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_embeddings_as_input_of_the_first_stage(saved, paged_run):
    (table,) = run_ranks(ParallelLayout(), lambda parallel: load(saved, "llama", parallel).embedding_weight())
    ids = torch.tensor([3, 150, 80, 79])

    def work(parallel: ParallelGroups) -> tuple[torch.Tensor, torch.Tensor]:
        model = load(saved, "llama", parallel)
        for layer in model.attention_layers():
            layer.forward = lambda query, key, value, metadata: query
        positions = torch.arange(len(ids))
        return model(ids, positions, None), model(None, positions, None, inputs_embeds=table[ids])

    for from_ids, from_embeds in run_ranks(ParallelLayout(2), work):
        assert torch.equal(from_ids, from_embeds)


# ---- traffic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, ranks, rows", [("llama", 2, 80), ("llama-3-kv-heads", 3, 64)])
def test_bytes_per_token_are_two_all_reduces_a_layer_one_for_the_embedding_and_the_logits(
    name, ranks, rows, saved, paged_run
):
    tokens, layers, hidden = 5, 3, 96

    def work(parallel: ParallelGroups):
        run = paged_run(load(saved, name, parallel), sequences(tokens))
        before = replace(parallel.tensor.traffic)
        run.all_logits()
        return before, parallel.tensor.traffic

    for before, after in run_ranks(ParallelLayout(ranks), work):
        assert before.bytes == 0  # loading needs nobody
        assert after.all_reduce_bytes == tokens * (2 * layers + 1) * hidden * 4
        assert after.all_reduce_calls == 2 * layers + 1
        assert after.gather_bytes == tokens * rows * 4 and after.gather_calls == 1
        assert after.sent_bytes == 0


def test_a_stage_hands_on_two_hidden_states_per_token(saved, paged_run):
    def work(parallel: ParallelGroups) -> int:
        paged_run(load(saved, "llama", parallel), sequences(5)).all_logits()
        return parallel.pipeline.traffic.sent_bytes

    assert run_ranks(ParallelLayout(pipeline=3), work) == [2 * 5 * 96 * 4, 2 * 5 * 96 * 4, 0]


# ---- a part of the weights --------------------------------------------------------------------------


def own_parts(model: CausalLM) -> dict[str, tuple[tuple[slice, ...], torch.Tensor]]:
    """name -> (which part of the checkpoint tensor, what is in its place)."""
    return {name: (slot.source, slot.parameter.data[slot.rows]) for name, slot in model.slots.items()}


@pytest.mark.parametrize(
    "layout", [ParallelLayout(2), ParallelLayout(3), ParallelLayout(6), ParallelLayout(2, 2)], ids=layout_id
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ranks_hold_every_element_of_the_checkpoint_and_read_nothing_else(layout, tied, tmp_path, monkeypatch):
    """Each element is held once; norms, the bias behind a sum and replicated KV heads several times."""
    heads = 6 if layout.tensor == 3 else 2
    config = llama(
        vocab_size=VOCAB, num_key_value_heads=heads, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
    )
    random_model(config).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tensors = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    read = 0

    def counted(stored: loader.StoredTensor, part: tuple[slice, ...]) -> torch.Tensor:
        nonlocal read
        tensor = stored._slice[part]
        read += tensor.nbytes
        return tensor

    monkeypatch.setattr(loader.StoredTensor, "__getitem__", counted)
    times_held = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for parallel in silent_ranks(layout):
        read = 0
        model = load_model(tmp_path, config, torch.float32, CPU, parallel=parallel)
        parts = own_parts(model)
        assert read == sum(tensors[name][part].nbytes for name, (part, _) in parts.items())
        for name, (part, held) in parts.items():
            assert torch.equal(held, tensors[name][part].expand_as(held)), name
            times_held[name][part] += 1
    replicas = max(1, layout.tensor // heads)
    for name, times in times_held.items():
        expected = 1
        if "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias")):
            expected = layout.tensor
        elif "k_proj" in name or "v_proj" in name:
            expected = replicas
        elif "embed_tokens" in name and tied and layout.pipeline > 1:
            expected = 2
        assert (times == expected).all(), name


def held_bytes(config, parallel: ParallelGroups | None = None) -> int:
    model = resolve_model_class(config)(
        config, parallel=parallel, dtype=torch.bfloat16, device="meta", max_model_len=8
    )
    return sum(parameter.nbytes for parameter in model.parameters())


def test_a_rank_of_the_course_model_holds_a_third(course_model_path):
    config = transformers.AutoConfig.from_pretrained(course_model_path)
    whole = held_bytes(config)
    for parallel in silent_ranks(ParallelLayout(3)):
        assert 1 / 3 <= held_bytes(config, parallel) / whole < 1.001 / 3


def test_stages_of_the_course_model_hold_their_layers_and_the_tied_table_is_at_both_ends(course_model_path):
    config = transformers.AutoConfig.from_pretrained(course_model_path)
    table, norm = 2 * config.vocab_size * config.hidden_size, 2 * config.hidden_size
    layers = held_bytes(config) - table - norm
    found = [held_bytes(config, parallel) for parallel in silent_ranks(ParallelLayout(pipeline=3))]
    assert found == [layers // 3 + table, layers // 3, layers // 3 + table + norm]


def test_layers_keep_their_numbers_on_every_stage(saved):
    for parallel, own in zip(silent_ranks(ParallelLayout(pipeline=2)), ([0, 1], [2]), strict=True):
        model = load(saved, "qwen3", parallel)
        assert [layer.layer_idx for layer in model.attention_layers()] == own
        assert [i for i, layer in enumerate(model.model.layers) if not isinstance(layer, OtherStage)] == own
        assert {name.split(".")[2] for name in model.slots if ".layers." in name} == set(map(str, own))
        assert [layer.sliding_window for layer in model.attention_layers()] == [[7, None, 7][i] for i in own]


@pytest.mark.parametrize("layout", [ParallelLayout(2), ParallelLayout(6), ParallelLayout(2, 2)], ids=layout_id)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_dummy_weights_are_parts_of_the_same_model(name, layout, saved):
    whole = own_parts(load(saved, name, load_format="dummy", seed=3))
    for parallel in silent_ranks(layout):
        for tensor, (part, held) in own_parts(load(saved, name, parallel, load_format="dummy", seed=3)).items():
            full = whole[tensor][1]
            expected = full[: len(held)] if "q_norm" in tensor or "k_norm" in tensor else full[part]
            assert torch.equal(held, expected), tensor
    matrices = [held for tensor, (_, held) in whole.items() if held.dim() == 2 and "norm" not in tensor]
    assert all(abs(matrix.std() / loader.DUMMY_STD - 1) < 0.1 for matrix in matrices)
    assert len({matrix[0, 0].item() for matrix in matrices}) == len(matrices), "two tensors are the same"


def test_whole_tensors_from_a_trainer_fill_each_ranks_part(saved, tmp_path):
    _, folder, _ = saved("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    doubled = {name: tensor * 2 for name, tensor in tensors.items()}
    save_file(doubled, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for parallel in silent_ranks(ParallelLayout(2, 2)):
        model = load(saved, "llama-tied", parallel)
        assert model.load_weights(doubled.items()) == model.slots.keys()
        expected = load_model(tmp_path, saved("llama-tied")[2], torch.float32, CPU, parallel=parallel)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_shapes_are_those_of_the_whole_checkpoint(saved):
    """Also where this rank's own part would fit."""
    parallel = silent_ranks(ParallelLayout(2))[0]
    model = load(saved, "llama", parallel)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CorruptModelError, match=r"\[56, 96\].*\[112, 96\]"):
        model.load_weights([(name, torch.ones(56, 96))])
    with pytest.raises(CorruptModelError, match=r"\[120, 96\].*\[112, 96\]"):
        model.load_weights([(name, torch.ones(120, 96))])
    with pytest.raises(CorruptModelError, match="unexpected tensor 'model.layers.3."):
        model.load_weights([("model.layers.3.mlp.up_proj.weight", torch.ones(112, 96))])


def test_a_stage_leaves_tensors_of_other_stages_to_them(saved):
    first, last = (load(saved, "llama", parallel) for parallel in silent_ranks(ParallelLayout(pipeline=2)))
    foreign = [("model.layers.2.mlp.up_proj.weight", torch.ones(1)), ("lm_head.weight", torch.ones(1))]
    assert first.load_weights(foreign) == set()
    assert last.load_weights([("model.embed_tokens.weight", torch.ones(1))]) == set()
    with pytest.raises(CorruptModelError, match=r"model.layers.2.mlp.up_proj.weight.*\[1\]"):
        last.load_weights(foreign)


def test_a_head_that_differs_from_the_tied_table_is_refused_by_the_rank_that_holds_the_row(saved):
    _, folder, _ = saved("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[100] += 1
    first, second = (load(saved, "llama-tied", parallel) for parallel in silent_ranks(ParallelLayout(2)))
    first.load_weights([*tensors.items(), ("lm_head.weight", head)])
    with pytest.raises(CorruptModelError, match="tie_word_embeddings"):
        second.load_weights([*tensors.items(), ("lm_head.weight", head)])
    with pytest.raises(CorruptModelError, match=r"lm_head.weight.*\[90, 96\]"):
        first.load_weights([*tensors.items(), ("lm_head.weight", head[:90])])


# ---- layers by themselves ---------------------------------------------------------------------------

WHERE = dict(dtype=torch.float32, device=CPU)


def fill(module: torch.nn.Module, **tensors: torch.Tensor) -> None:
    """Fill a sharded module's parameters from whole tensors."""
    for name, slot in module.shards():
        slot.fill(tensors[name])


def test_the_bias_behind_a_sum_is_added_once():
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((7, 10), (7,), (3, 10)))

    def work(parallel: ParallelGroups) -> torch.Tensor:
        layer = RowParallelLinear(10, 7, bias=True, group=parallel.tensor, **WHERE)
        fill(layer, weight=weight, bias=bias)
        return layer(x[:, layer.columns.start : layer.columns.stop])

    expected = torch.nn.functional.linear(x, weight, bias)
    for ranks in (1, 2, 3):
        for found in run_ranks(ParallelLayout(ranks), work):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_tables_of_a_vocabulary_that_leaves_a_rank_without_tokens():
    """30 tokens on 3 ranks, 16 rows each: the third holds padding alone."""
    table = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    ids, hidden = torch.tensor([29, 0, 15, 16, 29], dtype=torch.int32), torch.randn(4, 8)

    def work(parallel: ParallelGroups):
        embedding = TokenEmbedding(30, 8, group=parallel.tensor, **WHERE)
        head = LMHead(8, 30, group=parallel.tensor, **WHERE)
        for module in (embedding, head):
            fill(module, weight=table)
        return embedding(ids), head(hidden), len(embedding.weight), embedding.weight[embedding.vocab.num_tokens :]

    for found, logits, rows, padding in run_ranks(ParallelLayout(3), work):
        assert torch.equal(found, table[ids])
        torch.testing.assert_close(logits, hidden @ table.T, atol=1e-5, rtol=0)
        assert rows == 16 and not padding.any()


@pytest.mark.parametrize(
    "ranks, heads, kv_heads, held",
    [
        (3, 9, 3, [([0, 1, 2], [0]), ([3, 4, 5], [1]), ([6, 7, 8], [2])]),
        (2, 4, 4, [([0, 1], [0, 1]), ([2, 3], [2, 3])]),
        (4, 8, 2, [([0, 1], [0]), ([2, 3], [0]), ([4, 5], [1]), ([6, 7], [1])]),
        (2, 6, 1, [([0, 1, 2], [0]), ([3, 4, 5], [0])]),
    ],
)
def test_query_heads_are_with_their_kv_head(ranks, heads, kv_heads, held):
    for rank, (query, kv) in enumerate(held):
        layer = QKVLinear(8, 1, heads, kv_heads, bias=False, group=SilentGroup(rank, ranks), **WHERE)
        assert [list(part) for part in layer.shares] == [query, kv, kv]
        assert (layer.num_heads, layer.num_kv_heads) == (len(query), len(kv))
        assert layer.weight.shape == (len(query) + 2 * len(kv), 8)


@pytest.mark.parametrize("ranks, heads, kv_heads", [(2, 9, 3), (2, 6, 3), (6, 6, 4)])
def test_heads_that_do_not_divide_are_refused(ranks, heads, kv_heads):
    with pytest.raises(ValueError, match=f"^{ranks} tensor-parallel ranks.*{heads} query heads and {kv_heads} KV"):
        QKVLinear(8, 1, heads, kv_heads, bias=False, group=SilentGroup(0, ranks), **WHERE)


def test_a_group_of_one_does_nothing_that_a_plain_layer_does_not(saved):
    """The same calls of torch, and no tensor that is not needed."""
    solo = ParallelGroups.solo().tensor
    row, plain = RowParallelLinear(6, 4, bias=True, group=solo, **WHERE), Linear(6, 4, bias=True, **WHERE)
    head, embedding = LMHead(6, 37, group=solo, **WHERE), TokenEmbedding(37, 6, group=solo, **WHERE)
    assert len(head.weight) == len(embedding.weight) == 37  # not padded
    x = torch.ones(1, 6)

    def calls(work) -> list[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work()
        return [event.name for event in profile.events()]

    assert calls(lambda: row(x)) == calls(lambda: plain(x))
    assert calls(lambda: head(x)) == calls(lambda: Linear.forward(head, x))
    ids = torch.tensor([3])
    assert calls(lambda: embedding(ids)) == calls(lambda: torch.nn.functional.embedding(ids, embedding.weight))


# ---- packed weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parts_are_packed_and_have_their_forms_for_few_rows(packed_by, tied, tmp_path, paged_run):
    config = llama(
        vocab_size=VOCAB, hidden_size=64, head_dim=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, num_hidden_layers=1, tie_word_embeddings=tied,
    )  # fmt: skip
    source = random_model(config)
    for matrix in (source.model.layers[0].self_attn.o_proj.weight, source.model.layers[0].mlp.down_proj.weight):
        matrix.data = on_a_grid(*matrix.shape).to(matrix)
    source.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    prompts, steps = sequences(4), [[3], [1]]

    def work(parallel: ParallelGroups):
        model = load_model(tmp_path, config, torch.bfloat16, CPU, parallel=parallel)
        plain = [logits for run in [paged_run(model, prompts)] for step in steps for logits in run.advance(step)]
        model.pack_weights()
        layer = model.model.layers[0]
        assert all(is_packed(linear.weight) for linear in model.modules() if isinstance(linear, Linear))
        assert isinstance(layer.mlp.down_proj.few_rows, FourBitWeight)
        assert isinstance(layer.self_attn.o_proj.few_rows, FourBitWeight)
        assert isinstance(model.few_rows_head, HalfWeight) == (tied and packed_by == "oneDNN")
        packed = [logits for run in [paged_run(model, prompts)] for step in steps for logits in run.advance(step)]
        stored = read_tensors(tmp_path / "model.safetensors")
        model.load_weights((name, tensor[()] * 0) for name, tensor in stored)
        assert not model.compute_logits(torch.ones(1, 64).bfloat16()).any()
        return torch.cat(plain), torch.cat(packed)

    (alone, _), = run_ranks(ParallelLayout(), work)
    for plain, packed in run_ranks(ParallelLayout(2), work):
        spread = alone.float().std()
        assert (packed - plain).float().abs().max() < 0.05 * spread
        assert (packed - alone).float().abs().max() < 0.05 * spread


def test_transposed_products_of_few_rows_work_on_shares():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(10, 6, generator=generator), torch.randn(4, 6, generator=generator)
    for rank in range(3):
        layer = GateUpLinear(6, 10, bias=False, group=SilentGroup(rank, 3), **WHERE)
        parts = dict(layer.parts())
        parts["gate_proj.weight"].fill(weight)
        parts["up_proj.weight"].fill(-weight)
        own = weight[parts["gate_proj.weight"].source]
        assert len(own) == (4 if rank == 0 else 3)
        torch.testing.assert_close(layer(x), torch.cat((x @ own.T, x @ -own.T), dim=1), atol=1e-5, rtol=0)
