"""A whole Retro as a folder that transformers loads with `trust_remote_code=True`: weights, settings, code."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from megatron_retro.artifacts.files import new_directory, write_file
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.checkpoint_files import parameter_shapes
from megatron_retro.convert.hugging_face import CONFIG
from megatron_retro.convert.safetensors_folder import write_folder
from megatron_retro.convert.stored_model import open_stored
from megatron_retro.runtime.strict_json import json_text

CODE = "modeling_megatron_retro"


def export_remote_code(
    source: Path, destination: Path, *, dtype: torch.dtype, shard_bytes: int, merge: bool = False
) -> Path:
    """Write the folder, tensor by tensor."""
    stored = open_stored(source, merge=merge)
    # The true vocabulary, unpadded: the file's shapes are then the model's.
    model = dataclasses.replace(stored.settings[ModelConfig], make_vocab_size_divisible_by=1)
    retro = stored.settings[RetroConfig]
    config = {
        "model_type": "megatron_retro",
        "architectures": ["MegatronRetroForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE}.MegatronRetroConfig",
            "AutoModelForCausalLM": f"{CODE}.MegatronRetroForCausalLM",
        },
        "retro_model": dataclasses.asdict(model),
        "retro_retrieval": dataclasses.asdict(retro),
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    names = parameter_shapes(model, retro)
    with new_directory(destination) as partial:
        write_folder(partial, ((f"retro.{name}", stored.load(name).to(dtype)) for name in names), shard_bytes)
        write_file(partial / CONFIG, json_text(config, indent=2) + "\n")
        shutil.copyfile(Path(__file__).with_name(f"{CODE}.py"), partial / f"{CODE}.py")
    return destination
