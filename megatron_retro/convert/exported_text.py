"""The text side of an export: tokenizer, special tokens, chat template and ends, where transformers looks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import write_file
from megatron_retro.checkpoint.loading import describe_checkpoint, found_tokenizer, resolved_from, stored_instructions
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.convert.tokenizer_json import tokenizer_json
from megatron_retro.data.instructions.templates import AUTO, INSTRUCT_RETRO, INSTRUCT_RETRO_JINJA
from megatron_retro.data.model_text import (
    CHAT_TEMPLATE,
    GENERATION,
    TOKENIZER_JSON,
    TOKENIZER_SETTINGS,
    chat_template,
    read_settings,
    read_text_file,
    text_files,
)
from megatron_retro.data.tokenizers import build_tokenizer, end_tokens
from megatron_retro.runtime.console import warn
from megatron_retro.runtime.strict_json import json_text

# kind of tokenizer: the names of its files in a Hugging Face folder, by setting, and the class that reads them
_CUSTOMARY: dict[str, tuple[dict[str, str], str]] = {
    "HuggingFaceTokenizer": ({"tokenizer_model": TOKENIZER_JSON}, "PreTrainedTokenizerFast"),
    "GPT2BPETokenizer": ({"vocab_file": "vocab.json", "merge_file": "merges.txt"}, "GPT2Tokenizer"),
}


def export_text_files(checkpoint: Path, config: TokenizerConfig, partial: Path) -> None:
    """Copy what the checkpoint's run kept; a model that was tuned otherwise than it came takes its new template."""
    config = found_tokenizer(config, checkpoint)
    if config.tokenizer_type == "ByteTokenizer":
        return
    files = text_files(config)
    customary, reader = _CUSTOMARY.get(config.tokenizer_type, ({"tokenizer_model": "tokenizer.model"}, None))
    for setting, name in customary.items():
        path = Path(getattr(config, setting))
        if path.is_file():
            files.pop(path.name, None)
            files[name] = path
    for name, path in files.items():
        write_file(partial / name, read_text_file(path))
    if reader is None:
        _write_tokenizer_json(config, partial)
    elif not (partial / TOKENIZER_SETTINGS).is_file():
        _write_json(partial / TOKENIZER_SETTINGS, {"tokenizer_class": reader})
    ends = sorted(end_tokens(build_tokenizer(config)))
    _write_json(
        partial / GENERATION, {"eos_token_id": ends if len(ends) > 1 else ends[0]} | read_settings(partial / GENERATION)
    )
    template = _tuned_template(checkpoint, partial)
    if template is not None:
        write_file(partial / CHAT_TEMPLATE, template)


def _write_tokenizer_json(config: TokenizerConfig, partial: Path) -> None:
    """The file that transformers reads without a class of its own, where it gives the tokenizer's ids."""
    try:
        built = tokenizer_json(config)
    except ImportError as missing:
        built = f"(not compared: {missing}; pip install protobuf)"
    if isinstance(built, str):
        (partial / TOKENIZER_JSON).unlink(missing_ok=True)
        kind = config.tokenizer_type
        warn(f"transformers would not read the ids of this {kind}: encode texts here. It differs in {built[:60]!r}")
        return
    text, settings = built
    write_file(partial / TOKENIZER_JSON, text)
    _write_json(partial / TOKENIZER_SETTINGS, read_settings(partial / TOKENIZER_SETTINGS) | settings)


def _tuned_template(checkpoint: Path, partial: Path) -> str | None:
    """The template that the model was tuned with, unless it is the one that is here."""
    tuned = stored_instructions(describe_checkpoint(checkpoint))
    if tuned is None or (tuned.instruction_template == AUTO and chat_template(partial) is not None):
        return None
    if tuned.instruction_template in (AUTO, INSTRUCT_RETRO):
        return INSTRUCT_RETRO_JINJA
    return read_text_file(resolved_from(tuned.instruction_template, checkpoint)).decode("utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_file(path, json_text(value, indent=2) + "\n")
