"""The verbs `generate` and `serve`: a model of --load answers prompts, or HTTP requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_retro.artifacts.files import make_folder, write_file
from megatron_retro.config.inference import (
    ChatConfig,
    GenerateConfig,
    LiveRetrievalConfig,
    SamplingConfig,
    ServeConfig,
)
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings
from megatron_retro.data.instructions.conversations import Turn
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.inference.chat_format import ChatFormat, load_chat_format
from megatron_retro.inference.generation import Generation
from megatron_retro.inference.replicas import Replica, ask_model
from megatron_retro.inference.sampling import Sampling
from megatron_retro.inference.text_generator import TextGenerator
from megatron_retro.runtime.console import shown
from megatron_retro.runtime.environment import require
from megatron_retro.runtime.strict_json import json_text

_SHOWN_CHARACTERS = 200
_PROMPTS = '{"prompt": TEXT} or {"question": TEXT}'


def serve(settings: Settings) -> None:
    """Answer HTTP requests until a signal comes."""
    require("fastapi", "serving")
    from megatron_retro.inference.serving.server import serve_generator

    def answer(replica: Replica) -> None:
        serve_generator(replica.generator, replica.path, settings[ServeConfig], settings[ChatConfig])

    ask_model(settings, answer, live=settings[LiveRetrievalConfig])


def generate(settings: Settings) -> None:
    """Generate a text for each prompt; print the texts, and write them with their neighbours to --output."""
    prompts, output = _prompts(settings[GenerateConfig]), settings[GenerateConfig].output
    if output is not None:
        make_folder(Path(output).parent)  # before the work, which a path that cannot be written would lose
        if Path(output).is_dir():
            raise ConfigError(f"--output {output} is a folder", expected="a file to write")

    def answer(replica: Replica) -> None:
        generator = replica.generator
        generations = _generate(generator, prompts, settings, _chat_format(replica.path, settings))
        if output is not None:
            _write(Path(output), prompts, generations, generator)

    ask_model(settings, answer, live=settings[LiveRetrievalConfig])


def _prompts(config: GenerateConfig) -> list[str]:
    if config.prompt is not None and config.prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file exclude each other", fix="give one of them")
    if config.prompt is not None:
        return list(config.prompt)
    if config.prompt_file is None:
        raise ConfigError("there is no prompt", fix='give --prompt "TEXT" or --prompt-file FILE')
    path = Path(config.prompt_file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}", got=error) from None
    if path.suffix != ".jsonl":
        return [text]
    try:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        prompts = [record["question"] if "question" in record else record["prompt"] for record in records]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no JSON lines file of prompts", got=error, expected=_PROMPTS) from None
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        got = next((repr(prompt) for prompt in prompts if not isinstance(prompt, str)), "no line")
        raise DataError(f"{path} is no JSON lines file of prompts", got=got, expected=_PROMPTS)
    return prompts


def _chat_format(checkpoint: Path, settings: Settings) -> ChatFormat | None:
    """The chat format that prompts are written in; None without --chat."""
    chat = settings[GenerateConfig].chat
    return load_chat_format(checkpoint, settings[ChatConfig].chat_template) if chat else None


def _written(
    prompts: Sequence[str], passages: Sequence[str], chat_format: ChatFormat | None
) -> tuple[list[str], Sequence[str]]:
    """The prompts in the chat format, and the passages that the encoder reads."""
    if chat_format is None:
        return list(prompts), passages
    written = [chat_format.write([Turn("user", prompt)], passages) for prompt in prompts]
    return [text for text, _ in written], written[0][1] if written else ()


def _generate(
    generator: TextGenerator, asked: Sequence[str], settings: Settings, chat_format: ChatFormat | None
) -> list[Generation]:
    sampling, config = settings[SamplingConfig], settings[GenerateConfig]
    prompts, passages = _written(asked, config.passages or (), chat_format)
    streamed = config.stream and len(prompts) == 1
    mode = config.retrieval
    if (
        mode == "live"
        and settings[LiveRetrievalConfig].retro_index is None
        and settings.origin("retrieval") == DEFAULT_ORIGIN
    ):
        mode = "none"
    source = generator.source(mode, passages)
    if source is None and config.retrieval_step is not None:
        raise ConfigError(
            "--retrieval-step is given and nothing is retrieved", fix="give --retro-index DIR, or leave the step out"
        )
    stops = [*(sampling.stop or ()), *(chat_format.stops if chat_format is not None else ())]
    generations = generator.generate(
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        sampling=Sampling.from_config(sampling),
        stop_strings=stops,
        sources=[source] * len(prompts),
        retrieval_step=config.retrieval_step,
        listener=_StreamPrinter(prompts[0]) if streamed else None,
    )
    for prompt, generation in zip(prompts, generations, strict=True):
        print() if streamed else print(_for_terminal(f"{prompt}{generation.text}"))
        if config.show_neighbors:
            print(_for_terminal(_explained(generator, generation)))
    return generations


class _StreamPrinter:
    """Prints new text as it comes; the prompt is printed before the first, so not for a refused request."""

    def __init__(self, prompt: str) -> None:
        self._before = prompt

    def __call__(self, text: str) -> None:
        sys.stdout.write(_for_terminal(self._before + text))
        sys.stdout.flush()
        self._before = ""


def _for_terminal(text: str) -> str:
    """A file or a pipe gets the text as it is."""
    return shown(text) if sys.stdout.isatty() else text


def _explained(generator: TextGenerator, generation: Generation) -> str:
    """A description of the neighbours of each chunk."""
    lines = [f"--- {len(generation.new_tokens)} tokens, ended by {generation.finish_reason}"]
    for chunk in generator.report(generation):
        lines.append(f"chunk of tokens {chunk.query_start} to {chunk.query_stop - 1}: {_short(chunk.query)}")
        for number, neighbor in enumerate(chunk.neighbors, 1):
            distance = "" if neighbor.distance is None else f", distance {neighbor.distance:.4g}"
            lines.append(f"  neighbour {number}: {'given' if neighbor.id < 0 else f'chunk {neighbor.id}'}{distance}")
            lines.append(f"    {_short(neighbor.text)}")
    return "\n".join(lines)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 3] + "..."


def _write(path: Path, prompts: Sequence[str], generations: Sequence[Generation], generator: TextGenerator) -> None:
    records = [
        {
            "prompt": prompt,
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            "chunks": [asdict(chunk) for chunk in generator.report(generation)],
        }
        for prompt, generation in zip(prompts, generations, strict=True)
    ]
    write_file(path, "".join(json_text(record, ensure_ascii=False) + "\n" for record in records))
