"""Generated files of a checkpoint: each is read, or refused with its name."""

from __future__ import annotations

import base64
import gzip
import json
import os
import struct
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from k2cli.errors import K2Error
from k2cli.models.checkpoint import INDEX_NAME, read_checkpoint, read_config
from k2cli.models.gguf.convert import convert_gguf, gguf_checkpoint
from k2cli.models.json_files import read_generation_config
from k2cli.models.safetensors_header import read_safetensors_header
from k2cli.models.safetensors_writer import TensorSpec, safetensors_header
from k2cli.models.sources import hub_headers
from k2cli.models.text.chat_template import ChatTemplate, read_chat_templates
from k2cli.models.text.tiktoken_bpe import read_ranks
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.server.served_model import served_model_from
from tests.hostile.mutation import (
    as_json,
    bounded,
    damaged,
    generated,
    mutated,
    mutated_json,
    mutated_text,
    reads_or_refuses,
)
from tests.models.gguf_files import original_weights, write_llama
from tests.models.text.test_sentencepiece import train

TEXT = "Hello, \u4e16\u754c \U0001f600 <|im_end|> 123"
CONFIG: dict[str, Any] = {
    "model_type": "kimi_k2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 100, "eos_token_id": [1, 2], "rope_scaling": {"type": "yarn", "factor": 32.0},
    "quantization_config": {"bits": 4, "group_size": 32}, "text_config": {"hidden_size": 64},
}  # fmt: skip
GENERATION = {"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "max_length": 9}
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [
        {"id": 260, "content": "<|im_end|>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True},
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"}, "behavior": "Isolated",
         "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A",
        "type_id": 0}}], "pair": [], "special_tokens": {}},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True},
    "model": {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "merges": [["H", "e"], ["l", "l"], ["He", "ll"]],
        "vocab": {"H": 0, "e": 1, "l": 2, "o": 3, "He": 4, "ll": 5, "Hell": 6, "1": 7},
    },
}  # fmt: skip
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": {"content": "[EOS]"},
    "pad_token": None, "added_tokens_decoder": {
        "256": {"content": "[BOS]", "special": True}, "257": {"content": "[EOS]", "special": True},
        "258": {"content": "<|im_end|>", "special": False},
    },
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"},
                      {"name": "tool_use", "template": "{{ tools | tojson }}"}],
}  # fmt: skip
TEMPLATE = """\
{%- macro show(turn) -%}{{ turn.role | upper }}: {{ turn['content'] | trim }}{%- endmacro -%}
{% set ns = namespace(last=0) %}
{% for message in messages %}
{% if message.role == 'tool' %}{{ raise_exception('no tools: ' ~ loop.index0) }}{% endif %}
{% generation %}{{ show(message) ~ '\\n' }}{% endgeneration %}
{% set ns.last = 12 + loop.index * 3 %}
{% if loop.index > 40 %}{% break %}{% endif %}
{% endfor %}{{ tools | tojson(indent=2) if tools else '' }}{{ strftime_now('%Y') }}{{ 2 + 3 }}
{{ '%s' | format(ns.last) }}{{ messages[-1:] | length }}{{ bos_token | default('x') * 2 }}
{% if add_generation_prompt %}<assistant>{% endif %}"""
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "2"}]
HOSTILE_TEMPLATES = (
    "{{ '" + "9" * 5000 + "' | int }}", "{{ " + "9" * 5000 + " }}", "{{ 2 ** 9999 }}",
    "{{ '\\ud800' }}", "{{ messages | tojson }}", "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__ }}", "{% include 'x' %}", "{% import 'x' as x %}", "{% extends messages %}",
    "{{ self }}", "{{ messages[5].content }}", "{{ strftime_now('%') }}", "{{ strftime_now(5) }}",
    "{% for a in range(100001) %}{% endfor %}", "{{ 'a' | tojson(indent=messages) }}",
    "{{ strftime_now('\\ud800') }}", "{{ strftime_now('\\x00') }}", "{% macro a() %}{{ a() }}"
    "{% endmacro %}{{ a() }}", "{{ raise_exception(messages) }}", "{{ raise_exception() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "[" * 300 + "]" * 300 + " }}",
    "{{ " + "not " * 3000 + "1 }}", "{{ 1" + " + 1" * 20_000 + " }}", "{% if 1 %}" * 300,
    "{% if 1 %}" * 90 + "{% endif %}" * 90, "{{ messages" + ".a" * 5000 + " }}", "{%",
    "{{ 1 | x }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ 5 % 0 }}",
    "{{ -'a' }}",
    "{% set x = [] %}{% set _ = x.append(x) %}{{ x | tojson }}", "{{ x | attr('__init__') }}",
    "{{ '%99999d' | format(1) }}", "{{ 'a'.encode('utf-7') }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ messages | map('upper') | list }}", "{{ [1, 'a'] | sort }}", "{{ 1 | batch(0) | list }}",
    "{{ dict(messages) }}", "{{ cycler() }}", "{{ lipsum(n=1) }}", "{{ joiner() }}",
    "{{ '\\N{x}' }}",
    "{% set ns = namespace(5) %}", "{% filter x %}{% endfilter %}", "{{ 1e999 }}", "{{ 1_0 }}",
    "{% set messages.a = 5 %}", "{{ None[0] }}", "{{ undefined.a.b }}", "\ud800", "{{ loop }}",
)  # fmt: skip
SPECS = [
    TensorSpec("model.embed.weight", "BF16", (8, 4)), TensorSpec("model.a.weight", "U32", (4, 4)),
    TensorSpec("model.a.scales", "F16", (4, 1)), TensorSpec("b", "F4", (3, 2)),
]  # fmt: skip


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# --- configs ------------------------------------------------------------------------------------


