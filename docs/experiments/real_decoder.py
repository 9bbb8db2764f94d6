"""What a real decoder gains from its neighbours: through cross-attention, or as passages in its prompt.

    python docs/experiments/real_decoder.py DECODER --retro warm=RUN noise=RUN --trained continued=RUN --text PREFIX \
        --database DB --neighbors TABLE --work DIR --json OUT

Windows spread evenly over held-out text are scored by the decoder alone, by each Retro with its real neighbours and
with those of another window, and by decoders that were trained on without retrieval; the chunks that follow some of
each window's chunks also by the decoders with the passages in their prompts. Every part's losses are kept in DIR, so a
run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_retro.artifacts.files import write_file
from megatron_retro.assembly.loading import LoadedModel, load_model
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.neighbor_transforms import ThinnedDatabase
from megatron_retro.data.token_file import TokenFile
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.costs import ENCODER, model_costs
from megatron_retro.runtime.console import say
from megatron_retro.runtime.statistics import bootstrap_ratio
from megatron_retro.runtime.strict_json import json_text

GRAM = 4  # tokens that must be the same in a row to count as shared
NEAR_COPY = 0.5  # share of a chunk's grams in its passages


@dataclass(frozen=True)
class Text:
    """Windows [W, S + 1] of held-out text with the passages [W, C, K, R] of their chunks."""

    tokens: Tensor
    passages: Neighbors[Tensor]
    documents_WC: NDArray[np.int64]
    chunk: int

    @property
    def others(self) -> Neighbors[Tensor]:
        """The passages of a window half of the text away."""
        half = len(self.tokens) // 2
        return Neighbors(self.passages.tokens_BCKR.roll(half, 0), self.passages.mask_BCKR.roll(half, 0))

    def overlap(self) -> NDArray[np.float64]:
        """[W, C]: share of what follows a chunk (of the last: what the window has of it) that its passages hold."""
        found = np.zeros(self.documents_WC.shape)
        for window, chunk in np.ndindex(found.shape):
            tokens, mask = self.passages.tokens_BCKR[window, chunk], self.passages.mask_BCKR[window, chunk]
            held = {gram for one, there in zip(tokens, mask, strict=True) for gram in _grams(one[there].tolist())}
            start = (chunk + 1) * self.chunk
            following = _grams(self.tokens[window, start - GRAM + 1 : start + self.chunk].tolist())
            found[window, chunk] = np.mean([gram in held for gram in following])
        return found


def _grams(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]


def read_text(arguments: argparse.Namespace, retro: RetroConfig) -> Text:
    """Evenly spread windows."""
    file, database = TokenFile(arguments.text), ChunkDatabase.open(arguments.database)
    table, chunk = NeighborTable.open(arguments.neighbors), retro.retro_chunk_length
    chunks = arguments.length // chunk
    halves = np.linspace(0, file.num_tokens // chunk - chunks - 2, 2 * arguments.windows - 1).astype(np.int64)
    starts = halves[1 if arguments.between else 0 :: 2]
    tokens = np.stack([file.tokens(start * chunk, start * chunk + arguments.length + 1) for start in starts])
    found = np.stack([table.rows(int(start), int(start) + chunks) for start in starts])
    ids = _kept(found, database, arguments.keep_fraction)[..., : retro.retro_num_neighbors]
    passages, mask = database.gather(ids, retro.retrieved_length())
    ends = (starts[:, None] + np.arange(1, chunks + 1)) * chunk - 1
    return Text(
        torch.from_numpy(tokens.astype(np.int64)),
        Neighbors(torch.from_numpy(passages.astype(np.int64)), torch.from_numpy(mask)),
        file.documents_of(ends.flatten()).reshape(ends.shape),
        chunk,
    )


def _kept(found: NDArray[np.int64], database: ChunkDatabase, fraction: float) -> NDArray[np.int64]:
    """Those of a part of the database's documents, the nearest first; -1 where too few were saved."""
    documents = database.document_of(np.maximum(found, 0))
    there = ThinnedDatabase(fraction).keeps(database, found, documents) & (found >= 0)
    order = np.argsort(~there, axis=-1, kind="stable")
    return np.where(np.take_along_axis(there, order, -1), np.take_along_axis(found, order, -1), -1)


