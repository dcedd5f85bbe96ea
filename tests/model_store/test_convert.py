"""The conversion on a tiny GGUF file made here, against the tensors it was made from."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from course_lib.errors import CorruptModelError, UnsupportedModelError
from course_lib.model_store.convert_gguf import convert, hugging_face_name, unpermute

HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE, VOCAB = 2, 1, 16, 32, 64, 8


def permute(rows, num_heads):
    """What llama.cpp does to q and k when it makes a GGUF file, written the long way."""
    dim = rows.shape[0] // num_heads
    order = [
        head * dim + part * (dim // 2) + pair
        for head in range(num_heads)
        for pair in range(dim // 2)
        for part in range(2)
    ]
    return rows[order]


def test_unpermute_undoes_permute():
    rows = np.arange(6 * 64 * 3).reshape(6 * 64, 3)
    assert not np.array_equal(permute(rows, 6), rows)
    assert np.array_equal(unpermute(permute(rows, 6), 6), rows)


@pytest.mark.parametrize(
    ("gguf", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
        ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_names(gguf, expected):
    assert hugging_face_name(gguf) == expected


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "rope_freqs.weight"])
def test_foreign_tensors_are_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=name):
        hugging_face_name(name)


def _write(path, architecture="llama", pre="smollm"):
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "output": (VOCAB, HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * DIM, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * DIM, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * DIM, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * DIM),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INTERMEDIATE),
    }
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|endoftext|>", "<s>", "</s>", "a", "b", "1", "2", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    for add, token in (
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_pad_token_id, 2),
    ):
        add(token)
    writer.add_chat_template("{{ messages }}")
    for name, values in tensors.items():
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        stored = permute(values, heads) if heads else values
        if name == "blk.0.ffn_up":
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_every_tensor_arrives(tmp_path):
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = _write(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
    found = load_file(tmp_path / "tiny" / "model.safetensors")
    assert len(found) == len(tensors) and {values.dtype for values in found.values()} == {
        np.dtype(np.float16)
    }
    for name, values in tensors.items():
        # four bits over a block's range of about four standard deviations; otherwise float16's rounding
        tolerance = 0.25 if name == "blk.0.ffn_up" else 2e-3
        np.testing.assert_allclose(found[hugging_face_name(f"{name}.weight")], values, atol=tolerance)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", output_loading_info=True)
    assert (
        not report["missing_keys"] and not report["unexpected_keys"] and not model.config.tie_word_embeddings
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "tiny").encode("ab12") == [7, 5, 6]


def test_truncated_file(tmp_path):
    _write(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for size in (0, 3, 200, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CorruptModelError, match="not a readable GGUF file"):
            convert(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_architecture_and_tokenizer(tmp_path):
    _write(tmp_path / "falcon.gguf", architecture="falcon")
    with pytest.raises(UnsupportedModelError, match="'falcon'"):
        convert(tmp_path / "falcon.gguf", tmp_path / "out")
    _write(tmp_path / "other.gguf", pre="llama-bpe")
    with pytest.raises(UnsupportedModelError, match="llama-bpe"):
        convert(tmp_path / "other.gguf", tmp_path / "out")