@generated(250)
def test_config(tmp_path: Path, draw: Random) -> None:
    write(tmp_path, "config.json", mutated_json(CONFIG, draw))
    reads_or_refuses(lambda: read_config(tmp_path), str(tmp_path / "config.json"))


@generated(200)
def test_generation_config(tmp_path: Path, draw: Random) -> None:
    write(tmp_path, "config.json", json.dumps(CONFIG).encode())
    write(tmp_path, "generation_config.json", mutated_json(GENERATION, draw))
    reads_or_refuses(lambda: read_config(tmp_path), "config.json")
    read = reads_or_refuses(lambda: read_generation_config(tmp_path), "generation_config")
    if read is not None:
        served = served_model_from(read, "toy", 64)
        assert 0 <= served.default_temperature <= 2
        assert 0 < served.default_top_p <= 1
        assert 0 <= served.default_top_k < 2**31


# --- tokenizers ---------------------------------------------------------------------------------


def check_tokenizer(tokenizer: Tokenizer | None) -> None:
    """Use what was read as the server does."""
    if tokenizer is None:
        return
    ids = reads_or_refuses(lambda: tokenizer.encode_within(TEXT, 1000, True))
    for number in (*(ids or [])[:20], *tokenizer.stop_tokens, 0, 2**31):
        stream = tokenizer.stream()
        assert isinstance(stream.push(number) + stream.finish(), str)
    reads_or_refuses(lambda: tokenizer.chat_prompt(MESSAGES))


@generated(250)
def test_tokenizer_json(tmp_path: Path, draw: Random) -> None:
    path = write(tmp_path, "tokenizer.json", mutated_json(TOKENIZER, draw))
    check_tokenizer(reads_or_refuses(lambda: Tokenizer.load(tmp_path), str(path)))


@generated(60)
def test_tokenizer_config(tmp_path: Path, draw: Random) -> None:
    write(tmp_path, "tiktoken.model", vocabulary())
    write(tmp_path, "tokenizer_config.json", mutated_json(TOKENIZER_CONFIG, draw))
    check_tokenizer(reads_or_refuses(lambda: Tokenizer.load(tmp_path), str(tmp_path)))


def vocabulary() -> bytes:
    """Return K2's format of a vocabulary: each byte, and two words."""
    tokens = [*(bytes([value]) for value in range(256)), b"He", b"ll"]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    return b"\n".join(lines)


@generated(120)
def test_vocabulary(tmp_path: Path, draw: Random) -> None:
    text = mutated_text(vocabulary().decode(), draw)
    data = as_bytes(text)
    path = write(tmp_path, "tiktoken.model", damaged(data, draw) if draw.random() < 0.4 else data)
    ranks = reads_or_refuses(lambda: read_ranks(path), str(path))
    assert ranks is None or sorted(ranks.values()) == list(range(len(ranks)))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    train(folder, model_type="bpe", normalization_rule_name="nmt_nfkc")
    return folder / "tokenizer.model"


