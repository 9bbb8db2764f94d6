"""A decoder from a Hugging Face folder into a checkpoint, and out in the family that computes the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.artifacts.files import new_directory, write_file
from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import open_stored, parameter_shapes, write_checkpoint
from megatron_retro.convert.exported_text import export_text_files
from megatron_retro.convert.families import GPT2, Family
from megatron_retro.convert.hugging_face_config import family_of, model_from_hugging_face
from megatron_retro.convert.hugging_face_settings import first_family, hugging_face_from_model
from megatron_retro.convert.model_card import CARD, model_card
from megatron_retro.convert.origin import FOLDED, ORIGIN
from megatron_retro.convert.safetensors_folder import SafetensorsFolder, read_json, write_folder
from megatron_retro.convert.tensor_rules import Rule
from megatron_retro.data.model_text import (
    TOKENIZER_JSON,
    TOKENIZER_SETTINGS,
    keep_text_files,
    read_settings,
    special_tokens,
)
from megatron_retro.data.tokenizers import SentencePieceTokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.runtime.strict_json import json_text

CONFIG = "config.json"
# tensors that some versions store and that follow from the configuration
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")


def import_hugging_face(
    source: Path,
    run: Path,
    tokenizer: TokenizerConfig | None = None,
    dtype: torch.dtype = torch.float32,
    origin: str | None = None,
) -> Path:
    """Write step 0 of `run` from the folder; tensor by tensor, every name and shape checked first.

    The tokenizer that lies beside the model comes along, unless another is given. `origin` is the model's lasting name.
    """
    config = read_json(source / CONFIG)
    model, family = model_from_hugging_face(config), family_of(config)
    folder = SafetensorsFolder(source)
    rules = {rule.ours: rule for rule in family.tensor_rules(model)}
    names = _stored_names(folder, family)
    _require_all_used(folder, names, rules, model)
    shapes = parameter_shapes(model, RetroConfig())
    _require_tied(folder, names, model)
    _require_shapes(folder, names, rules, model, shapes)

    def load(name: str) -> Tensor:
        parts = [folder.tensor(names[part]) for part in rules[name].theirs]
        return rules[name].join(parts, model)

    kept = keep_text_files(tokenizer or imported_tokenizer(source), run)
    settings = Settings([model, RetroConfig(), kept])
    inputs = {CONFIG: file_record(source / CONFIG).sha256}
    # An export of another family (Granite's becomes Llama) has other names and weights than its origin.
    first = first_family(model)
    if family.multipliers:
        inputs[FOLDED] = family.model_type
    if origin is not None and first is not None and first.model_type == family.model_type:
        inputs[ORIGIN] = origin
    return write_checkpoint(run, settings, shapes, load, inputs, dtype)


def imported_tokenizer(source: Path) -> TokenizerConfig:
    """The tokenizer that lies beside the model."""
    fast, pieces, vocabulary, merges = (
        source / name for name in (TOKENIZER_JSON, "tokenizer.model", "vocab.json", "merges.txt")
    )
    if fast.is_file():
        return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(fast))
    if pieces.is_file():
        return _sentencepiece(pieces)
    if vocabulary.is_file() and merges.is_file():
        return TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocabulary), merge_file=str(merges))
    raise ArtifactError(
        f"{source} holds no tokenizer",
        expected=f"{TOKENIZER_JSON}, tokenizer.model, or vocab.json with merges.txt",
        fix="put it there, or name it: --tokenizer-type, --tokenizer-model (ByteTokenizer for a model of bytes)",
    )


def _sentencepiece(pieces: Path) -> TokenizerConfig:
    """The model alone, or behind a begin where its class adds one; refused where the folder has more tokens."""
    folder, settings = pieces.parent, read_settings(pieces.parent / TOKENIZER_SETTINGS)
    added = read_settings(folder / "added_tokens.json")
    numbered = settings.get("added_tokens_decoder")
    for number, token in numbered.items() if isinstance(numbered, dict) else ():
        if number.isdecimal() and isinstance(token, dict):
            added[str(token.get("content"))] = int(number)
    end = special_tokens(folder).get("eos_token")
    if added or end is not None:
        known = SentencePieceTokenizer(pieces)
        lost = [name for name, number in added.items() if type(number) is int and number >= known.vocab_size]
        if end is not None and known.processor.piece_to_id(end) != known.eod:
            lost.append(f"{end}, which ends a text")
        if lost:
            raise ArtifactError(
                f"{folder} has tokens that its {pieces.name} does not have",
                got=", ".join(dict.fromkeys(lost[:5])),
                fix="save it with a fast tokenizer (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes a "
                f"{TOKENIZER_JSON}), or name what to use: --tokenizer-type, --tokenizer-model",
            )
    begins = settings.get("add_bos_token", str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"))
    kind = "Llama2Tokenizer" if begins else "SentencePieceTokenizer"
    return TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(pieces))


def _stored_names(folder: SafetensorsFolder, family: Family) -> dict[str, str]:
    """Canonical name -> stored name: GPT-2's first checkpoints leave out the prefix."""
    if family is not GPT2 or any(name.startswith("transformer.") for name in folder.files):
        return {name: name for name in folder.files}
    return {name if name.startswith("lm_head") else f"transformer.{name}": name for name in folder.files}


