"""The question and summary sets of `evaluate`: where a generator meets the suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import write_file
from megatron_retro.artifacts.manifest import file_record
from megatron_retro.config.data import WorkersConfig
from megatron_retro.config.evaluation import EvaluationConfig
from megatron_retro.config.inference import EngineConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.evaluation.contexts import (
    BM25,
    CollectionContexts,
    DenseRanker,
    GivenContexts,
    OwnTextContexts,
    PassageRanker,
    bert_embedder,
    read_passages,
    searchable,
)
from megatron_retro.evaluation.examples import Example
from megatron_retro.evaluation.prompts import STOP_STRINGS, Prompt, build_prompt
from megatron_retro.evaluation.suite import ContextSource, Evaluation, results_table
from megatron_retro.evaluation.tasks import Scoring, Task, find_task
from megatron_retro.inference.replicas import Replica, ask_model
from megatron_retro.inference.sampling import Sampling
from megatron_retro.inference.text_generator import TextGenerator
from megatron_retro.runtime.console import say
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.runtime.strict_json import json_text


def run_sets(settings: Settings, names: Sequence[str]) -> None:
    """Answer and score each set; the table is written by the worker that finds all of them complete."""
    config = settings[EvaluationConfig]
    tasks = [find_task(name) for name in names]
    _check_passages(config)
    paths = data_paths(config, tasks)
    sets = {task.name: _examples(task, paths[task.name], config) for task in tasks}  # bad files fail before the model

    def answer(replica: Replica) -> None:
        contexts = context_source(config)
        evaluations = [
            _evaluation(task, sets[task.name], contexts, replica, settings, paths[task.name]) for task in tasks
        ]
        with StopRequests().listening() as requests:
            for evaluation in evaluations:
                evaluation.run(replica.worker, requests.reason)
        _report([evaluation.results() for evaluation in evaluations], Path(config.eval_output))

    ask_model(settings, answer, shard=settings[WorkersConfig].shard, replicas=True)


def _evaluation(
    task: Task, examples: Sequence[Example], contexts: ContextSource, replica: Replica, settings: Settings, path: Path
) -> Evaluation:
    config = settings[EvaluationConfig]
    return Evaluation(
        task=task,
        examples=examples,
        contexts=contexts,
        build_prompt=_prompt_builder(replica.generator, task, config),
        answer=_Answers(replica.generator, config),
        scoring=Scoring(config.eval_first_answer, config.eval_stemming),
        identity=_identity(config, settings[EngineConfig], replica.fingerprint, path),
        directory=Path(config.eval_output),
        batch_size=config.eval_batch_size,
    )


def _report(found: Sequence[dict[str, Any] | None], directory: Path) -> None:
    results = [one for one in found if one is not None]
    if len(results) < len(found):
        say("this worker's share is done; the results come with the last worker")
        return
    write_file(directory / "results.json", json_text(results, indent=1, default=str) + "\n")
    write_file(directory / "results.txt", results_table(results) + "\n")
    print(results_table(results))


def data_paths(config: EvaluationConfig, tasks: Sequence[Task]) -> dict[str, Path]:
    """The file of each task."""
    given: dict[str, Path] = {}
    for word in config.eval_data or ():
        name, separator, path = word.partition("=")
        if not separator and len(tasks) != 1:
            raise ConfigError(f"--eval-data {word}: which task's?", expected="TASK=FILE for each of several tasks")
        given[name if separator else tasks[0].name] = Path(path if separator else name)
    missing = [task.name for task in tasks if task.name not in given]
    if missing:
        wanted = " ".join(f"{name}=FILE" for name in missing)
        raise ConfigError(f"no data for {', '.join(missing)}", fix=f"give --eval-data {wanted}")
    return given


def _examples(task: Task, path: Path, config: EvaluationConfig) -> list[Example]:
    return list(task.load(path))[: config.eval_limit]


def _check_passages(config: EvaluationConfig) -> None:
    """A collection must be there, and be read."""
    if config.eval_passages is None:
        return
    if config.eval_contexts in ("given", "none"):
        raise ConfigError(
            f"--eval-contexts {config.eval_contexts} reads no --eval-passages",
            fix="give --eval-contexts bm25 or dense, or leave the passages out",
        )
    if not Path(config.eval_passages).is_file():
        raise DataError(f"there is no file {config.eval_passages}", fix="check --eval-passages")


def context_source(config: EvaluationConfig) -> ContextSource:
    """Where contexts come from, as the settings say."""
    count = max(config.eval_num_contexts, config.eval_encoder_contexts)
    if config.eval_contexts == "given":
        return GivenContexts()
    if config.eval_contexts == "none":
        return OwnTextContexts(BM25, 0)
    if config.eval_passages is None:
        return OwnTextContexts(lambda texts: _ranker(texts, config), count)
    passages = read_passages(Path(config.eval_passages))
    return CollectionContexts(passages, _ranker([searchable(passage) for passage in passages], config), count)


def _ranker(texts: Sequence[str], config: EvaluationConfig) -> PassageRanker:
    if config.eval_contexts == "bm25":
        return BM25(texts)
    if config.eval_query_encoder is None:
        raise ConfigError("--eval-contexts dense needs an encoder", fix="give --eval-query-encoder FOLDER")
    questions = bert_embedder(Path(config.eval_query_encoder))
    passages = bert_embedder(Path(config.eval_passage_encoder)) if config.eval_passage_encoder else questions
    return DenseRanker(texts, passages, questions)


class _PromptOfTask:
    """Writes a task's prompts for one model's sequence length and tokenizer."""

    def __init__(self, generator: TextGenerator, task: Task, config: EvaluationConfig) -> None:
        self._generator, self._task, self._config = generator, task, config

    def __call__(self, example: Example, contexts: Sequence[Passage]) -> Prompt:
        """The prompt, cut to what the answer leaves."""
        tokenizer, config = self._generator.tokenizer, self._config
        return build_prompt(
            example,
            self._task.form,
            contexts,
            num_contexts=config.eval_num_contexts,
            encoder_contexts=config.eval_encoder_contexts if config.eval_encoder else 0,
            budget=self._generator.limits.max_sequence_length - config.eval_max_new_tokens,
            encode=tokenizer.encode,
            decode=tokenizer.decode,
        )


def _prompt_builder(generator: TextGenerator, task: Task, config: EvaluationConfig) -> _PromptOfTask:
    room = generator.limits.max_sequence_length - config.eval_max_new_tokens
    if room < generator.forward.chunk_length:
        raise ConfigError(
            "answers leave no room for prompts",
            got=f"--eval-max-new-tokens {config.eval_max_new_tokens} of {generator.limits.max_sequence_length}",
            fix="raise --max-sequence-length, or ask for shorter answers",
        )
    return _PromptOfTask(generator, task, config)


class _Answers:
    """Greedy answers; with passages, the grid of chunks is moved so that the prompt ends a chunk (RETRO++)."""

    def __init__(self, generator: TextGenerator, config: EvaluationConfig) -> None:
        self._generator, self._config = generator, config

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        generator = self._generator
        reads = generator.forward.reads_neighbors
        generations = generator.generate(
            [prompt.text for prompt in prompts],
            max_new_tokens=self._config.eval_max_new_tokens,
            sampling=Sampling(),
            stop_strings=STOP_STRINGS,
            sources=[generator.source("none", prompt.passages) if reads else None for prompt in prompts],
            retrieval_step=generator.forward.chunk_length,
        )
        return [generation.text for generation in generations]


def _identity(config: EvaluationConfig, engine: EngineConfig, model: str, data: Path) -> dict[str, Any]:
    """All that predictions depend on; scoring may change without asking again."""
    elsewhere = ("eval_data", "eval_output", "eval_batch_size", "eval_limit", "eval_first_answer", "eval_stemming")
    protocol = {name: value for name, value in vars(config).items() if name not in elsewhere}
    if config.eval_passages is not None:
        protocol["eval_passages"] = file_record(Path(config.eval_passages)).sha256
    return {
        "model": model,
        "data": file_record(data).sha256,
        "max_sequence_length": engine.max_sequence_length,
        "dtype": engine.dtype,
        "add_bos": engine.add_bos,
        **protocol,
    }
