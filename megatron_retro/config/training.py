"""How a run trains: lengths, optimizer, what is tuned beside a model, checkpoints, logs, and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_retro.config.data import DataConfig, InstructionConfig
from megatron_retro.config.fields import option
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import Violation

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
METHODS = ("none", "lora", "adapter", "p-tuning", "ia3")
PARTS = ("decoder", "encoder", "cross-attention")
LORA_TARGETS = ("attention.query_key_value", "attention.output", "mlp.up", "mlp.down", "query", "key_value", "output")


@dataclass(frozen=True)
class TrainingConfig:
    """Training: batches, length, evaluation, faults"""

    micro_batch_size: int = option(1, "sequences of one forward", minimum=1)
    global_batch_size: int = option(8, "sequences of one step", minimum=1)
    rampup_batch_size: tuple[int, ...] | None = option(None, "start, increment, samples of the ramp-up", minimum=1)
    train_iters: int | None = option(None, "steps of the run", minimum=1)
    train_samples: int | None = option(None, "samples of the run", minimum=1)
    seed: int = option(1234, "seeds weights, order and dropout", minimum=0)
    freeze_decoder: bool = option(False, "train only what retro-fitting added", ours=True)
    freeze_encoder: bool = option(False, "leave the neighbour encoder as it starts", ours=True)
    eval_interval: int = option(0, "steps between evaluations; 0 = only at the end", minimum=0)
    eval_iters: int = option(10, "batches of one evaluation; 0 = none", minimum=0)
    retrieval_health: bool = option(True, "evaluate with real, no, random and shuffled neighbours", ours=True)
    deterministic_mode: bool = option(False, "only deterministic kernels")
    non_finite_policy: str = option(
        "skip", "a step whose loss or gradient is not finite", choices=("skip", "rollback", "stop"), ours=True
    )
    max_bad_steps: int = option(10, "bad steps in a row that end the run", minimum=1, ours=True)
    loss_spike_factor: float = option(0.0, "a loss this many times the recent median counts as bad; 0 = off", ours=True)
    exit_interval: int | None = option(None, "stop at a multiple of this many steps", minimum=1)
    exit_duration_in_mins: float | None = option(None, "save and stop after this long", minimum=0.0)
    exit_signal_handler: bool = option(True, "save and stop on SIGTERM and SIGUSR1")
    exit_on_requeue_code: int = option(75, "exit code of a run that wants to go on", ours=True)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rate, precision"""

    optimizer: str = option(
        "adam", "AdamW: torch's fused one, TransformerEngine's or Apex's", choices=("adam", "te-adam", "apex-adam")
    )
    lr: float = option(1e-4, "peak learning rate", minimum=0.0)
    min_lr: float = option(0.0, "learning rate after the decay", minimum=0.0)
    lr_decay_style: str = option("cosine", "shape of the decay", choices=DECAY_STYLES)
    lr_decay_samples: int | None = option(None, "samples until --min-lr; the whole run when not set", minimum=1)
    lr_decay_iters: int | None = option(None, "steps until --min-lr", minimum=1)
    lr_warmup_samples: int = option(0, "samples of linear warm-up", minimum=0)
    lr_warmup_iters: int = option(0, "steps of linear warm-up", minimum=0)
    lr_wsd_decay_samples: int | None = option(None, "WSD: samples of the final decay (not given: a tenth)", minimum=1)
    lr_wsd_decay_iters: int | None = option(None, "WSD: steps of the final decay", minimum=1)
    lr_wsd_decay_style: str = option("linear", "WSD: shape of the final decay", choices=WSD_STYLES)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", minimum=0.0)
    adam_beta1: float = option(0.9, "decay of the first moment", minimum=0.0, maximum=1.0)
    adam_beta2: float = option(0.95, "decay of the second moment", minimum=0.0, maximum=1.0)
    adam_eps: float = option(1e-8, "added to the root of the second moment", minimum=0.0)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 = no clipping", minimum=0.0)
    lr_scale_decoder: float = option(1.0, "factor of the decoder's rate", minimum=0.0, ours=True)
    lr_scale_encoder: float = option(1.0, "factor of the neighbour encoder's rate", minimum=0.0, ours=True)
    lr_scale_cross_attention: float = option(1.0, "factor of cross-attention's rate", minimum=0.0, ours=True)
    lr_scale_gate: float = option(1.0, "factor of the gate's rate", minimum=0.0, ours=True)
    bf16: bool = option(False, "compute in bfloat16 over float32 master weights")
    fp16: bool = option(False, "compute in float16 with loss scaling")
    fp8_format: str = option(
        "none", "products of layers in FP8: values e4m3, gradients e5m2 (hybrid)", choices=("none", "hybrid")
    )
    initial_loss_scale: float = option(65536.0, "fp16: first loss scale", minimum=1.0)
    loss_scale_window: int = option(1000, "fp16: good steps until the scale doubles", minimum=1)


