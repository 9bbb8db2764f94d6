"""Flags of Megatron-LM's that have no meaning here: what to give in place of each, or why nothing is needed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from megatron_retro.config.toml_files import nearest

_NO_SENTENCES = "it prepares sentences for BERT; documents stay whole here, leave it out"
_OWN_VOCABULARY = "--retro-embedder-path names a folder that holds its vocabulary"
_KERNELS = "the fastest kernel that serves is chosen at start (`megatron-retro environment`), leave it out"
_OVERLAP = "communication overlaps where it can, leave it out"
_SCHEDULE = "the schedule is always that of the command, and what changed is told; leave it out"
_CONSTANT_DECAY = "--weight-decay, which stays what it is"
_OWN_FORMAT = "checkpoints have one format, which loads on any layout; leave it out"
_ONE_CODE = "there is one model code, leave it out"
_ORDER = "the order of samples is drawn from --seed, leave it out"
_LOGGED = "every number is in events.jsonl of the run and in --tensorboard-dir, leave it out"
_RECOMPUTE = "--recompute-granularity full says all"
_NO_EXPERTS = "mixtures of experts are not here; a dense model has none of these flags"
_ONE_DATABASE = "the stages keep what the next ones need; leave it out"
_CORPORA = "--neighbor-path and --database-path name the neighbour tables and the database that build-retrieval made"
_OF_FP8 = "--fp8-format hybrid scales each tensor by its own values, without a history; leave it out"
_QUESTIONS = "`evaluate TASK --eval-data TASK=FILE --eval-output FOLDER` generates and scores"
_RECIPES = "a recipe's [data] table holds long lists: --config FILE.toml"

_INSTEAD = {
    "--retro-cyclic-train-iters": "corpora are read again by themselves; --train-iters is the length of the run, "
    "--max-data-epochs refuses to repeat",
    "--retro-gpt-data-path": "--retro-database-corpus and --retro-query-corpus name token files",
    "--retro-index-nfeats": "the embedder says how wide its vectors are, leave it out",
    "--retro-index-type": "--retro-index-str names any index of faiss, leave it out",
    "--retro-return-doc-ids": "a neighbour's document is in the database beside its tokens, leave it out",
    "--retro-verify-neighbor-count": "tables are always checked against their corpus and database, leave it out",
    "--retro-tokenizer-type": "--tokenizer-type",
    "--use-rotary-position-embeddings": "--position-embedding-type rope, or what the checkpoint says",
    "--no-position-embedding": "--position-embedding-type none, or what the checkpoint says",
    "--retro-gpt-tokenizer-type": "--tokenizer-type",
    "--retro-gpt-tokenizer-model": "--tokenizer-model",
    "--calculate-per-token-loss": "losses are always averaged over the tokens that count, leave it out",
    "--manual-gc": "garbage is always collected every --manual-gc-interval steps, leave it out",
    "--empty-unused-memory-level": "PYTORCH_CUDA_ALLOC_CONF sets up the allocator, leave it out",
    "--decoupled-lr": "there is one rate for a decoder; --lr-scale-decoder is its factor in a Retro",
    "--decoupled-min-lr": "there is one least rate, --min-lr",
    "--grad-reduce-in-bf16": "gradients are reduced in float32, leave it out",
    "--ckpt-step": "beside --load RUN it names one checkpoint, as --load RUN/step-NNNNNNNN does",
    "--data-folder": "--instruction-data names conversation files, with weights",
    "--answer-loss-only": "the loss is on the last reply anyway, leave it out",
    "--ft-neighbours": "--num-contexts, passages of a conversation that are used",
    "--strict-lambada": "question sets are listed by `evaluate --help`",
    "--valid-data": "`evaluate perplexity --data-path TOKENS`, or --eval-data TASK=FILE",
    "--top-k-sampling": "--top-k",
    "--use-retrieved-neighbours": "--context-place encoder",
    "--reuse-top": "--context-place split gives the encoder what the prompt has no room for",
    "--sample-input-file": "--prompt-file, or for questions: " + _QUESTIONS,
    "--sample-output-file": "--generate-output; " + _QUESTIONS,
    "--dataset-impl": "token files are always memory-mapped, leave it out",
    "--keep-sequential-samples": "documents keep their order, leave it out",
    "--distributed-backend": "NCCL on GPUs, gloo on CPUs, leave it out",
    "--DDP-impl": "--data-parallel-sharding says what data ranks share",
    "--recompute-activations": "no layer keeps scores, norms or nonlinearities, leave it out",
    "--checkpoint-activations": "--recompute-granularity full",
    "--tensor-model-parallel": "--tensor-model-parallel-size",
    "--model-parallel-size": "--tensor-model-parallel-size",
    "--batch-size": "--micro-batch-size of one forward, --global-batch-size of one step",
    "--lr-decay-ratio": "--lr-decay-iters or --lr-decay-samples",
    "--lr-warmup-fraction": "--lr-warmup-iters or --lr-warmup-samples",
    "--train-data-path": "--data-path; --valid-data-path for a validation corpus of its own",
    "--test-data-path": "`evaluate perplexity --perplexity-split test` reads the last part of --split",
    "--skip-train": "`megatron-retro evaluate`",
    "--log-timers-to-tensorboard": "times are written to --tensorboard-dir anyway, leave it out",
    "--use-checkpoint-args": "--config RUN/config.toml, which every run writes",
    "--use-legacy-models": "`megatron-retro convert` reads such checkpoints",
    "--loss-scale": "--initial-loss-scale; the scale adapts by itself",
    "--exit-on-missing-checkpoint": "a --load without a checkpoint is refused anyway, leave it out",
}
_ALIKE = {
    _NO_SENTENCES: ("--split-sentences", "--keep-newlines"),
    _OWN_VOCABULARY: (
        "--retro-bert-vocab-file", "--retro-bert-tokenizer-type", "--bert-embedder-type", "--output-bert-embeddings",
    ),
    _KERNELS: (
        "--use-flash-attn", "--attention-backend", "--transformer-impl", "--no-masked-softmax-fusion",
        "--no-rope-fusion", "--no-bias-gelu-fusion", "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion",
        "--no-persist-layer-norm", "--no-gradient-accumulation-fusion", "--attention-softmax-in-fp32",
        "--cross-entropy-loss-fusion",
    ),
    _OVERLAP: (
        "--overlap-grad-reduce", "--overlap-param-gather", "--tp-comm-overlap",
        "--no-async-tensor-model-parallel-allreduce", "--no-overlap-p2p-communication", "--ddp-bucket-size",
    ),
    _SCHEDULE: ("--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"),
    _OWN_FORMAT: (
        "--ckpt-format", "--dist-ckpt-format", "--use-dist-ckpt", "--auto-detect-ckpt-format",
        "--dist-ckpt-optim-fully-reshardable", "--ckpt-fully-parallel-save", "--ckpt-fully-parallel-load",
    ),
    _CONSTANT_DECAY: ("--start-weight-decay", "--end-weight-decay", "--weight-decay-incr-style"),
    _ONE_CODE: ("--use-mcore-models", "--spec", "--no-initialization"),
    _ORDER: ("--dataloader-type", "--num-dataset-builder-threads", "--no-data-sharding", "--data-sharding"),
    _LOGGED: (
        "--log-params-norm", "--log-num-zeros-in-grad", "--log-validation-ppl-to-tensorboard", "--log-progress",
        "--log-memory-to-tensorboard", "--timing-log-level", "--tensorboard-log-interval", "--tensorboard-queue-size",
    ),
    _QUESTIONS: ("--task", "--gen-start-idx", "--num-gen"),
    _CORPORA: ("--retro-workdir",),
    _RECIPES: ("--data-args-path", "--per-split-data-args-path"),
    _OF_FP8: (
        "--fp8-amax-history-len", "--fp8-amax-compute-algo", "--fp8-param-gather", "--fp8-margin", "--fp8-interval",
        "--fp8-recipe", "--no-fp8-wgrad",
    ),
    _ONE_DATABASE: (
        "--no-retro-index-delete-training-embeddings", "--no-retro-index-delete-added-codes",
        "--retro-index-no-delete-training-embeddings", "--retro-index-no-delete-added-codes",
    ),
    _RECOMPUTE: ("--recompute-method", "--recompute-num-layers", "--distribute-saved-activations"),
}  # fmt: skip
_MAPPED = "token files are mapped and masks are made where they are needed, leave it out"
_ALIKE[_MAPPED] = ("--no-create-attention-mask-in-dataloader", "--no-mmap-bin-files")
BY_FLAG = _INSTEAD | {flag: reason for reason, flags in _ALIKE.items() for flag in flags}
_RETRO_GPT = "--retro-gpt-"
_OF_THE_RUN = ": neighbour tables belong to the corpus, whatever is trained on it; leave it out"


_EXPERTS = ("--num-experts", "--expert-", "--moe-")
_STAGE = "--retro-tasks takes plan, train, encode, merge, query and verify; leave it out for all of them"
# what to give in place of a value of Megatron's that is no choice here
BY_VALUE = {
    "NullTokenizer": "leave it out: --mock-data with --vocab-size needs no tokenizer",
    "BertWordPieceLowerCase": "the embedder has its own; give the corpus's tokenizer",
    "BertWordPieceCase": "the embedder has its own; give the corpus's tokenizer",
    "build": _STAGE,
    **dict.fromkeys(("db-build", "index-train", "index-add", "query-neighbors", "query-pretraining-neighbors"), _STAGE),
}
# Megatron's default where ours is another and numbers depend on it
MEGATRON_DEFAULTS: Mapping[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "gelu_tanh": True,
    "num_query_groups": 1,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "retro_encoder_hidden_dropout": 0.1,
    "retro_encoder_attention_dropout": 0.1,
    "lr_decay_style": "linear",
    "lr_wsd_decay_style": "exponential",
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
    "initial_loss_scale": 2.0**32,
    "eval_interval": 1000,
    "eval_iters": 100,
    "log_interval": 100,
}


def instead_of(flag: str, here: Sequence[str], elsewhere: Sequence[str], from_checkpoint: Container[str] = ()) -> str:
    """What to give in place of a flag that is not among those known `here`, as the end of a sentence."""
    plain = flag.replace("_", "-")
    if plain in here:
        return f" (did you mean {plain}?)"
    if flag == "--retro-workdir" and "--retro-project-dir" in here:
        return ": --retro-project-dir"
    if flag == "--retro-project-dir" and "--neighbor-path" in here:
        return f": {_CORPORA}"
    if flag in from_checkpoint:
        return ": the checkpoint of --load says it, leave it out"
    advice = BY_FLAG.get(flag) or BY_FLAG.get(plain)
    if advice is not None:
        return f": {advice}"
    if flag.startswith(_EXPERTS):
        return f": {_NO_EXPERTS}"
    if flag in elsewhere:
        return "; other verbs read it, leave it out"
    if not flag.startswith(_RETRO_GPT):
        return nearest(flag, here)
    general = flag.replace(_RETRO_GPT, "--")
    return f" (did you mean {general}?)" if general in here else _OF_THE_RUN


def translated(arguments: Sequence[str], known: Container[str]) -> list[str]:
    """Flags of Megatron's that other words say here, for a verb that has these."""
    words = _of_one_step(arguments) if "load" in known else list(arguments)
    words = _without_null_tokenizer(words) if "mock_data" in known else words
    if "global_batch_size" in known:  # so a loss is averaged anyway
        words = [word for word in words if word != "--calculate-per-token-loss"]
    return _with_positions(words) if "position_embedding_type" in known else words