@torch.no_grad()
def window_losses(model: LoadedModel, text: Text, neighbors: Neighbors[Tensor] | None) -> NDArray[np.float32]:
    """[W, S] the loss of every token."""
    rows = []
    for row in range(len(text.tokens)):
        some = slice(row, row + 1)
        own = None
        if neighbors is not None:
            own = Neighbors(neighbors.tokens_BCKR[some], neighbors.mask_BCKR[some])
        rows.append(model.module(text.tokens[some, :-1], own, labels_BS=text.tokens[some, 1:]).float().numpy())
    return np.concatenate(rows)


@torch.no_grad()
def prompted_losses(
    model: LoadedModel, text: Text, neighbors: Neighbors[Tensor], prompted: list[int]
) -> NDArray[np.float32]:
    """[W, P, M]: what follows chosen chunks, with the chunk's passages before the window, the nearest last."""
    found = []
    for window, tokens in enumerate(text.tokens):
        for chunk in prompted:
            mask = neighbors.mask_BCKR[window, chunk].flip(0)
            prompt = neighbors.tokens_BCKR[window, chunk].flip(0)[mask]
            stop = (chunk + 2) * text.chunk
            whole = torch.cat((prompt, tokens[:stop]))[None]
            losses = model.module(whole[:, :-1], labels_BS=whole[:, 1:])
            found.append(losses[0, -text.chunk :].float().numpy())
    return np.stack(found).reshape(len(text.tokens), len(prompted), text.chunk)


class Kept:
    """Losses by the name of what gave them; what is on disk is not computed again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float64]:
        """Losses of one part."""
        path = self.directory / f"{name}.npy"
        if not path.exists():
            say(f"measuring {name}")
            np.save(path, compute())
        found: NDArray[np.float64] = np.asarray(np.load(path), np.float64)
        return found


def by_chunk(losses_WS: NDArray[np.float64], chunk: int) -> NDArray[np.float64]:
    """[W, C - 1]: mean loss of what each chunk's queries predict, but for the last, whose next chunk is cut."""
    seen = losses_WS[:, chunk - 1 :]
    count = seen.shape[1] // chunk
    means: NDArray[np.float64] = seen[:, : count * chunk].reshape(len(seen), count, chunk).mean(-1)
    return means


