"""Tokenizers of checkpoints that have only sentencepiece's ``tokenizer.model``.

The file says all that is needed: pieces with scores, the kind of model, and how text is normalized.
From that the same tokenizer is built as a ``tokenizer.json`` would describe. No code of the
checkpoint is run; classes with rules of their own are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.models.json_files import shown
from k2cli.models.layout import refuse_pointer
from k2cli.units import whole_number

if TYPE_CHECKING:
    import tokenizers

FILE_NAME = "tokenizer.model"
_MAX_FILE_BYTES = 100_000_000
_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_PLAIN_CLASSES = frozenset({
    "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast",
    "GemmaTokenizer", "GemmaTokenizerFast", "MistralTokenizer", "InternLM2Tokenizer",
    "InternLM2TokenizerFast", "BaichuanTokenizer", "YiTokenizer", "OrionTokenizer",
    "TokenizersBackend", "PreTrainedTokenizerFast",
})  # fmt: skip
"""Classes whose token ids are those of the file."""


def load_sentencepiece(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer of a folder from ``tokenizer.model`` and ``tokenizer_config.json``.

    Raises:
        K2Error: if the file is damaged, or its class or kind has rules that k2 does not know.
    """
    path = folder / FILE_NAME
    name = config.get("tokenizer_class")
    if name is not None and name not in _PLAIN_CLASSES:
        raise K2Error(
            f"{path} belongs to the tokenizer {shown(name)}, whose rules k2 does not know",
            "use a conversion of the model that has a tokenizer.json",
        )
    model = _parsed(path)
    kind = model.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise K2Error(f"{path} is a model of words or characters; k2 reads BPE and unigram models")
    tokenizer = _bpe(model) if kind == _BPE else _unigram(model)
    _set_text_rules(tokenizer, model, legacy=config.get("legacy") is not False)
    _add_tokens(tokenizer, model, config, folder / "tokenizer_config.json")
    _set_begin(tokenizer, model, config)
    return tokenizer


def _parsed(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    try:
        data = read_regular(path, _MAX_FILE_BYTES, follow_links=True)
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error
    refuse_pointer(path, data)
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's, which comes with sentencepiece
        raise K2Error(f"{path} is not a sentencepiece model: {error}") from error
    if not model.pieces:
        raise K2Error(f"{path} is not a sentencepiece model: it has no pieces")
    return model


def _bpe(model: Any) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, models

    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    # A piece is made of any two that it consists of; those of higher score are made first.
    merges = [
        (-piece.score, ids[left], ids[right], left, right)
        for piece in model.pieces
        if piece.type not in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        for cut in range(1, len(piece.piece))
        if (left := piece.piece[:cut]) in ids and (right := piece.piece[cut:]) in ids
    ]
    return Tokenizer(
        models.BPE(
            ids,
            [(left, right) for *_, left, right in sorted(merges)],
            unk_token=_unknown(model),
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )


def _unigram(model: Any) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, models

    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = next((n for n, piece in enumerate(model.pieces) if piece.type == _UNKNOWN), None)
    return Tokenizer(
        models.Unigram(pieces, unk_id=unknown, byte_fallback=model.trainer_spec.byte_fallback)
    )


def _unknown(model: Any) -> str | None:
    return next((piece.piece for piece in model.pieces if piece.type == _UNKNOWN), None)


def _set_text_rules(tokenizer: tokenizers.Tokenizer, model: Any, *, legacy: bool) -> None:
    """Set what happens to text before and after: Unicode forms, spaces, the space in front."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(_SPACE))
    if legacy or not spec.add_dummy_prefix:
        steps.append(normalizers.Replace(" ", _SPACE))
    else:  # the space in front of the text only, not behind each special token
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first", split=False)
    tokenizer.normalizer = normalizers.Sequence(steps)
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, model: Any, config: dict[str, Any], config_path: Path
) -> None:
    """Mark the tokens that are never cut: those of the file, then those of the config by id."""
    from tokenizers import AddedToken

    for piece in model.pieces:
        if piece.type in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False)])
    named = config.get("added_tokens_decoder") or {}
    if not isinstance(named, dict):
        raise K2Error(f"{config_path}: added_tokens_decoder is no object")
    numbered = [
        (number, entry)
        for key, entry in named.items()
        if isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and (number := whole_number(key)) is not None
    ]
    for number, entry in sorted(numbered, key=lambda pair: pair[0]):
        text = entry["content"]
        if tokenizer.token_to_id(text) is None and number != tokenizer.get_vocab_size():
            raise K2Error(
                f"{config_path} gives {shown(text)} the id {number}, but the next free "
                f"one is {tokenizer.get_vocab_size()}"
            )
        special = bool(entry.get("special"))
        token = AddedToken(
            text,
            normalized=bool(entry.get("normalized")),
            special=special,
            lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")),
        )
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])


def _set_begin(tokenizer: tokenizers.Tokenizer, model: Any, config: dict[str, Any]) -> None:
    """Put the begin token in front of a plain prompt, as these classes do unless told not to."""
    from tokenizers import processors

    begin = config.get("bos_token")
    begin = begin.get("content") if isinstance(begin, dict) else begin
    if begin is None and model.trainer_spec.bos_id >= 0:
        begin = model.trainer_spec.bos_piece
    number = tokenizer.token_to_id(begin) if isinstance(begin, str) else None
    if config.get("add_bos_token", True) and number is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, number)]
        )