@dataclass(frozen=True)
class PeftConfig:
    """Parameter-efficient tuning: LoRA, adapters, P-tuning, (IA)3"""

    peft_method: str = option("none", "train this instead of the whole model", choices=METHODS, ours=True)
    peft_parts: tuple[str, ...] = option(("decoder",), "where it is added", choices=PARTS, ours=True)
    peft_load: str | None = option(None, "start from this adapter", ours=True)
    lora_rank: int = option(32, "rank of the low-rank update", minimum=1, ours=True)
    lora_alpha: float = option(32.0, "the update is scaled by alpha / rank", minimum=0.0, ours=True)
    lora_dropout: float = option(0.0, "dropout of LoRA's input", minimum=0.0, maximum=1.0, ours=True)
    lora_targets: tuple[str, ...] = option(
        ("attention.query_key_value",), "linear layers that get an update, by the end of their name",
        choices=LORA_TARGETS, ours=True,
    )  # fmt: skip
    adapter_size: int = option(32, "bottleneck of an adapter", minimum=1, ours=True)
    adapter_parallel: bool = option(False, "adapters read the input of their block instead of its output", ours=True)
    num_virtual_tokens: int = option(100, "P-tuning: virtual tokens before the prompt", minimum=1, ours=True)
    prompt_encoder_hidden_size: int = option(2048, "P-tuning: width of the prompt encoder", minimum=1, ours=True)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: where, how often, how many"""

    save: str | None = option(None, "directory of this run's checkpoints, logs and report")
    load: str | None = option(None, "directory to start from; --save when that holds a checkpoint")
    save_interval: int = option(0, "steps between checkpoints; 0 = only at the end", minimum=0)
    keep_checkpoints: int = option(2, "complete checkpoints to keep; 0 = all", minimum=0, ours=True)
    async_save: bool = option(False, "write while training goes on")
    finetune: bool = option(False, "load weights only: fresh optimizer, schedule and data position")
    no_load_optim: bool = option(False, "take no optimizer state from --load")
    no_load_rng: bool = option(False, "take no random states from --load")
    allow_data_change: bool = option(
        False,
        "go on with other data, blend, seed or sequence length; the position counts in their order",
        ours=True,
    )


@dataclass(frozen=True)
class ObservabilityConfig:
    """Logs, curves for other programs, alarms, profiler"""

    log_interval: int = option(10, "steps between log lines", minimum=1)
    log_throughput: bool = option(True, "tokens per second and FLOP utilisation")
    manual_gc_interval: int = option(
        100, "steps between garbage collections, the same steps on every rank; 0 = when Python likes", minimum=0
    )
    tensorboard_dir: str | None = option(None, "write TensorBoard events here")
    wandb_project: str | None = option(None, "project of Weights & Biases that gets the curves")
    wandb_exp_name: str | None = option(None, "name of the run there; default: that of --save")
    mlflow_tracking_uri: str | None = option(None, "server or store of MLflow that gets the curves", ours=True)
    mlflow_experiment: str = option("megatron-retro", "experiment of MLflow", ours=True)
    prometheus_file: str | None = option(
        None, "write the newest numbers here, for node_exporter's textfiles", ours=True
    )
    prometheus_port: int | None = option(None, "let Prometheus read the newest numbers here; 0 = any port", ours=True)
    prometheus_host: str = option("127.0.0.1", "address that --prometheus-port listens at", ours=True)
    alert_command: str | None = option(None, "started as COMMAND EVENT TEXT for each alarm, facts as JSON", ours=True)
    profile: bool = option(False, "record a torch.profiler window")
    profile_step_start: int = option(10, "first profiled step", minimum=0)
    profile_step_end: int = option(12, "step after the last profiled one", minimum=0)
    peak_tflops: float | None = option(None, "peak rate of one device, for utilisation", minimum=0.0, ours=True)


def schedule_violations(optimizer: OptimizerConfig, training: TrainingConfig) -> list[Violation]:
    """Every rule about lengths, batches and rates that the settings break."""
    found = _length_violations(optimizer, training) + _ramp_violations(training)
    if optimizer.min_lr > optimizer.lr:
        found.append(Violation("min_lr", optimizer.min_lr, f"at most --lr ({optimizer.lr})", "lower it"))
    if optimizer.bf16 and optimizer.fp16:
        found.append(Violation("fp16", True, "one of --bf16 and --fp16", "drop one"))
    return found


def _length_violations(optimizer: OptimizerConfig, training: TrainingConfig) -> list[Violation]:
    found = []
    for first, second, section in (
        ("train_iters", "train_samples", training),
        ("lr_decay_samples", "lr_decay_iters", optimizer),
        ("lr_warmup_samples", "lr_warmup_iters", optimizer),
        ("lr_wsd_decay_samples", "lr_wsd_decay_iters", optimizer),
    ):
        if getattr(section, first) and getattr(section, second):
            flag = "--" + second.replace("_", "-")
            found.append(Violation(first, getattr(section, first), f"alone, without {flag}", "give one of the two"))
    return found


def _ramp_violations(training: TrainingConfig) -> list[Violation]:
    ramp = training.rampup_batch_size
    if ramp is None:
        return []
    if len(ramp) != 3:
        return [Violation("rampup_batch_size", ramp, "three numbers: start, increment, samples", "give all three")]
    start, increment, _ = ramp
    if start > training.global_batch_size or (training.global_batch_size - start) % increment:
        expected = f"a start that reaches {training.global_batch_size} by whole increments"
        return [Violation("rampup_batch_size", ramp, expected, "change start or increment")]
    return []


def passages_have_a_reader(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Passages for the encoder need an encoder that reads."""
    if InstructionConfig not in settings:
        return
    place = settings[InstructionConfig].context_place
    if place in ("encoder", "split") and not settings[RetroConfig].reads_neighbors():
        yield Violation(
            "context_place",
            place,
            "prompt or none",
            "this model reads no neighbours: turn the gate on, or load a Retro",
        )


