"""Names that a server may send, and the user's choice of files."""

from __future__ import annotations

import pytest

from k2cli.errors import K2Error, UsageError
from k2cli.models.sources.file_names import check_names, is_data_name, is_safe_name
from k2cli.models.sources.selection import Selection, choose_files, kinds_of

UNSAFE = [
    "", "/etc/passwd", "../x.json", "a/../../x.json", "a//b", "./a", "a\\..\\b", "C:x.json",
    "\\\\host\\x", "nul", "NUL.json", "a/com1.txt", "a.", "a ", " a", "a\x00b",
    "a\nb", "a\x1b[2J", "x" * 256, "é" * 128,
    "/".join(["d" * 100] * 11), ".cache/huggingface/download/x", ".CACHE/x", "a?b", "a\ud800b",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_names_that_are_refused(name: str) -> None:
    assert not is_safe_name(name)
    with pytest.raises(K2Error, match="its name") as caught:
        check_names(["config.json", name], "mock/model")
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 400


def test_names_that_volumes_confuse() -> None:
    for pair in (
        ("Model.json", "model.json"),
        ("é.json", "e\u0301.json"),
        ("a/B.json", "A/b.json"),
    ):
        with pytest.raises(K2Error, match="not tell apart"):
            check_names(pair, "mock/model")
    with pytest.raises(K2Error, match="as a file and as a folder"):
        check_names(["a", "a/b.json"], "mock/model")
    check_names(["config.json", "additional_chat_templates/tool use.jinja", "名前.json"], "m")


def test_kinds_of_files_that_are_fetched() -> None:
    for name in ("config.json", "a/b.safetensors", "LICENSE", "x.tiktoken", "README.md"):
        assert is_data_name(name)
    for name in ("modeling_kimi.py", "pytorch_model.bin", "x.pt", "x.pkl", "run.sh", "LICENSE.py"):
        assert not is_data_name(name)


FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "README.md", "modeling.py",
]  # fmt: skip
INDEX = {"a": FILES[5], "b": FILES[6]}


@pytest.mark.parametrize(
    ("selection", "chosen", "whole"),
    [
        (Selection(), {*FILES[:8]}, True),
        (Selection(only=("config",)), {*FILES[:2]}, False),
        (Selection(only=("tokenizer",)), {*FILES[2:5]}, False),
        (Selection(only=("weights",)), {*FILES[5:8]}, False),
        (Selection(only=("config", "tokenizer")), {*FILES[:5]}, False),
        (Selection(exclude=("*-00002-*",)), {*FILES[:8]} - {FILES[6]}, False),
        (Selection(exclude=("README*",)), {*FILES[:8]}, True),
        (Selection(include=("*.md", "config.json")), {"README.md", "config.json"}, False),
        (Selection(include=("*",)), {*FILES[:9]}, True),
    ],
)
def test_selections(selection: Selection, chosen: set[str], whole: bool) -> None:
    got = choose_files(FILES, INDEX, "mock/model", selection)
    assert (set(got.names), got.whole) == (chosen, whole)


def test_selections_that_leave_nothing_or_want_code() -> None:
    with pytest.raises(UsageError, match=r"no files that --include '\*\.bin' leaves"):
        choose_files(FILES, INDEX, "mock/model", Selection(include=("*.bin",)))
    with pytest.raises(UsageError, match="neither code nor pickles"):
        choose_files(FILES, INDEX, "mock/model", Selection(include=("*.py",)))
    with pytest.raises(UsageError, match="--only 'wights' is not one of"):
        kinds_of(["wights"])
