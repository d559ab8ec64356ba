"""A checkpoint as a GGUF file with all matrices in Q4_0, for llama.cpp and OpenVINO; needs the package gguf."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import quantize
from text_checkpoint import read_matrix, tensors, text_config

__all__ = ["bytes_a_token", "finish", "rounded_matrix", "write_gguf"]

_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_AT_ONCE = 2048  # rows that are rounded together: the float32 copies stay small


def write_gguf(checkpoint: Path, path: Path, *, head_twice: bool = False, sections: Sequence[int] = ()) -> None:
    """Also the embedding, which is the language head, is in Q4_0: the fewest bytes a token.

    Parameters
    ----------
    checkpoint, path
        From where to where.
    head_twice
        Write the language head as a matrix of its own, for a reader that would turn the shared one into floats.
    sections
        Of a head's rotations, those of time, rows and columns: the text model of a Qwen2.5-VL that is to read images.
    """
    config = text_config(checkpoint)
    writer = gguf.GGUFWriter(path, "qwen2vl" if sections else "qwen2")
    if sections:
        writer.add_rope_dimension_sections([*sections, 0])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    _add_tokenizer(writer, config["vocab_size"])
    with ThreadPoolExecutor(2) as pool:
        for name, values in tensors(checkpoint):
            if values.ndim == 1:
                writer.add_tensor(_gguf_name(name), read_matrix(values))
                continue
            rounded = rounded_matrix(values, gguf.GGMLQuantizationType.Q4_0, pool)
            writer.add_tensor(_gguf_name(name), rounded, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
            if head_twice and name == "model.embed_tokens.weight":
                writer.add_tensor("output.weight", rounded, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    finish(writer)


def rounded_matrix(
    values: npt.NDArray[np.uint16], kind: gguf.GGMLQuantizationType, pool: ThreadPoolExecutor
) -> npt.NDArray[np.uint8]:
    """bfloat16 bit patterns (rows, columns) in blocks of 32 columns."""
    parts = [values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE)]
    return np.concatenate(list(pool.map(lambda part: quantize(read_matrix(part), kind), parts)))


def finish(writer: gguf.GGUFWriter) -> None:
    """Write all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bytes_a_token(path: Path) -> int:
    """Bytes of the matrices that every token is multiplied with."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in ("model.embed_tokens", "model.norm", "lm_head"):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem] + f".{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Bytes and filler: both libraries want a tokenizer, and nobody gives them text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(rest))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    special = ["<|endoftext|>", "<|im_end|>"]
    filler = [f"<|filler_{index}|>" for index in range(vocab_size - len(letters) - 2)]
    writer.add_token_list([*letters, *special, *filler])
    kinds = [gguf.TokenType.NORMAL] * len(letters) + [gguf.TokenType.CONTROL] * 2
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(filler))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(letters))
    writer.add_eos_token_id(len(letters) + 1)
    writer.add_add_bos_token(False)
