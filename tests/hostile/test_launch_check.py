"""Tokenizers and chat templates that a launch refuses, with the name of the file.

The process that tries them is the real one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from k2cli.errors import K2Error
from k2cli.guard.api_server import ApiServer
from k2cli.guard.engine_bridge import EngineBridge
from k2cli.models.text.tiktoken_bpe import byte_letters
from k2cli.protocol import HttpEndpoint
from k2cli.server import killable_reader
from k2cli.server.errors import ApiError
from k2cli.server.killable_reader import KillableReader
from k2cli.server.read_request import UnreadRequest
from k2cli.server.reader_messages import ReaderSettings
from k2cli.server.reader_queues import ProcessReader
from k2cli.units import GIB, MIB
from tests.guard.test_guard_parts import _bootstrap
from tests.hostile.test_http import without_template

TRY_SECONDS = 2.0
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(999) %}{{ a }}{% endfor %}{% endfor %}"
NESTED = "{% for a in [1] %}" * 30 + "{% endfor %}" * 30
GOOD = "{% for message in messages %}{{ message.content }}{% endfor %}"


def reader_of(folder: Path) -> KillableReader:
    settings = ReaderSettings(*(str(folder), "toy", 4096, 1.0, 1.0, 0), memory_bytes=GIB)
    return KillableReader(settings, ("--k2-run", "hostile"))


def check(folder: Path) -> None:
    async def load() -> None:
        reader = reader_of(folder)
        try:
            await reader.load()
        finally:
            await reader.close()

    asyncio.run(load())


def with_tokenizer(source: Path, folder: Path, **parts: Any) -> Path:
    """Give a folder a tokenizer.json that has these parts; it comes before K2's vocabulary."""
    without_template(source, folder)
    vocabulary = {letter: number for number, letter in enumerate(byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = parts.get("pre_tokenizer", pre_tokenizers.ByteLevel())
    tokenizer.decoder = parts.get("decoder", decoders.ByteLevel())
    if "normalizer" in parts:
        tokenizer.normalizer = parts["normalizer"]
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def splitting(pattern: str) -> pre_tokenizers.Sequence:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killable_reader, "TRY_SECONDS", TRY_SECONDS)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param(LOOP, "rendering .* takes longer than 2 s", id="endless loop"),
        pytest.param("{{ 7 ** (10 ** 9) }}", "rendering .* takes longer than 2 s", id="constant"),
        pytest.param(ENDLESS, "writes more than 1048576 letters", id="endless text"),
        pytest.param("{{ 'a' * 10 ** 11 }}", "writes more|more memory", id="large text"),
        pytest.param("{% for %}", "is not valid", id="syntax"),
        pytest.param(NESTED, "is not valid", id="nested"),
    ],
)
def test_a_template_is_refused_at_the_launch(
    toy_k2: Path, tmp_path: Path, template: str, reason: str
) -> None:
    folder = without_template(toy_k2, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(K2Error, match=f"chat_template.jinja.*({reason})"):
        check(folder)


def test_a_template_for_tools_in_a_file_of_its_own_is_tried(toy_k2: Path, tmp_path: Path) -> None:
    folder = without_template(toy_k2, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(GOOD)
    (folder / "additional_chat_templates").mkdir()
    path = folder / "additional_chat_templates" / "tool_use.jinja"
    path.write_text("{% for %}")
    with pytest.raises(K2Error, match=r"tool_use\.jinja: .* is not valid"):
        check(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(K2Error, match=r"tool_use\.jinja: it is not a regular file"):
        check(folder)


def test_a_template_for_tools_is_tried_too(toy_k2: Path, tmp_path: Path) -> None:
    folder = without_template(toy_k2, tmp_path / "model")
    named = [{"name": "default", "template": GOOD}, {"name": "tool_use", "template": LOOP}]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    with pytest.raises(K2Error, match=r"chat_template\.json cannot be used: rendering"):
        check(folder)


@pytest.mark.parametrize(
    "template",
    [GOOD, "{{ raise_exception('no system message') }}", "{{ messages[7].content.x }}", ""],
)
def test_a_template_may_refuse_the_conversation(
    toy_k2: Path, tmp_path: Path, template: str
) -> None:
    folder = without_template(toy_k2, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    check(folder)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"pre_tokenizer": splitting(r"(a+)+b")}, id="exponential"),
        pytest.param({"pre_tokenizer": splitting(r"(\w+\s?)+$")}, id="words"),
        pytest.param({"pre_tokenizer": splitting(r"(ö+)+ü")}, id="its own letters"),
        pytest.param({"normalizer": normalizers.Replace(Regex(r"( +)+\."), "")}, id="normalizer"),
        pytest.param({"normalizer": normalizers.Replace("a", "b" * 1_000_000)}, id="memory"),
        pytest.param({"decoder": decoders.Replace(Regex(r"(a+)+b"), "")}, id="decoder"),
    ],
)
def test_a_tokenizer_is_refused_at_the_launch(
    toy_k2: Path, tmp_path: Path, parts: dict[str, Any]
) -> None:
    folder = with_tokenizer(toy_k2, tmp_path / "model", **parts)
    with pytest.raises(K2Error, match=r"tokenizer\.json"):
        check(folder)


