"""The optimizer and its schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

DECAY_STYLES = ("constant", "linear", "cosine", "WSD")


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
