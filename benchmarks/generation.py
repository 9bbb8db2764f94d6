"""Generation and serving: tokens per second against the bound of reading the weights and against peers, the price of
live retrieval, a crowd of clients.

One thread. A token's time is the difference between long and short answers, so prompts do not count. Before anything
is timed, the greedy answers of transformers and of ours must be the same tokens.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import peer_packages
import retro_pytorch_tokens

from megatron_retro.assembly.loading import load_model
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.inference import EngineConfig, LiveRetrievalConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.convert.hugging_face import export_hugging_face
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.inference.generation import GenerationRequest
from megatron_retro.inference.neighbor_sources import GivenPassages, NeighborSource
from megatron_retro.inference.text_generator import TextGenerator, build_text_generator
from megatron_retro.model.initialization import initial_value
from megatron_retro.runtime.console import say
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, interleave, median_ratio

SHORT, LONG = 4, 52
RETRO = RetroConfig(retro_add_retriever=True, retro_layers=(6,))


class EndlessBytes(ByteTokenizer):
    """Nothing ends a text early."""

    eod = -1


def shape(width: int, layers: int = 8) -> ModelConfig:
    """Llama's function, which transformers has too."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        vocab_size=ByteTokenizer.vocab_size,
        make_vocab_size_divisible_by=1,
        swiglu=True,
        normalization="RMSNorm",
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    )


def write_model(run: Path, model: ModelConfig, retro: RetroConfig) -> Path:
    """A checkpoint of first values."""
    shapes = parameter_shapes(model, retro)
    settings = Settings([model, retro, TokenizerConfig()])
    write_checkpoint(
        run, settings, shapes, lambda name: 2.0 * initial_value(name, shapes[name], model, retro, 1), inputs={}
    )
    return run


def open_generator(run: Path, index: Path | None = None) -> TextGenerator:
    """The generator that `generate` uses, without an end of texts."""
    loaded = load_model(run, device="cpu")
    live = LiveRetrievalConfig(retro_index=None if index is None else str(index))
    generator = build_text_generator(loaded, EngineConfig(max_batch_size=1), live)
    return TextGenerator(generator.forward, EndlessBytes(), generator.limits, generator.index)


def answer(generator: TextGenerator, length: int, source: NeighborSource | None = None, prompt: int = 64) -> list[int]:
    """New tokens after a prompt of so many bytes."""
    text = tuple((b"the quick brown fox jumps over the lazy dog and " * 20)[:prompt])
    request = GenerationRequest(text, length, source=source)
    return generator.engine.generate([request])[0].new_tokens


def per_token(times: dict[str, Any], name: str) -> list[float]:
    """Seconds of one token in each round."""
    pairs = zip(times[f"{name} long"].cpu, times[f"{name} short"].cpu, strict=True)
    return [(long - short) / (LONG - SHORT) for long, short in pairs]