def buckets_are_of_one_size(settings: Settings, world_size: int) -> Iterator[Violation]:
    """A bucket is the rows of a step, so steps must be of one size."""
    if InstructionConfig in settings and settings[InstructionConfig].bucket_by_length:
        ramp = settings[TrainingConfig].rampup_batch_size
        if ramp is not None:
            yield Violation("rampup_batch_size", ramp, "none", "--bucket-by-length needs steps of one size")


def tuned_parts_are_reached(settings: Settings, world_size: int) -> Iterator[Violation]:
    """What is tuned beside encoder and cross-attention alone learns from passages in the encoder, or not at all."""
    if PeftConfig not in settings or settings[PeftConfig].peft_method in ("none", "p-tuning"):
        return
    place, parts = settings[InstructionConfig].context_place, settings[PeftConfig].peft_parts
    if "decoder" not in parts and place not in ("encoder", "split"):
        yield Violation(
            "peft_parts",
            parts,
            f"the decoder too with --context-place {place}, or nothing would be trained",
            "add it, or give passages to the encoder",
        )


def one_thing_is_frozen(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Tuning beside the model freezes all of it; a GPT is a decoder and nothing else."""
    if TrainingConfig not in settings:
        return
    frozen = [name for name in ("freeze_decoder", "freeze_encoder") if getattr(settings[TrainingConfig], name)]
    for name in frozen:
        if PeftConfig in settings and settings[PeftConfig].peft_method != "none":
            yield Violation(name, True, "off", "--peft-method freezes the whole model already")
        elif RetroConfig in settings and not settings[RetroConfig].reads_neighbors():
            why = "nothing else would be left to train" if name == "freeze_decoder" else "there is nothing to freeze"
            yield Violation(name, True, "off without a retriever that reads", why)


def schedule_fits(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Lengths are given once, rates and ramps can be."""
    if OptimizerConfig in settings and TrainingConfig in settings:
        yield from schedule_violations(settings[OptimizerConfig], settings[TrainingConfig])


def validation_has_neighbors(settings: Settings, world_size: int) -> Iterator[Violation]:
    """A Retro that trains with neighbours is evaluated with neighbours."""
    if not settings.has(DataConfig, RetroConfig, TrainingConfig) or settings[TrainingConfig].eval_iters == 0:
        return
    data = settings[DataConfig]
    has_tables = settings[RetroConfig].retro_add_retriever and data.neighbor_path is not None
    if has_tables and data.valid_data_path is not None and data.valid_neighbor_path is None:
        yield Violation(
            "valid_neighbor_path",
            None,
            "one table for each file of --valid-data-path",
            "query them with build-retrieval (--retro-query-corpus valid=PREFIX), or --eval-iters 0",
        )


TRAINING_RULES = (
    schedule_fits,
    validation_has_neighbors,
    passages_have_a_reader,
    buckets_are_of_one_size,
    one_thing_is_frozen,
    tuned_parts_are_reached,
)