def test_a_usual_tokenizer_passes(toy_k2: Path, tmp_path: Path) -> None:
    check(toy_k2)
    pattern = r"(?i:'s|'t)|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    check(with_tokenizer(toy_k2, tmp_path / "model", pre_tokenizer=splitting(pattern)))


def test_the_api_of_a_run_names_the_file(toy_k2: Path, tmp_path: Path) -> None:
    folder = without_template(toy_k2, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for %}")

    async def serve() -> None:
        bootstrap = _bootstrap()
        bootstrap = msgspec.structs.replace(
            bootstrap,
            assignment=msgspec.structs.replace(
                bootstrap.assignment, model_path=str(folder), run_id="hostile-1"
            ),
            http=HttpEndpoint("127.0.0.1", 0),
        )
        api = ApiServer(bootstrap, EngineBridge(lambda message: None))
        api.open()
        try:
            await api.wait_until_closed()
        finally:
            await api.close()

    with pytest.raises(K2Error, match=r"chat_template\.jinja: .* is not valid"):
        asyncio.run(serve())


def test_templates_are_read_once(toy_k2: Path, tmp_path: Path) -> None:
    folder = without_template(toy_k2, tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text(GOOD)
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()

    async def ask() -> list[list[int]]:
        first = reader_of(folder)
        reader = ProcessReader(first, first.another())
        try:
            answers = [(await reader.read("tokenize", body)).tokens]
            template.write_text("changed")
            await first.close()  # the next request starts a process
            answers.append((await reader.read("tokenize", body)).tokens)
            long = json.dumps({"messages": [{"role": "user", "content": "Hello" * 20_000}]})
            answers.append((await reader.read("tokenize", long.encode())).tokens)
            return answers
        finally:
            await reader.close()

    before, after, long = asyncio.run(ask())
    assert before == after
    assert len(long) > 1000


def test_a_model_that_is_gone_costs_requests_but_no_path_is_told(
    toy_k2: Path, tmp_path: Path
) -> None:
    folder = without_template(toy_k2, tmp_path / "model")

    async def ask() -> None:
        first = reader_of(folder)
        reader = ProcessReader(first, first.another())
        try:
            await first.load()
            await first.close()
            os.rename(folder, tmp_path / "other")
            await reader.read("tokenize", b'{"prompt": "a"}')
        finally:
            await reader.close()

    with pytest.raises(ApiError) as caught:
        asyncio.run(ask())
    assert caught.value.status == 503
    assert str(tmp_path) not in caught.value.message


def test_a_process_that_grows_too_large_is_killed(
    toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS does not enforce the limit that the process sets itself."""
    monkeypatch.setattr(killable_reader, "TRY_SECONDS", 60.0)
    monkeypatch.setattr(KillableReader, "memory_bytes", property(lambda reader: MIB))
    folder = without_template(toy_k2, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(K2Error, match="takes more than"):
        check(folder)


async def test_an_answer_that_is_no_answer_ends_the_process() -> None:
    reader = KillableReader(ReaderSettings("", "", 1, 1.0, 1.0, 0), ())
    reader._arguments = [
        *(sys.executable, "-c", "import os, time; os.write(1, bytes([0, 0, 0, 1, 255]))"),
    ]
    with pytest.raises(K2Error, match="requests cannot be read"):
        await reader.load()
    queue = ProcessReader(reader, reader.another())
    with pytest.raises(ApiError, match="the log has the reason"):
        await queue._short.read(UnreadRequest("chat", b"{}"))
