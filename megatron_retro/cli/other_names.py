"""Names of verbs that are known from other programs."""

from __future__ import annotations

# What others call it, Megatron-LM's scripts among them; dashes and underlines are the same.
_OTHER_NAMES = {
    "preprocess": ("preprocess-data", "tokenize"),
    "preprocess --merge-token-files": ("merge-datasets",),
    "build-retrieval": ("preprocess-retro", "retro-preprocess", "build-db", "build-index", "build-neighbors", "query"),
    "find-duplicates": ("dedup", "deduplicate", "fuzzy-dedup", "minhash", "decontaminate"),
    "pretrain": ("train", "pretrain-gpt", "pretrain-retro"),
    "finetune": ("sft", "instruct"),
    "generate": ("text-generation", "generate-samples-gpt"),
    "serve": ("run-text-generation-server", "text-generation-server"),
    "evaluate": ("eval", "perplexity"),
    "convert": ("import", "export", "checkpoint-convert", "checkpoint-util"),
    "push": ("upload", "push-to-hub", "upload-to-hub"),
    "--version": ("version", "-v"),
}


def other_name(name: str) -> str:
    """` (did you mean VERB?)` where a name is known from elsewhere, or nothing."""
    plain = name.rsplit("/")[-1].removesuffix(".py").lower().replace("_", "-")
    return next((f" (did you mean {verb}?)" for verb, names in _OTHER_NAMES.items() if plain in names), "")
