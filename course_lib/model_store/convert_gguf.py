"""A GGUF file of a Llama model → a folder in Hugging Face's format, in float16.

Owns the two things the formats disagree about. Names: a table. Rotary embeddings: GGUF interleaves the
two halves of every head (rows 0, d/2, 1, d/2+1, …), Hugging Face keeps them apart, so the rows of q
and k are put back. Weights are dequantised: each value is scale × integer + minimum, in float32, then
rounded to float16. Source of the permutation: llama.cpp, `conversion` of LlamaForCausalLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from course_lib.errors import CorruptModelError, UnsupportedModelError
from course_lib.model_store.gguf_tokenizer import write_tokenizer

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Path, folder: Path, *, progress: bool = False) -> None:
    """Write config, tokenizer, chat template and `model.safetensors` into the new `folder`.

    Raises CorruptModelError (not a readable GGUF file), UnsupportedModelError (another architecture).
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(gguf)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CorruptModelError(
            f"{gguf} is not a readable GGUF file ({error}): delete it and try again."
        ) from error
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(f"{gguf} holds a {architecture!r} model; only 'llama' can be converted.")
    tensors = _tensors(reader, fields, progress)
    folder.mkdir(parents=True)
    write_tokenizer(folder, fields)
    _write_json(folder / "config.json", _config(fields, tied="lm_head.weight" not in tensors))
    _write_json(folder / "generation_config.json", _special_ids(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private; the other files are not


def hugging_face_name(name: str) -> str:
    """ "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight"."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        if part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    elif stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    raise UnsupportedModelError(f"The GGUF tensor {name!r} belongs to no plain Llama model.")


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's interleaving of rotary halves: [heads * dim, …] → the same shape."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _tensors(reader: Any, fields: dict[str, Any], progress: bool) -> dict[str, np.ndarray]:
    from gguf import dequantize
    from tqdm import tqdm

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="converting", unit=" tensors", disable=not progress):
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        for part, num_heads in heads.items():
            if f".{part}." in tensor.name:
                values = unpermute(values, num_heads)
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(values)
    return tensors


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    theta = float(fields["llama.rope.freq_base"])
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # stored as float32: 9.999999747378752e-06 is 1e-05
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": "float16",
        **_special_ids(fields),
    }


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
