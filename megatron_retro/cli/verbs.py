"""The verbs. Each module of `megatron_retro.cli` named here has

    DESCRIPTION: str                          shown by --help
    SECTIONS: tuple[type, ...]                the configuration that it reads
    POSITIONAL: Positional | None             words without a flag
    run(settings, positional) -> int | None   does it; imports what is heavy inside
    READS: Reads                              optional: the fields that it reads of sections that it reads in part

and imports nothing heavy itself, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A verb and the module that does it."""

    name: str
    module: str
    summary: str


VERBS: tuple[Verb, ...] = (
    Verb("collect-text", "collect_text", "a corpus from the text that every machine has"),
    Verb("preprocess", "preprocess", "text files -> token files (.bin/.idx), resumable, by any number of workers"),
    Verb("train-tokenizer", "train_tokenizer", "a sentencepiece model from your own text"),
    Verb("build-retrieval", "build_retrieval", "database, index and neighbour tables, with a report on their quality"),
    Verb("inspect-neighbors", "inspect_neighbors", "a page of chunks, their neighbours and what they share"),
    Verb("pretrain", "pretrain", "train a GPT or a Retro; the same command goes on where it stopped"),
    Verb("retrieve-contexts", "retrieve_contexts", "passages of an index, written into conversations to train on"),
    Verb("finetune", "finetune", "train a finished model on conversations, whole or beside it"),
    Verb("retrofit", "retrofit", "add a retriever to a pretrained GPT and train it"),
    Verb("convert", "convert", "Hugging Face and Megatron-LM models in, Hugging Face models out"),
    Verb("generate", "generate", "text from a checkpoint, with the neighbours that each chunk read"),
    Verb("evaluate", "evaluate", "figures of a trained model: perplexity with intervals and leakage curve, task sets"),
    Verb("ablate", "ablate", "a grid of runs over any settings, and what they say side by side"),
    Verb("report", "report", "one HTML page about a run: curves, retrieval health, neighbours, settings"),
    Verb("serve", "serve", "OpenAI-compatible endpoint, and a page that shows what each chunk read"),
    Verb("inspect", "inspect", "explain any file or directory of ours: what, made from what, intact or not"),
    Verb("plan", "plan", "what a run costs before it starts: memory, time, balance, money, what is wrong with it"),
    Verb("reach", "reach", "whether the processes of this job reach each other"),
    Verb("environment", "environment", "what this machine has: versions, devices, optional packages, kernels"),
)

# What others call it, Megatron-LM's scripts among them; dashes and underlines are the same.
_OTHER_NAMES = {
    "preprocess": ("preprocess-data", "tokenize"),
    "preprocess --merge-token-files": ("merge-datasets",),
    "build-retrieval": ("preprocess-retro", "retro-preprocess", "build-db", "build-index", "build-neighbors", "query"),
    "pretrain": ("train", "pretrain-gpt", "pretrain-retro"),
    "finetune": ("sft", "instruct"),
    "generate": ("text-generation", "generate-samples-gpt"),
    "serve": ("run-text-generation-server", "text-generation-server"),
    "evaluate": ("eval", "perplexity"),
    "convert": ("import", "export", "checkpoint-convert", "checkpoint-util"),
    "--version": ("version", "-v"),
}


def other_name(name: str) -> str:
    """` (did you mean VERB?)` where a name is known from elsewhere, or nothing."""
    plain = name.rsplit("/")[-1].removesuffix(".py").lower().replace("_", "-")
    return next((f" (did you mean {verb}?)" for verb, names in _OTHER_NAMES.items() if plain in names), "")