def _of_one_step(arguments: Sequence[str]) -> list[str]:
    """`--load RUN --ckpt-step N` as `--load RUN/step-N`."""
    words = list(arguments)
    values = {flag: words.index(flag) + 1 for flag in ("--load", "--ckpt-step") if flag in words[:-1]}
    if len(values) < 2 or not words[values["--ckpt-step"]].isdigit():
        return words
    run, step = words[values["--load"]], int(words[values["--ckpt-step"]])
    words[values["--load"]] = f"{run.rstrip('/')}/step-{step:08}"
    del words[values["--ckpt-step"] - 1 : values["--ckpt-step"] + 1]
    return words


def _without_null_tokenizer(words: list[str]) -> list[str]:
    """`--mock-data --tokenizer-type NullTokenizer --vocab-size N`: that tokenizer ends documents with the id N."""
    values = {flag: words.index(flag) + 1 for flag in ("--tokenizer-type", "--vocab-size") if flag in words[:-1]}
    if "--mock-data" not in words or len(values) < 2 or words[values["--tokenizer-type"]] != "NullTokenizer":
        return words
    if words[values["--vocab-size"]].isdigit():
        words[values["--vocab-size"]] = str(int(words[values["--vocab-size"]]) + 1)
        del words[values["--tokenizer-type"] - 1 : values["--tokenizer-type"] + 1]
    return words


def _with_positions(arguments: Sequence[str]) -> list[str]:
    """Megatron's two older switches for positions as the flag that replaced them."""
    words = [word for word in arguments if word not in ("--use-rotary-position-embeddings", "--no-position-embedding")]
    if "--use-rotary-position-embeddings" in arguments:
        return ["--position-embedding-type", "rope", *words]
    if "--no-position-embedding" in arguments and "--position-embedding-type" not in arguments:
        return ["--position-embedding-type", "none", *words]
    return words


def speaks_megatron(arguments: Sequence[str]) -> bool:
    """Whether a command line has flags that only Megatron-LM has."""
    return any(word in BY_FLAG for word in arguments)


def different_defaults(known: Mapping[str, Any], given: Container[str]) -> str:
    """A table of what a script that gives no such flag would get here and there; empty where nothing differs."""
    rows = [
        f"  {'--' + name.replace('_', '-'):<34} {known[name]!s:<10} {theirs}"
        for name, theirs in MEGATRON_DEFAULTS.items()
        if name in known and name not in given and known[name] != theirs
    ]
    return "\n".join([f"  {'not given':<34} {'here':<10} Megatron-LM", *rows]) if rows else ""
