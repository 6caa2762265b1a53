"""The synthetic model as GGUF, for llama.cpp and for PowerInfer."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from synthetic.shape import FIRST_WORD, NORM_EPS, PREDICTOR, ROPE_BASE, Shape, tokens

__all__ = ["Gguf"]

POWERINFER_MAGIC = b"PWRI"
NAMES = {
    "embed": "token_embd",
    "head": "output",
    "norm": "output_norm",
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "router": "ffn_gate_inp",
}


class Gguf:
    """A GGUF file for llama.cpp; with `predictor` for PowerInfer, which transposes `ffn_down` and has its own magic."""

    def __init__(self, path: Path, shape: Shape, kind: Type, *, predictor: bool) -> None:
        self._path, self._shape, self._kind, self._predictor = path, shape, kind, predictor
        self._writer = gguf.GGUFWriter(path, "llama")
        self._describe(path.stem)
        self._names: list[str] = []
        # Experts of a stack that is not complete.
        self._stack: list[npt.NDArray[Any]] = []
        self.nbytes = 0
        for name, size in shape.tensors():
            part = name.rpartition(".")[2]
            if part in PREDICTOR and not predictor:
                continue
            if self._transposed(part):
                size = size[::-1]
            self._names.append(name)
            if ".experts." in name:
                if ".experts.0." not in name:
                    continue
                size = (shape.experts, *size)
            kind = Type.F32 if part == "router" else self._type(size)
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(size) // block * nbytes
            self._writer.add_tensor_info(self._published(name), size, np.float16, nbytes, raw_dtype=kind)
            self.nbytes += nbytes
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()

    def write(self, name: str, values: Tensor) -> None:
        """Write the tensor if this file has it."""
        if not self._names or name != self._names[0]:
            return
        self._names.pop(0)
        part = name.rpartition(".")[2]
        if part in ("q", "k"):
            # The two channels that RoPE turns together are neighbours in GGUF, half a head apart in transformers.
            size = self._shape.head_dim
            values = values.view(-1, 2, size // 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        elif self._transposed(part):
            values = values.T
        # The router stays in float32, as in what llama.cpp's converter writes.
        kind = Type.F32 if part == "router" else self._type(tuple(values.shape))
        half = kind == Type.F16
        data = values.half().contiguous().numpy() if half else gguf.quantize(values.contiguous().numpy(), kind)
        if ".experts." in name:
            self._stack.append(data)
            if len(self._stack) < self._shape.experts:
                return
            data, self._stack = np.stack(self._stack), []
        self._writer.write_tensor_data(data)

    def close(self) -> None:
        """Close the file; PowerInfer's magic is written last, so that only a whole file has it."""
        self._writer.close()
        if self._predictor and not self._names:
            with self._path.open("r+b") as file:
                file.write(POWERINFER_MAGIC)

    def _transposed(self, part: str) -> bool:
        return self._predictor and part == "down"

    def _type(self, shape: tuple[int, ...]) -> Type:
        return self._kind if len(shape) > 1 else Type.F32

    def _published(self, name: str) -> str:
        if "." not in name:
            return f"{NAMES[name]}.weight"
        _, layer, *expert, part = name.split(".")
        end = "_exps" if expert else "_t" if self._transposed(part) else ""
        return f"blk.{layer}.{NAMES.get(part, part)}{end}.weight"

    def _describe(self, name: str) -> None:
        writer, shape = self._writer, self._shape
        writer.add_name(f"synthetic {name}")
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn)
        if shape.experts:
            writer.add_expert_count(shape.experts)
            writer.add_expert_used_count(shape.used)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(ROPE_BASE)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_layer_norm_rms_eps(NORM_EPS)
        writer.add_vocab_size(shape.vocab)
        file_types = {Type.F16: "MOSTLY_F16", Type.Q8_0: "MOSTLY_Q8_0", Type.Q4_0: "MOSTLY_Q4_0"}
        writer.add_file_type(gguf.LlamaFileType[file_types[self._kind]])
        if self._kind != Type.F16:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if self._predictor:
            writer.add_float32("powerinfer.sparse_threshold", 0.0)
        words = shape.vocab - FIRST_WORD
        kinds = gguf.TokenType
        writer.add_tokenizer_model("llama")
        writer.add_token_list([token if i < FIRST_WORD else f"▁{token}" for i, token in enumerate(tokens(shape.vocab))])
        writer.add_token_scores([0.0] * FIRST_WORD + [-float(i) for i in range(words)])
        writer.add_token_types(
            [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * words]
        )
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
