"""A tokenizer of Megatron's kinds as `tokenizer.json`, which transformers reads without a class of its own.

Its `LlamaTokenizer` reads the pieces of every sentencepiece model as Llama's rules cut them: other ids wherever a model
normalizes text, removes spaces or has no pieces for bytes. What is built here is compared with the tokenizer itself.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.data.model_text import read_text_file
from megatron_retro.data.tokenizers import begin_tokens, build_tokenizer

_NORMAL, _UNKNOWN = 1, 2  # types of pieces
_UNIGRAM = 1  # a type of models
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_TEXTS = (
    "Who is it?  It is a 42-page report;\n\n\tcafe\N{COMBINING ACUTE ACCENT} \N{LATIN SMALL LIGATURE FI}t, 1,234.5%",
    " begins with a space and ends with two  ",
    "\N{CJK UNIFIED IDEOGRAPH-65E5}\N{CJK UNIFIED IDEOGRAPH-672C} na\u00efve \N{GRINNING FACE} x\u3000y A\u00a0b",
    "",
)


def tokenizer_json(config: TokenizerConfig) -> tuple[str, dict[str, Any]] | str:
    """The file and its settings; or the first text that it would cut otherwise."""
    tokenizer: Any = build_tokenizer(config)
    specials = _specials(tokenizer)
    path = Path(config.tokenizer_model or "")
    backend = _tiktoken(path, tokenizer) if config.tokenizer_type == "TikTokenizer" else _sentencepiece(path)
    names = sorted(specials, key=lambda name: specials[name])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if any(vocabulary[name] != number for name, number in specials.items()):
        return ", ".join(name for name in names if vocabulary[name] != specials[name])
    for text in (*_TEXTS, *_texts_of(tokenizer, specials)):
        if backend.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            return text
    by_id = {number: name for name, number in specials.items()}
    begins = begin_tokens(tokenizer, ())
    if begins:
        single = " ".join([*(by_id[token] for token in begins), "$A"])
        pairs = [(by_id[token], token) for token in begins]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["eos_token"] = by_id[tokenizer.eod]
    settings |= {"bos_token": by_id[begins[0]]} if begins else {}
    return backend.to_str(), settings


def _texts_of(tokenizer: Any, specials: Mapping[str, int]) -> Iterator[str]:
    """What each id stands for, ten ids at a time; names of special tokens are ids there and may be text here."""
    ordinary = [token for token in range(tokenizer.vocab_size) if token not in specials.values()]
    for start in range(0, len(ordinary), 10):
        text = tokenizer.decode(ordinary[start : start + 10])
        if not any(name in text for name in specials):
            yield text


def _specials(tokenizer: Any) -> dict[str, int]:
    """Tokens beside the text: those that the tokenizer adds, else the model's pieces that no text gives."""
    if hasattr(tokenizer, "specials"):
        return dict(tokenizer.specials)
    processor = tokenizer.processor
    controls = [token for token in range(processor.vocab_size()) if processor.is_control(token)]
    return {processor.id_to_piece(token): token for token in controls}


def _sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # the module makes it when it is imported
    proto.ParseFromString(read_text_file(path))
    pieces, rules, bytes_too = proto.pieces, proto.normalizer_spec, proto.trainer_spec.byte_fallback
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    if proto.trainer_spec.model_type == _UNIGRAM:
        model: Any = models.Unigram([(piece.piece, piece.score) for piece in pieces], unknown, bytes_too)
    else:
        vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
        model = models.BPE(
            vocabulary, _merges(pieces), unk_token=pieces[unknown].piece, fuse_unk=True, byte_fallback=bytes_too
        )
    backend = Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return backend


def _merges(pieces: Sequence[Any]) -> list[tuple[str, str]]:
    """Every pair of pieces that gives a piece, the best piece first."""
    numbers = {piece.piece: number for number, piece in enumerate(pieces) if piece.type == _NORMAL}
    found = []
    for name, number in numbers.items():
        cuts = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        pairs = [pair for pair in cuts if pair[0] in numbers and pair[1] in numbers]
        found += [(-pieces[number].score, numbers[left], numbers[right], (left, right)) for left, right in pairs]
    return [pair for *_, pair in sorted(found)]


def _tiktoken(path: Path, tokenizer: Any) -> Tokenizer:
    letters = _letters()
    rows = json.loads(read_text_file(path))
    strings = [base64.b64decode(row["token_bytes"]) for row in rows]
    shift = len(tokenizer.specials)
    ranks = {content: number for number, content in enumerate(strings[: tokenizer.vocab_size - shift])}

    def named(content: bytes) -> str:
        return "".join(letters[byte] for byte in content)

    merges = []
    for content, rank in ranks.items():
        cuts = ((content[:cut], content[cut:]) for cut in range(1, len(content)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        merges += [(rank, ranks[left], ranks[right], (named(left), named(right))) for left, right in pairs]
    vocabulary = {named(content): shift + number for content, number in ranks.items()}
    vocabulary |= tokenizer.specials
    backend = Tokenizer(models.BPE(vocabulary, [pair for *_, pair in sorted(merges)], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    backend.decoder = decoders.ByteLevel()
    return backend


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: its own where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]