@generated(100)
def test_sentencepiece_model(tmp_path: Path, pieces: Path, draw: Random) -> None:
    """The rules for text come at the end of the file, after the pieces."""
    intact = pieces.read_bytes()
    head, tail = intact[:3000], intact[-6000:]
    part = draw.choice(("head", "tail", "whole"))
    head = damaged(head, draw) if part == "head" else head
    tail = damaged(tail, draw) if part == "tail" else tail
    data = head + intact[3000:-6000] + tail
    path = write(tmp_path, "tokenizer.model", damaged(data, draw) if part == "whole" else data)
    config: Any = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"359": {}}}
    if draw.random() < 0.4:
        config = mutated(config | {"bos_token": "<s>", "add_bos_token": True}, draw)
    write(tmp_path, "tokenizer_config.json", as_json(config))
    check_tokenizer(reads_or_refuses(lambda: Tokenizer.load(tmp_path), str(path.parent)))


@generated(150)
def test_chat_template(tmp_path: Path, draw: Random) -> None:
    if draw.random() < 0.4:
        source = draw.choice(HOSTILE_TEMPLATES)
    else:
        source = mutated_text(TEMPLATE, draw)
        if draw.random() < 0.5:
            cuts = [draw.randrange(len(TEMPLATE)) for _ in range(2)]
            source = TEMPLATE[: max(cuts)] + draw.choice(HOSTILE_TEMPLATES) + TEMPLATE[min(cuts) :]
    data = as_bytes(source)
    write(tmp_path, "chat_template.jinja", damaged(data, draw) if draw.random() < 0.1 else data)
    read = reads_or_refuses(lambda: read_chat_templates(tmp_path, {}), "chat_template.jinja")
    text = read.plain if read is not None else None
    if text is None:
        return
    template = reads_or_refuses(lambda: ChatTemplate(text, {"bos_token": "[BOS]"}), "template")
    if template is not None:
        reads_or_refuses(lambda: template.render(MESSAGES, None, True, {}), "template")


@pytest.mark.parametrize(
    "expression",
    ["9 ** (9 ** 8)", "'a' * SIZE", "'a' | center(SIZE)", "'%SIZEd' % 1", "'a'.zfill(SIZE)",
     "'%SIZEd' | format(1)", "(1, 2) * SIZE", "'{:SIZE}'.format(1)"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["{{ X }}", "{% set a = X %}", "{% if X %}{% endif %}"])
def test_nothing_is_computed_when_a_template_is_compiled(place: str, expression: str) -> None:
    """Rendering is done in a process that can be killed; compiling is not."""
    source = place.replace("X", expression.replace("SIZE", "100000000"))
    tracemalloc.start()
    try:
        with bounded():
            ChatTemplate(source, {})
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


# --- headers ------------------------------------------------------------------------------------


def tensor_file() -> tuple[dict[str, Any], bytes]:
    """Return the fields of a header, and the data after it."""
    whole = safetensors_header(SPECS)
    return json.loads(whole[8:]), bytes(sum(spec.nbytes for spec in SPECS))


@generated(250)
def test_safetensors(tmp_path: Path, draw: Random) -> None:
    fields, data = tensor_file()
    text = mutated_json(fields, draw)
    length = draw.choice((len(text),) * 6 + (0, 8, 2**63, 2**64 - 1, len(text) + 1))
    whole = struct.pack("<Q", length) + text + data
    path = write(tmp_path, "model.safetensors", whole[: draw.choice((None, None, None, 4, 40))])
    reads_or_refuses(lambda: read_safetensors_header(path), str(path))


@generated(200)
def test_index(tmp_path: Path, draw: Random) -> None:
    write(tmp_path, "config.json", json.dumps(CONFIG).encode())
    _, data = tensor_file()
    write(tmp_path, "model-1.safetensors", safetensors_header(SPECS) + data)
    index = {
        "metadata": {"total_size": len(data)},
        "weight_map": {spec.name: "model-1.safetensors" for spec in SPECS},
    }
    write(tmp_path, INDEX_NAME, mutated_json(index, draw))
    reads_or_refuses(lambda: read_checkpoint(tmp_path), INDEX_NAME)


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "a\0", "../a", "a\n"])
def test_an_index_that_names_no_file(tmp_path: Path, name: str) -> None:
    write(tmp_path, "config.json", json.dumps(CONFIG).encode())
    index = {"weight_map": {"b": f"{name}.safetensors"}}
    write(tmp_path, INDEX_NAME, json.dumps(index).encode())
    with pytest.raises(K2Error, match=r"is not the name of a safetensors file|not valid Unicode"):
        read_checkpoint(tmp_path)


