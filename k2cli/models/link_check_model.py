"""The model of ``k2 doctor --deep``: small, but with hidden states as wide as those of Kimi K2.

The messages between ranks depend on the width of the hidden states and on nothing else of a model.
The same bytes come out on every machine, so each node makes its own copy. The weights are random;
they are packed with 4 bits, so that they are drawn as bytes.
"""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error
from k2cli.models.files import folder_being_made, remove_leftovers
from k2cli.models.safetensors_writer import ShardWriter, TensorSpec
from k2cli.models.text.tiktoken_bpe import byte_letters

FOLDER_NAME = "link-check-model-1"
"""Of a folder with this version of the model."""

_HIDDEN, _LAYERS, _HEADS, _HEAD_WIDTH, _INNER = 7168, 2, 8, 64, 512
_VOCABULARY, _LETTERS = 512, 256
_BITS, _GROUP = 4, 64
_PIECE_BYTES = 2**20
_OLD_SECONDS = 600.0
"""To make the model takes seconds."""


def make_link_check_model(folder: Path) -> Path:
    """Make the model in ``folder`` unless it is there; return the absolute path.

    What a process that was killed long ago has left of it is removed.

    Raises:
        K2Error: if the folder cannot be written.
    """
    folder = folder.absolute()
    remove_leftovers(folder, older_than_seconds=_OLD_SECONDS)
    if (folder / "config.json").is_file():
        return folder
    documents = {
        "config.json": _config(),
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizer"},
    }
    try:
        with folder_being_made(folder) as temporary:
            _write_weights(temporary)
            for name, document in documents.items():
                text = json.dumps(document, indent=1) + "\n"
                (temporary / name).write_text(text, encoding="utf-8")
    except K2Error:
        if not (folder / "config.json").is_file():  # another process was faster
            raise
    return folder


def _config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "head_dim": _HEAD_WIDTH,
        "intermediate_size": _INNER,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": _LETTERS,
        "quantization": {"group_size": _GROUP, "bits": _BITS, "mode": "affine"},
    }


def _tokenizer() -> dict[str, Any]:
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
               "use_regex": False}  # fmt: skip
    end = {"id": _LETTERS, "content": "<eos>", "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}  # fmt: skip
    vocabulary = {letter: number for number, letter in enumerate(byte_letters())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": letters,
        "post_processor": None,
        "decoder": letters,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _matrices() -> Iterator[tuple[str, int, int]]:
    """Yield name, outputs and inputs of each matrix."""
    yield "model.embed_tokens", _VOCABULARY, _HIDDEN
    wide = _HEADS * _HEAD_WIDTH
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{prefix}.self_attn.{name}", wide, _HIDDEN
        yield f"{prefix}.self_attn.o_proj", _HIDDEN, wide
        yield f"{prefix}.mlp.gate_proj", _INNER, _HIDDEN
        yield f"{prefix}.mlp.up_proj", _INNER, _HIDDEN
        yield f"{prefix}.mlp.down_proj", _HIDDEN, _INNER
    yield "lm_head", _VOCABULARY, _HIDDEN


def _norms() -> Iterator[str]:
    for layer in range(_LAYERS):
        yield f"model.layers.{layer}.input_layernorm.weight"
        yield f"model.layers.{layer}.post_attention_layernorm.weight"
    yield "model.norm.weight"


def _write_weights(folder: Path) -> None:
    specs = [TensorSpec(name, "BF16", (_HIDDEN,)) for name in _norms()]
    for name, outputs, inputs in _matrices():
        groups = (outputs, inputs // _GROUP)
        specs += [
            TensorSpec(f"{name}.weight", "U32", (outputs, inputs * _BITS // 32)),
            TensorSpec(f"{name}.scales", "BF16", groups),
            TensorSpec(f"{name}.biases", "BF16", groups),
        ]
    inputs_of = {name: inputs for name, _, inputs in _matrices()}
    with ShardWriter(folder, specs) as writer:
        for spec in specs:
            matrix, _, kind = spec.name.rpartition(".")
            if matrix not in inputs_of:
                writer.write(spec.name, 0, _repeated(1.0, spec.nbytes))
            elif kind == "weight":
                source = random.Random(zlib.crc32(matrix.encode()))
                for offset in range(0, spec.nbytes, _PIECE_BYTES):
                    count = min(_PIECE_BYTES, spec.nbytes - offset)
                    writer.write(spec.name, offset, source.randbytes(count))
            else:
                scale = _scale(matrix, inputs_of[matrix])
                value = scale if kind == "scales" else -scale * (2**_BITS - 1) / 2
                writer.write(spec.name, 0, _repeated(value, spec.nbytes))


def _scale(matrix: str, inputs: int) -> float:
    """Return the scale with which a matrix keeps the size of its input."""
    highest = 2**_BITS - 1
    spread = 1.0 if matrix.endswith("embed_tokens") else 1 / math.sqrt(inputs)
    return spread / math.sqrt(highest * (highest + 2) / 12)


def _repeated(value: float, nbytes: int) -> bytes:
    """Return a number in bfloat16, the upper half of float32, as often as it fits."""
    return struct.pack("<f", value)[2:] * (nbytes // 2)
