"""A whole Retro as a Hugging Face folder with its code, for transformers' `trust_remote_code=True`, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megatron_retro.artifacts.files import new_directory, write_file
from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings, build_settings, specs_by_name
from megatron_retro.convert.checkpoint_files import open_stored, parameter_shapes, write_checkpoint
from megatron_retro.convert.exported_text import export_text_files
from megatron_retro.convert.hugging_face import CONFIG, imported_tokenizer
from megatron_retro.convert.model_card import CARD, model_card
from megatron_retro.convert.safetensors_folder import SafetensorsFolder, read_json, write_folder
from megatron_retro.data.model_text import keep_text_files
from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.strict_json import json_text

MODEL_TYPE = "megatron_retro"
_REMOTE_CODE = "modeling_megatron_retro"
_SECTIONS = {"retro_model": ModelConfig, "retro_retrieval": RetroConfig}


def is_remote_code(source: Path) -> bool:
    """Whether a folder is such an export."""
    return (source / CONFIG).is_file() and read_json(source / CONFIG).get("model_type") == MODEL_TYPE


def export_remote_code(
    source: Path, destination: Path, *, dtype: torch.dtype, shard_bytes: int, merge: bool = False
) -> Path:
    """Write the folder, tensor by tensor."""
    stored = open_stored(source, merge=merge)
    # The true vocabulary, unpadded: the file's shapes are then the model's.
    model = dataclasses.replace(stored.settings[ModelConfig], make_vocab_size_divisible_by=1)
    retro = stored.settings[RetroConfig]
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["MegatronRetroForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{_REMOTE_CODE}.MegatronRetroConfig",
            "AutoModelForCausalLM": f"{_REMOTE_CODE}.MegatronRetroForCausalLM",
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
        write_file(partial / f"{_REMOTE_CODE}.py", Path(__file__).with_name(f"{_REMOTE_CODE}.py").read_bytes())
        export_text_files(stored.path, stored.settings[TokenizerConfig], partial)
        write_file(partial / CARD, model_card(stored.path, destination.name, "remote-code"))
    return destination


def import_remote_code(
    source: Path, run: Path, tokenizer: TokenizerConfig | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """Write step 0 of `run` from the folder, of what transformers may have changed in the meantime."""
    config, folder = read_json(source / CONFIG), SafetensorsFolder(source)
    values = {name: value for section in _SECTIONS for name, value in dict(config.get(section) or {}).items()}
    unknown = sorted(set(values) - set(specs_by_name([*_SECTIONS.values()])))
    if unknown:
        raise ArtifactError(
            f"{source / CONFIG} has settings that this version does not know",
            got=", ".join(unknown),
            fix="use the version of megatron_retro that wrote it",
        )
    stored = build_settings([*_SECTIONS.values()], {k: v for k, v in values.items() if v is not None}, {})
    model, retro = stored[ModelConfig], stored[RetroConfig]
    shapes = parameter_shapes(model, retro)
    found = {name: folder.shape(f"retro.{name}") for name in shapes if f"retro.{name}" in folder.files}
    if found != shapes:
        wrong = [name for name, shape in shapes.items() if found.get(name) != shape]
        raise ArtifactError(f"{source} does not hold the model of its {CONFIG}", got=", ".join(wrong[:5]))
    kept = keep_text_files(tokenizer or imported_tokenizer(source), run)
    inputs = {"config.json": file_record(source / CONFIG).sha256}
    settings = Settings([model, retro, kept])
    return write_checkpoint(run, settings, shapes, lambda name: folder.tensor(f"retro.{name}"), inputs, dtype)
