"""K2's tokenizer compared with the tiktoken package, incremental decoding, chat templates."""

from __future__ import annotations

import base64
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from k2cli.errors import K2Error
from k2cli.models.text.tiktoken_bpe import build_tokenizer, byte_letters, special_tokens
from k2cli.models.text.tokenizer import Tokenizer
from tests.models.prompts import TEXTS, random_text

# Moonshot's own pattern, as the Python file of its repositories gives it to tiktoken.
PATTERN = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
SPECIAL = ["<|im_end|>", "<|im_middle|>", "[BOS]", "<|tool_call_begin|>", "<|reserved_token_900|>"]


@pytest.fixture(scope="module")
def tokenizer(toy_k2: Path) -> Tokenizer:
    return Tokenizer.load(toy_k2)


@pytest.fixture(scope="module")
def reference(toy_k2: Path) -> tiktoken.Encoding:
    """Load the toy's vocabulary into the tiktoken package like K2's own code."""
    ranks = load_tiktoken_bpe(str(toy_k2 / "tiktoken.model"))
    config = json.loads((toy_k2 / "tokenizer_config.json").read_text())
    named = {int(key): value["content"] for key, value in config["added_tokens_decoder"].items()}
    first = len(ranks)
    special = {
        named.get(number, f"<|reserved_token_{number}|>"): number
        for number in range(first, first + 256)
    }
    return tiktoken.Encoding("k2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _texts(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    texts = [random_text(source) for _ in range(count)]
    for _ in range(count // 4):
        parts = [random_text(source), source.choice(SPECIAL), random_text(source)]
        texts.append("".join(parts))
    return [*TEXTS, *texts]


def test_encodes_as_tiktoken_does(tokenizer: Tokenizer, reference: tiktoken.Encoding) -> None:
    assert tokenizer.vocabulary_size == reference.n_vocab
    for text in _texts(seed=1, count=4000):
        tokens = reference.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == tokens, repr(text)
        assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_encodes_as_tiktoken_does_with_a_real_vocabulary(demo_checkpoint: Path) -> None:
    """Make ranks of 49,000 real tokens: long merges and whole words, cut by K2's pattern."""
    document = json.loads((demo_checkpoint / "tokenizer.json").read_text())
    values = {letter: value for value, letter in enumerate(byte_letters())}
    skipped = {token["content"] for token in document["added_tokens"]}
    words = (word for word in document["model"]["vocab"] if word not in skipped)
    tokens = [bytes(values[letter] for letter in word) for word in words]
    single = [bytes([value]) for value in range(256)]
    ranks = {t: n for n, t in enumerate(single + [t for t in tokens if len(t) > 1])}
    ours = build_tokenizer(ranks, special_tokens(demo_checkpoint, len(ranks), {}))
    theirs = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    source = random.Random(2)
    joined = (b"".join(source.choices(tokens, k=6)).decode("utf-8", "ignore") for _ in range(3000))
    code = Path(json.__file__).read_text(encoding="utf-8")
    for text in (*TEXTS, *joined, code):
        assert ours.encode(text).ids == theirs.encode_ordinary(text), repr(text)


def test_decodes_any_tokens_as_tiktoken_does(
    tokenizer: Tokenizer, reference: tiktoken.Encoding
) -> None:
    source = random.Random(3)
    for _ in range(2000):
        tokens = source.choices(range(reference.n_vocab), k=source.randrange(1, 40))
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        assert text == reference.decode(tokens)


@pytest.mark.parametrize("skip", [True, False])
def test_stream_never_breaks_a_character_and_adds_up(tokenizer: Tokenizer, skip: bool) -> None:
    source = random.Random(4)
    for text in _texts(seed=5, count=500):
        stream = tokenizer.stream(skip_special_tokens=skip)
        parts = [stream.push(token) for token in tokenizer.encode(text)]
        assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
        expected = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=skip)
        assert "".join(parts) + stream.finish() == expected
    for _ in range(1000):  # tokens that are not valid UTF-8
        tokens = source.choices(range(tokenizer.vocabulary_size), k=source.randrange(1, 30))
        stream = tokenizer.stream(skip_special_tokens=skip)
        parts = [stream.push(token) for token in tokens]
        assert "".join(parts) + stream.finish() == tokenizer.decode(tokens, skip)


def test_stream_of_a_tokenizer_that_is_not_byte_level(tmp_path: Path) -> None:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    vocabulary = {f"<0x{value:02X}>": value for value in range(256)}
    words = ["▁Hello", "▁world", "ing", "é", "▁", "你好"]
    vocabulary |= {word: 256 + number for number, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_tokens([AddedToken("</s>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    smile = list("🙂".encode())
    source = random.Random(6)
    sequences = [[256, *smile, 257, 258, 262, 259], [*smile[:2], 256], smile[:3], []]
    sequences += [source.choices(range(250, 263), k=20) for _ in range(200)]
    for tokens in sequences:
        stream = tokenizer.stream()
        text = "".join(stream.push(token) for token in tokens) + stream.finish()
        assert text == tokenizer.decode(tokens)


def test_stop_tokens_are_those_of_all_files(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_tokens == {
        tokenizer.token_id("[EOS]"),
        tokenizer.token_id("<|im_end|>"),
    }
    assert tokenizer.token_id("absent") is None


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(K2Error, match="lone surrogate"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"QQ==", "not 'base64 rank'"),
        (b"Q!== 0", "not 'base64 rank'"),
        (b"QQ== x", "not 'base64 rank'"),
        (b"QQ== 0\nQQ== 1", "occurs twice"),
        (b"QQ== 0\nQg== 0", "ranks are not 0 to 1"),
        (b"QQ== 0\nQg== 2", "ranks are not 0 to 1"),
        (b"QQ== 0", "a byte has no token"),
        (b"\x00\xff\xfe", "not 'base64 rank'"),
    ],
)
def test_damaged_vocabularies_are_refused(
    toy_k2: Path, tmp_path: Path, content: bytes, reason: str
) -> None:
    folder = shutil.copytree(toy_k2, tmp_path / "model")
    (folder / "tiktoken.model").write_bytes(content)
    with pytest.raises(K2Error, match=reason):
        Tokenizer.load(folder)


def test_only_known_patterns_are_applied(toy_k2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_k2, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    with pytest.raises(K2Error, match="QWenTokenizer"):
        Tokenizer.load(folder)
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "added_tokens_decoder": {"5": {"content": "<|x|>"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(K2Error, match="'5' must have text and an id from 768"):
        Tokenizer.load(folder)


def test_code_in_the_repository_is_not_run(toy_k2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_k2, tmp_path / "model")
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('run')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode("你好")) == "你好"


def test_folders_without_a_tokenizer_are_told(tmp_path: Path) -> None:
    with pytest.raises(K2Error, match=r"neither tokenizer\.json nor tiktoken\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(K2Error, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


# --- chat templates -----------------------------------------------------------------------------


def test_k2_writes_a_conversation(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.chat_prompt([{"role": "user", "content": "  1 < 2 & 你好\n"}])
    assert prompt == (
        "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI."
        "<|im_end|><|im_user|>user<|im_middle|>  1 < 2 & 你好\n<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    tokens = tokenizer.encode(tokenizer.chat_prompt([{"role": "user", "content": "Hi"}]))
    assert tokens[-1] == tokenizer.token_id("<|im_middle|>")
    assert tokenizer.token_id("[BOS]") not in tokens


def test_k2_writes_tools_calls_and_results(tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    call = {"id": "functions.get_weather:0", "function": {"arguments": '{"city": "北京"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {
            "role": "tool",
            "name": "get_weather",
            "tool_call_id": "functions.get_weather:0",
            "content": "Sunny",
        },
    ]
    assert tokenizer.chat_prompt(messages, tools) == (
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":'
        '{"name":"get_weather","parameters":{}}}]<|im_end|>'
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        "<|im_user|>user<|im_middle|>Weather?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|><|tool_call_begin|>"
        'functions.get_weather:0<|tool_call_argument_begin|>{"city": "北京"}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\nSunny<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    without = tokenizer.chat_prompt(messages, add_generation_prompt=False)
    assert without.endswith("Sunny<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "wizard", "content": "hi"}], "refuses: unknown role: wizard"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text parts"),
        ([{"content": "hi"}], "refuses|failed"),
        ([7], "refuses|failed"),
    ],
)
def test_templates_refuse_with_their_reason(
    tokenizer: Tokenizer, messages: list[Any], reason: str
) -> None:
    with pytest.raises(K2Error, match=reason):
        tokenizer.chat_prompt(messages)


def _with_template(toy_k2: Path, folder: Path, template: Any) -> Tokenizer:
    shutil.copytree(toy_k2, folder)
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_templates_run_in_a_sandbox(toy_k2: Path, tmp_path: Path, template: str) -> None:
    tokenizer = _with_template(toy_k2, tmp_path / "model", template)
    with pytest.raises(K2Error, match="chat template"):
        tokenizer.chat_prompt([{"role": "user", "content": "hi"}])


def test_a_template_that_does_not_parse_is_told(toy_k2: Path, tmp_path: Path) -> None:
    tokenizer = _with_template(toy_k2, tmp_path / "model", "{% for %}")
    with pytest.raises(K2Error, match="not valid"):
        tokenizer.chat_prompt([])


def test_templates_of_hugging_face_find_what_they_expect(toy_k2: Path, tmp_path: Path) -> None:
    source = (
        "{%- for message in messages %}\n"
        "    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ message.content }}{% endgeneration %}\n"
        "{%- endfor %}|{{ {'a': '<é>'} | tojson(indent=1) }}|{{ eos_token }}"
        "|{{ strftime_now('%Y') | length }}|{{ thinking }}"
    )
    named = [{"name": "default", "template": source}, {"name": "tool_use", "template": "T"}]
    tokenizer = _with_template(toy_k2, tmp_path / "model", named)
    messages = [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}]
    assert tokenizer.chat_prompt(messages, thinking=True) == 'A|{\n "a": "<é>"\n}|[EOS]|4|True'
    assert tokenizer.chat_prompt(messages, tools=[{"type": "function"}]) == "T"


def test_ranks_file_is_the_formats(toy_k2: Path) -> None:
    lines = (toy_k2 / "tiktoken.model").read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(768))
    assert base64.b64decode(lines[65].split()[0]) == b"A"


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=400), repeats=st.integers(1, 20), limit=st.integers(1, 300))
def test_a_text_that_is_refused_unread_is_too_long(
    tokenizer: Tokenizer, text: str, repeats: int, limit: int
) -> None:
    text = "".join(letter for letter in text if not 0xD800 <= ord(letter) < 0xE000) * repeats
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k2cli.models.text.tokenizer._SLICE_LETTERS", 64)
        patch.setattr("k2cli.models.text.tokenizer._CUT_TOKENS", 8)
        found = tokenizer.encode_within(text, limit)
    assert found == whole or (found is None and len(whole) > limit)


def test_a_text_is_refused_unread_only_if_every_token_is_as_long_as_the_longest(
    tokenizer: Tokenizer,
) -> None:
    longest = tokenizer.longest_token_bytes
    assert longest is not None
    assert tokenizer.encode_within("a" * (10 * longest + 1), 10) is None
    assert tokenizer.encode_within("a" * (10 * longest), 10) == tokenizer.encode("a" * 10 * longest)


def _said(folder: Path, *, tools: bool) -> str:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    messages = [{"role": "user", "content": "hi"}]
    return Tokenizer.load(folder).chat_prompt(messages, [tool] if tools else None)


@pytest.mark.parametrize("place", ["list", "mapping", "json", "folder"])
def test_a_template_for_tools_is_found_in_all_its_places(
    toy_k2: Path, tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "model"
    named = {"default": "plain", "tool_use": "with tools"}
    listed: Any = [{"name": name, "template": text} for name, text in named.items()]
    if place in ("list", "mapping"):
        _with_template(toy_k2, folder, listed if place == "list" else named)
    else:
        _with_template(toy_k2, folder, "older, not used")
    if place == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": listed}))
    if place == "folder":
        (folder / "chat_template.jinja").write_text("plain")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
        (folder / "additional_chat_templates" / "._tool_use.jinja").write_bytes(b"\0\xff")
    assert _said(folder, tools=False) == "plain"
    assert _said(folder, tools=True) == "with tools"


def test_named_templates_without_a_default_are_refused_by_name(
    toy_k2: Path, tmp_path: Path
) -> None:
    _with_template(toy_k2, tmp_path / "model", [{"name": "rag", "template": "x"}])
    with pytest.raises(K2Error, match="of the chat templates 'rag' none is named 'default'"):
        _said(tmp_path / "model", tools=False)