def against_transformers(run: Path, width: int, rounds: int) -> list[Figure]:
    """The same decoder in transformers' `generate`, and the bound of reading every weight once."""
    from transformers import AutoModelForCausalLM

    model, plain = shape(width), RetroConfig()
    checkpoint = write_model(run / "gpt", model, plain)
    generator = open_generator(checkpoint)
    peer: Any = AutoModelForCausalLM.from_pretrained(export_hugging_face(checkpoint, run / "hf"), local_files_only=True)
    prompt = torch.tensor([list((b"the quick brown fox jumps over the lazy dog and " * 20)[:64])])

    def theirs(length: int) -> list[int]:
        with torch.inference_mode():
            found = peer.generate(
                prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        return [int(token) for token in found[0, prompt.shape[1] :]]

    ours, expected = answer(generator, LONG), theirs(LONG)
    if ours != expected:
        raise SystemExit(f"the answers differ: {ours} against {expected}")
    matrices = [one for name, one in peer.named_parameters() if one.dim() == 2 and "embed_tokens" not in name]
    num_bytes = 4 * sum(one.numel() for one in matrices)
    block = torch.ones(num_bytes // 4)
    candidates: dict[str, Callable[[], object]] = {"read": block.sum}
    for length, word in ((SHORT, "short"), (LONG, "long")):
        candidates[f"ours {word}"] = lambda length=length: answer(generator, length)  # type: ignore[misc]
        candidates[f"theirs {word}"] = lambda length=length: theirs(length)  # type: ignore[misc]
    times = interleave(candidates, rounds, warm_up=1)
    mine, others = per_token(times, "ours"), per_token(times, "theirs")
    say(f"{num_bytes / 1e6:.0f} MB of weights, read at {num_bytes / times['read'].median_cpu / 1e9:.1f} GB/s")
    return [
        Figure("cached generation", 1 / statistics.median(mine), "tokens/CPU-s"),
        Figure("share of the weight-bandwidth bound", median_ratio(times["read"].cpu, mine), "", 0.6),
        Figure("speed over transformers' generate", median_ratio(others, mine), "x", 1.5),
    ]


def against_retro_pytorch(run: Path, width: int, rounds: int) -> list[Figure]:
    """The token after 512 others, neighbours read on both sides."""
    generator = open_generator(write_model(run / "retro", shape(width), RETRO))
    source = GivenPassages([list(b"a passage " * 20)] * 2, *generator.forward.neighbor_shape)
    reason = peer_packages.missing("retro-pytorch")
    candidates: dict[str, Callable[[], object]] = {
        "ours short": lambda: answer(generator, SHORT, source, 460),
        "ours long": lambda: answer(generator, LONG, source, 460),
    }
    if reason is None:
        candidates["peer"] = retro_pytorch_tokens.one_token(width, 8, width // 64, ByteTokenizer.vocab_size, 512)
    times = interleave(candidates, rounds, warm_up=1)
    mine = per_token(times, "ours")
    figures = [Figure("generation with neighbours at context 512", 1 / statistics.median(mine), "tokens/CPU-s")]
    if reason is not None:
        say(reason)
        return figures
    return [
        *figures,
        Figure("speed over retro-pytorch at context 512", median_ratio(times["peer"].cpu, mine), "x", 20.0),
    ]


def live_retrieval(run: Path, rounds: int) -> list[Figure]:
    """Answers with neighbours searched while generating, against the same with neighbours given.

    Each round asks for another text, so that no search is answered from memory.
    """
    index = build_index(run)
    generator = open_generator(run / "retro", index)
    given = GivenPassages([list(b"a passage " * 20)] * 2, *generator.forward.neighbor_shape)
    live = generator.source("live")
    extra: list[float] = []
    for number in range(rounds + 1):
        texts = tuple((f"round {number}: a function takes arguments and returns values " * 9).encode()[:256])
        seconds = {}
        for name, source in (("given", given), ("live", live)):
            began = time.process_time()
            generator.engine.generate([GenerationRequest(texts, 193, source=source)])
            seconds[name] = time.process_time() - began
        if number:
            extra.append(100 * (seconds["live"] / seconds["given"] - 1))
    return [Figure("live retrieval's price in an answer", statistics.median(extra), "%", 3.0, LOWER)]


def build_index(run: Path) -> Path:
    """A project over the standard library's sources."""
    lines = [f'{{"text": {json_text(path)}}}\n' for path in sorted(Path(subprocess.__file__).parent.glob("*.py"))[:150]]
    (run / "corpus.jsonl").write_text("".join(lines))
    for words in (
        ["preprocess", "--input", "corpus.jsonl", "--output-prefix", "corpus", "--append-eod", "--workers", "1"],
        ["build-retrieval", "--retro-project-dir", "retrieval", "--retro-database-corpus", "corpus_text_document"],
    ):
        program = [sys.executable, "-m", "megatron_retro.cli.main", *words]
        subprocess.run(program, cwd=run, check=True, capture_output=True)
    return run / "retrieval"


def json_text(path: Path) -> str:
    """A file's text as JSON."""
    import json

    return json.dumps(path.read_text(encoding="utf-8", errors="replace")[:40000])


def crowd(run: Path, seconds: float) -> list[Figure]:
    """32 clients that ask again at once, against the program that users start; a queue that holds them all.

    A client that is told to come back (429 or 503 with Retry-After) does so, as OpenAI's client does: being refused in
    time is what bounds the waiting. Anything else but an answer is a failure.
    """
    write_model(run / "small", shape(128, 6), RETRO)
    program = [sys.executable, "-m", "megatron_retro.cli.main", "serve", "--load", "small", "--port", "0"]
    limits = ["--max-batch-size", "16", "--queue-size", "64", "--queue-seconds", "30", "--retro-index", "retrieval"]
    with subprocess.Popen([*program, *limits], cwd=run, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(line for line in server.stderr if "http://" in line).split("at ")[1].split()[0].rstrip("/")
            return crowd_figures(url, server.pid, seconds)
        finally:
            server.terminate()


def crowd_figures(url: str, process: int, seconds: float) -> list[Figure]:
    """What the crowd saw."""
    faults: list[str] = []
    refusals: list[int] = []
    tokens: list[int] = []
    memory: list[int] = []
    stop = time.monotonic() + seconds

    def client(number: int) -> None:
        with httpx.Client(timeout=120) as session:
            turn = 0
            while time.monotonic() < stop:
                turn += 1
                body = {"prompt": f"client {number}, question {turn}: " + "x" * (number * 7 % 90), "max_tokens": 48}
                reply = session.post(f"{url}/v1/completions", json=body)
                if reply.status_code in (429, 503) and "retry-after" in reply.headers:
                    refusals.append(reply.status_code)
                    time.sleep(float(reply.headers["retry-after"]))
                elif reply.status_code != 200:
                    faults.append(f"{reply.status_code} {reply.text[:100]}")
                else:
                    tokens.append(reply.json()["usage"]["completion_tokens"])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    while time.monotonic() < stop:
        time.sleep(seconds / 12)
        memory.append(resident_kilobytes(process))
    for thread in threads:
        thread.join()
    if faults:
        say(f"faults: {faults[:3]}")
    waits = waiting_buckets(httpx.get(f"{url}/metrics").text)
    growth = 100 * (statistics.mean(memory[-3:]) / statistics.mean(memory[2:5]) - 1)
    return [
        Figure("32 clients: requests that failed", len(faults), "", 0.0, LOWER),
        Figure("32 clients: told to come back later", len(refusals), ""),
        Figure("32 clients: answers", len(tokens), ""),
        Figure("32 clients: tokens", sum(tokens) / seconds, "tokens/s"),
        Figure("32 clients: p99 of waiting is at most", waits, "s", 30.0, LOWER),
        Figure("32 clients: growth of memory", growth, "%", 5.0, LOWER),
    ]


def resident_kilobytes(process: int) -> int:
    """Memory of the server."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def waiting_buckets(text: str) -> float:
    """The upper end of the bucket that holds the 99th percentile."""
    pairs = [line.split() for line in text.splitlines() if line.startswith("megatron_retro_waiting_seconds_bucket")]
    counts = [(name.split('"')[1], int(value)) for name, value in pairs]
    total = counts[-1][1]
    return next(float(bound) for bound, count in counts if count >= 0.99 * total)


def run(quick: bool) -> list[Figure]:
    """All parts."""
    torch.set_num_threads(1)
    rounds = 1 if quick else 3
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        figures = against_transformers(room, 256 if quick else 1024, rounds)
        figures += against_retro_pytorch(room, 256 if quick else 512, rounds)
        figures += live_retrieval(room, rounds)
        return figures + crowd(room, 12.0 if quick else 120.0)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
