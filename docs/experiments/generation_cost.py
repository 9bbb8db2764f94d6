"""CPU-seconds of reading a text with one passage and of each token written behind it: decoder, Retro, prompt.

    python docs/experiments/generation_cost.py DECODER RETRO --text PREFIX --database DB --neighbors TABLE --json OUT

Medians over windows of held-out text, measured in turn in one process of one thread. A passage is read anew, or was
kept from another text that read it.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import megatron_retro
from megatron_retro.api import Model
from megatron_retro.artifacts.files import write_file
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.token_file import TokenFile
from megatron_retro.runtime.console import say
from megatron_retro.runtime.strict_json import json_text

CHUNK, READ, WRITTEN = 64, 320, 64
KEPT_MB = 256


def seconds(model: Model, prompt: str, passages: list[str], *, kept: bool = False) -> tuple[float, float]:
    """CPU-seconds until the first token is there, and of each after it."""
    times = []
    for count in (1, 1 + WRITTEN):
        model.module.keep_encodings(KEPT_MB)
        if kept:
            model.generate(prompt, max_new_tokens=1, passages=passages)
        began = time.process_time()
        answer = model.generate(prompt, max_new_tokens=count, passages=passages)
        times.append((time.process_time() - began, len(answer.tokens)))
    (first, one), (whole, all_written) = times
    return first, (whole - first) / (all_written - one)


def main() -> int:
    """Measure in turn, write medians and their ratios to the decoder alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoder")
    parser.add_argument("retro")
    for name in ("text", "database", "neighbors", "json"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--windows", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    decoder, retro = (
        megatron_retro.load(path, device="cpu", dtype="fp32") for path in (arguments.decoder, arguments.retro)
    )
    file, database = TokenFile(arguments.text), ChunkDatabase.open(arguments.database)
    table = NeighborTable.open(arguments.neighbors)
    samples: dict[str, list[tuple[float, float]]] = {}
    for start in np.linspace(0, file.num_tokens // CHUNK - READ // CHUNK - 1, arguments.windows).astype(int).tolist():
        last = start + READ // CHUNK - 1
        tokens, mask = database.gather(table.rows(last, last + 1)[:, :1], 3 * CHUNK)
        text = decoder.tokenizer.decode(file.tokens(start * CHUNK, (last + 1) * CHUNK).tolist())
        passage = decoder.tokenizer.decode(tokens[0, 0][mask[0, 0]].tolist())
        ways = {
            "decoder": partial(seconds, decoder, text, []),
            "retro": partial(seconds, retro, text, [passage]),
            "retro, kept": partial(seconds, retro, text, [passage], kept=True),
            "prompt": partial(seconds, decoder, passage + text, []),
        }
        for name, measure in ways.items():
            samples.setdefault(name, []).append(measure())
            say(f"{name}: {samples[name][-1][0]:.2f} s to read, {samples[name][-1][1]:.3f} s a token")
    base = np.array(samples["decoder"])
    result = {
        name: {
            "read": float(np.median(values, 0)[0]),
            "token": float(np.median(values, 0)[1]),
            "read, ratio": float(np.median(np.array(values)[:, 0] / base[:, 0])),
            "token, ratio": float(np.median(np.array(values)[:, 1] / base[:, 1])),
        }
        for name, values in samples.items()
    }
    facts = {"read": READ, "written": WRITTEN, "windows": arguments.windows, "cpu seconds": result}
    write_file(Path(arguments.json), (json_text(facts, indent=1) + "\n").encode())
    say(json_text(facts, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
