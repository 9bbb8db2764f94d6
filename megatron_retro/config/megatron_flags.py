"""Flags of Megatron-LM's that have no meaning here: what to give in place of each, or why nothing is needed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.toml_files import nearest

_NO_SENTENCES = "it prepares sentences for BERT; documents stay whole here, leave it out"
_OWN_VOCABULARY = "--retro-embedder-path names a folder that holds its vocabulary"
_KERNELS = "the fastest kernel that serves is chosen at start (`megatron-retro environment`), leave it out"
_OVERLAP = "communication overlaps where it can, leave it out"
_SCHEDULE = "the schedule is always that of the command, and what changed is told; leave it out"
_OWN_FORMAT = "checkpoints have one format, which loads on any layout; leave it out"
_ONE_CODE = "there is one model code, leave it out"
_ORDER = "the order of samples is drawn from --seed, leave it out"
_LOGGED = "every number is in events.jsonl of the run and in --tensorboard-dir, leave it out"
_RECOMPUTE = "--recompute-granularity full says all"

_INSTEAD = {
    "--retro-cyclic-train-iters": "corpora are read again by themselves; --train-iters is the length of the run, "
    "--max-data-epochs refuses to repeat",
    "--retro-gpt-data-path": "--retro-database-corpus and --retro-query-corpus name token files",
    "--retro-index-nfeats": "the embedder says how wide its vectors are, leave it out",
    "--retro-index-type": "--retro-index-str names any index of faiss, leave it out",
    "--retro-return-doc-ids": "a neighbour's document is in the database beside its tokens, leave it out",
    "--retro-verify-neighbor-count": "tables are always checked against their corpus and database, leave it out",
    "--retro-workdir": "--retro-project-dir",
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
    _OWN_VOCABULARY: ("--retro-bert-vocab-file", "--retro-bert-tokenizer-type"),
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
    _OWN_FORMAT: ("--ckpt-format", "--dist-ckpt-format", "--use-dist-ckpt", "--auto-detect-ckpt-format"),
    _ONE_CODE: ("--use-mcore-models", "--spec", "--no-initialization"),
    _ORDER: ("--dataloader-type", "--num-dataset-builder-threads", "--data-sharding"),
    _LOGGED: (
        "--log-params-norm", "--log-num-zeros-in-grad", "--log-validation-ppl-to-tensorboard", "--log-progress",
        "--log-memory-to-tensorboard", "--timing-log-level", "--tensorboard-log-interval", "--tensorboard-queue-size",
    ),
    _RECOMPUTE: ("--recompute-method", "--recompute-num-layers", "--distribute-saved-activations"),
}  # fmt: skip
BY_FLAG = _INSTEAD | {flag: reason for reason, flags in _ALIKE.items() for flag in flags}
_RETRO_GPT = "--retro-gpt-"
_OF_THE_RUN = ": neighbour tables belong to the corpus, whatever is trained on it; leave it out"


def instead_of(flag: str, here: Sequence[str], elsewhere: Sequence[str]) -> str:
    """What to give in place of a flag that is not among those known `here`, as the end of a sentence."""
    if flag in BY_FLAG:
        return f": {BY_FLAG[flag]}"
    if flag in elsewhere:
        return "; other verbs read it"
    if not flag.startswith(_RETRO_GPT):
        return nearest(flag, here)
    general = flag.replace(_RETRO_GPT, "--")
    return f" (did you mean {general}?)" if general in here else _OF_THE_RUN