def _require_all_used(
    folder: SafetensorsFolder, names: Mapping[str, str], rules: Mapping[str, Rule], model: ModelConfig
) -> None:
    wanted = {part for rule in rules.values() for part in rule.theirs}
    missing = sorted(wanted - set(names))
    if missing:
        raise ArtifactError(f"{folder.path} lacks tensors of its model", got=", ".join(missing[:5]))
    tied = set() if model.untie_embeddings_and_output_weights else {"lm_head.weight"}
    unknown = sorted(name for name in set(names) - wanted - tied if not _DERIVED.fullmatch(name))
    if unknown:
        raise ArtifactError(
            f"{folder.path} has tensors that are not understood",
            got=", ".join(unknown[:5]),
            fix="the model is not what its config.json says, or of a variant that cannot be imported",
        )


def _require_tied(folder: SafetensorsFolder, names: Mapping[str, str], model: ModelConfig) -> None:
    """An output matrix beside tied embeddings must be the same: which one transformers uses depends on its version."""
    if model.untie_embeddings_and_output_weights or "lm_head.weight" not in names:
        return
    embedding = next(names[name] for name in ("model.embed_tokens.weight", "transformer.wte.weight") if name in names)
    if not torch.equal(folder.tensor(embedding), folder.tensor(names["lm_head.weight"])):
        raise ArtifactError(
            f"{folder.path} ties its embeddings, and yet its output matrix is another",
            fix="set tie_word_embeddings to false in its config.json, or remove lm_head.weight",
        )


def _require_shapes(
    folder: SafetensorsFolder,
    names: Mapping[str, str],
    rules: Mapping[str, Rule],
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Join tensors without content, so that a wrong shape is found before anything is written."""
    wrong = []
    for ours, rule in rules.items():
        parts = [torch.empty(folder.shape(names[part]), device="meta") for part in rule.theirs]
        try:
            got = tuple(rule.join(parts, model).shape)
        except RuntimeError:
            got = ()
        if got != shapes[ours]:
            wrong.append(f"{', '.join(rule.theirs)}: {[tuple(part.shape) for part in parts]}")
    if wrong:
        raise ArtifactError(
            f"{folder.path} has tensors of another shape than its config.json says", got="; ".join(wrong[:5])
        )


def export_hugging_face(
    source: Path,
    destination: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 4 << 30,
    decoder_only: bool = False,
    merge: bool = False,
) -> Path:
    """Write the decoder of a checkpoint as a Hugging Face folder of the family that computes the same."""
    stored = open_stored(source, merge=merge)
    settings = stored.settings
    model, retro = settings[ModelConfig], settings[RetroConfig]
    if retro.reads_neighbors() and not decoder_only:
        raise ConfigError(
            f"{stored.path} reads neighbours (its gate is open), which no Hugging Face family does",
            fix="--convert-decoder-only exports what it computes with the gate shut",
        )
    family, config = hugging_face_from_model(model)
    config["dtype"] = str(dtype).removeprefix("torch.")
    rules = family.tensor_rules(model)
    lost = [rule.ours for rule in rules if rule.ours not in stored.names]
    if lost:
        raise ArtifactError(f"{stored.path} does not hold the whole decoder", got=", ".join(lost[:5]))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for rule in rules:
            parts = rule.split(stored.load(rule.ours), model)
            yield from ((name, part.to(dtype)) for name, part in zip(rule.theirs, parts, strict=True))

    with new_directory(destination) as partial:
        write_folder(partial, tensors(), shard_bytes)
        write_file(partial / CONFIG, json_text(config, indent=2) + "\n")
        export_text_files(stored.path, stored.settings[TokenizerConfig], partial)
        write_file(partial / CARD, model_card(stored.path, destination.name, "huggingface"))
    return destination