def compared(
    losses: Mapping[str, NDArray[np.float64]], base: str, documents: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> dict[str, Any]:
    """Mean loss of each over the chosen chunks, and what it is below the base's, with an interval over documents."""
    units, ones = documents[chosen], np.ones(int(chosen.sum()))
    result: dict[str, Any] = {"chunks": int(chosen.sum()), "documents": len(np.unique(units))}
    for name, values in losses.items():
        gain = bootstrap_ratio((losses[base] - values)[chosen], ones, seed=1, units=units)
        result[name] = {"loss": float(values[chosen].mean()), "gain": gain.to_json()}
    return result


def summary(losses: Mapping[str, NDArray[np.float64]], base: str, text: Text, places: list[int]) -> dict[str, Any]:
    """Over all chunks at these places, and by whether their passages hold most of what follows."""
    overlap, documents = text.overlap()[:, places], text.documents_WC[:, places]
    near = overlap > NEAR_COPY
    return {
        "all": compared(losses, base, documents, np.ones_like(near)),
        "near copies": compared(losses, base, documents, near),
        "others": compared(losses, base, documents, ~near),
    }


def costs(model: ModelConfig, retro: RetroConfig, length: int) -> dict[str, float]:
    """Operations of a token's forward pass, and numbers cached for what was retrieved."""
    alone, with_retro = (model_costs(model, one, length).forward_flops for one in (RetroConfig(), retro))
    encoder = 2 * model_costs(model, retro, length).named(ENCODER).multiply_adds
    layers = sum(unit.multiply_adds for unit in model_costs(model, RetroConfig(), length).units) * 2
    head = 2 * (model.vocab_size or 0) * model.hidden_size
    passages = retro.retro_num_neighbors * retro.retrieved_length()
    per_layer = 2 * model.num_key_value_heads() * model.head_size() * passages
    return {
        "decoder": alone,
        "retro adds": with_retro - alone,
        "retro adds, kept": with_retro - alone - encoder,
        "prompt adds": (layers - head) * passages / retro.retro_chunk_length,
        "retro caches": per_layer * len(retro.retrieval_layers(model.num_layers)),
        "prompt caches": per_layer * model.num_layers,
    }


def _loaded(named: list[str]) -> dict[str, LoadedModel]:
    pairs = (one.partition("=")[::2] for one in named)
    return {name: load_model(Path(path), device="cpu", dtype="fp32") for name, path in pairs}


def main() -> int:
    """Measure what is not there yet; write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoder", type=Path)
    parser.add_argument("--retro", nargs="*", default=[], metavar="NAME=RUN")
    parser.add_argument("--trained", nargs="*", default=[], metavar="NAME=RUN", help="without retrieval")
    for name in ("text", "database", "neighbors", "work", "json"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--between", action="store_true", help="windows halfway between those, one fewer")
    parser.add_argument(
        "--keep-fraction",
        type=float,
        default=1.0,
        help="of the database's documents; of a part, real neighbours in cross-attention alone are measured",
    )
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--prompted", type=int, nargs="+", default=[2, 5], help="chunks of each window, from 0")
    arguments = parser.parse_args()
    retros, trained = _loaded(arguments.retro), _loaded(arguments.trained)
    first = next(iter(retros.values()))
    text, kept = read_text(arguments, first.retro), Kept(Path(arguments.work))
    for model in retros.values():
        model.module.keep_encodings(None)
    decoder = load_model(arguments.decoder, device="cpu", dtype="fp32")
    losses = {"decoder": kept.get("decoder", partial(window_losses, decoder, text, None))}
    losses |= {name: kept.get(name, partial(window_losses, model, text, None)) for name, model in trained.items()}
    prompts, whole = {}, arguments.keep_fraction == 1
    for kind, neighbors in ({"real": text.passages} | ({"other": text.others} if whole else {})).items():
        for name, model in retros.items():
            losses[f"{name}, {kind}"] = kept.get(f"{name}-{kind}", partial(window_losses, model, text, neighbors))
        for name, model in ({"prompt": decoder} | {f"prompt of {name}": one for name, one in trained.items()}).items():
            if whole:
                prompted = partial(prompted_losses, model, text, neighbors, arguments.prompted)
                prompts[f"{name}, {kind}"] = kept.get(f"{name.replace(' ', '-')}-{kind}", prompted).mean(-1)
    chunks = {name: by_chunk(values, text.chunk) for name, values in losses.items()}
    places = list(range(chunks["decoder"].shape[1]))
    at_prompts = {name: values[:, arguments.prompted] for name, values in chunks.items()} | prompts
    result = {
        "windows": len(text.tokens),
        "database": arguments.keep_fraction,
        "length": arguments.length,
        "costs": {name: costs(one.settings[ModelConfig], one.retro, arguments.length) for name, one in retros.items()},
        "all tokens": summary(chunks, "decoder", text, places),
    }
    if whole:
        result["chunks that were prompted"] = summary(at_prompts, "decoder", text, arguments.prompted)
    write_file(Path(arguments.json), (json_text(result, indent=1) + "\n").encode())
    say(json_text(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