@generated(150)
def test_headers_of_the_hub(draw: Random) -> None:
    """The server of the Hub sends other bytes than it announced, in ranges."""
    fields, data = tensor_file()
    text = mutated_json(fields, draw)
    header = struct.pack("<Q", len(text)) + text + data
    files = {
        INDEX_NAME: mutated_json({"weight_map": {"b": "model.safetensors"}}, draw),
        "model.safetensors": damaged(header, draw) if draw.random() < 0.3 else header,
    }
    names = list(files) if draw.random() < 0.5 else ["model.safetensors"]

    def read_range(repo: str, commit: str, name: str, first: int, count: int) -> tuple[bytes, int]:
        size = len(files[name]) if draw.random() < 0.9 else draw.choice((0, -1, 2**63))
        return files[name][first : first + count], size

    with pytest.MonkeyPatch.context() as patch:
        sizes = {name: len(files[name]) for name in names}
        patch.setattr(hub_headers.hub, "repository_files", lambda repo, commit: sizes)
        patch.setattr(hub_headers.hub, "read_range", read_range)
        reads_or_refuses(lambda: hub_headers.read_headers("mock/model", "main"), "mock/model")


@generated(150)
def test_kept_headers(tmp_path: Path, draw: Random) -> None:
    kept = {"layout": 1, "tensors": {"a": ["BF16", [2, 4], 16, "model.safetensors", 80]}}
    data = gzip.compress(mutated_json(kept, draw))
    path = write(tmp_path, "kept.json.gz", damaged(data, draw) if draw.random() < 0.4 else data)
    with bounded():
        tensors = hub_headers._read_kept(path)
    for tensor in (tensors or {}).values():
        assert isinstance(tensor.nbytes, int)
        assert isinstance(tensor.shape, tuple)


# --- GGUF ---------------------------------------------------------------------------------------

_KINDS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_llama(path, original_weights(), GGMLQuantizationType.Q8_0)
    return path


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(value: Any, draw: Random) -> bytes:
    """Encode a value of JSON as metadata with its kind, or with another one."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(as_bytes(value))
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        kind = 10 if 0 <= value < 2**64 else 11
        return struct.pack(f"<I{_KINDS[kind][1]}", kind, value if abs(value) < 2**63 else 0)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    items = [_value(item, draw) for item in value] if isinstance(value, list) else []
    kind = items[0][:4] if items else struct.pack("<I", draw.choice((4, 8, 9, 7, 99)))
    count = draw.choice((len(items),) * 9 + (2**24, 2**64 - 1))
    return struct.pack("<I", 9) + kind + struct.pack("<Q", count) + b"".join(i[4:] for i in items)


def rewritten(llama: Path, draw: Random) -> bytes:
    """Replace the metadata of a file by changed metadata; the tensors stay."""
    from k2cli.models.gguf.reader import GgufFile

    with GgufFile(llama) as file:
        metadata = mutated(file.metadata, draw)
        tensors = list(file.tensors.values())
        start = min(tensor.offset for tensor in tensors)
        types = {"F32": 0, "Q8_0": 8, "F16": 1}
        infos = b"".join(
            _string(tensor.name.encode())
            + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
            + struct.pack("<IQ", types[tensor.type_name], tensor.offset - start)
            for tensor in tensors
        )
    if not isinstance(metadata, dict):
        metadata = {}
    pairs = b"".join(
        _string(as_bytes(key)) + _value(value, draw) for key, value in metadata.items()
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + pairs + infos
    return head + bytes(-len(head) % 32) + llama.read_bytes()[start:]


@generated(100)
def test_gguf(tmp_path: Path, llama: Path, draw: Random) -> None:
    data = rewritten(llama, draw)
    if draw.random() < 0.3:
        head, rest = data[:3000], data[3000:]
        data = damaged(head, draw) + rest
    path = write(tmp_path, "model.gguf", data)
    checkpoint = reads_or_refuses(lambda: gguf_checkpoint(path), str(path))
    folder = tmp_path / os.urandom(8).hex()
    made = reads_or_refuses(lambda: convert_gguf(path, folder), str(path))
    if made is not None:
        assert checkpoint is not None
        assert reads_or_refuses(lambda: read_checkpoint(folder)) is not None
        check_tokenizer(reads_or_refuses(lambda: Tokenizer.load(folder)))
