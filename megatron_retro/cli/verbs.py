"""The verbs, one row each: what a verb is called, what it reads, and the function that does it.

A row imports nothing heavy, so that --help answers at once; the function is found by its name when the verb runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_retro.config.command_line import Positional, Reads
from megatron_retro.config.conversion import ConvertConfig, PushConfig
from megatron_retro.config.data import (
    CollectConfig,
    ContextsConfig,
    InputConfig,
    ObjectStorageConfig,
    TokenizerConfig,
    TrainTokenizerConfig,
    WorkersConfig,
)
from megatron_retro.config.evaluation import PERPLEXITY, QUESTION_SETS, ReportConfig
from megatron_retro.config.inference import (
    ChatConfig,
    EngineConfig,
    GenerateConfig,
    LiveRetrievalConfig,
    SamplingConfig,
    ServeConfig,
)
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.retrieval import DuplicatesConfig, EmbedderConfig, InspectorConfig, RetrievalConfig
from megatron_retro.config.sections import (
    ALL_SECTIONS,
    EVALUATION_SECTIONS,
    FINETUNING_SECTIONS,
    INDEX_SECTIONS,
    PREPROCESSING_SECTIONS,
    STUDY_SECTIONS,
    TRAINING_SECTIONS,
)
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, ObservabilityConfig


@dataclass(frozen=True)
class Verb:
    """A verb.

    `program` is `module:function` below `megatron_retro`. It is called with the settings, if the verb has sections,
    and with the words that stand without a flag, if the verb takes any; it may return an exit code.
    """

    name: str
    summary: str
    sections: tuple[type, ...]
    program: str
    description: str
    positional: Positional | None = None
    reads: Reads = field(default_factory=dict)

    def run(self, settings: Settings, words: Sequence[str]) -> int:
        """Do it; returns the exit code."""
        module, function = self.program.split(":")
        program = getattr(importlib.import_module(f"megatron_retro.{module}"), function)
        given = ([settings] if self.sections else []) + ([words] if self.positional else [])
        return int(program(*given) or 0)


# What a verb that only uses a model reads of the sections that training fills.
_OF_A_FINISHED_MODEL: Reads = {
    CheckpointConfig: ("load",),
    ParallelConfig: (
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "pipeline_layout"),
        "distributed_timeout_minutes",
    ),
}
# A verb that finds its tokenizer in an index asks only whether another one may do.
_OF_ANOTHERS_TOKENIZER: Reads = {TokenizerConfig: ("allow_tokenizer_mismatch",)}
_OF_A_DATABASE = ("retro_database_corpus", "retro_database_documents", "retro_database_eod", "retro_memory_gb")
VERBS: tuple[Verb, ...] = (
    Verb(
        "collect-text",
        "a corpus from the text that every machine has",
        (CollectConfig,),
        "data.standard_library:collect_text",
        """Write the sources and reference of Python's standard library as JSON lines, whole files held out.

train.jsonl and held_out.jsonl are text to pretrain on; train_questions.jsonl and held_out_questions.jsonl are questions
about the same files with answers and passages, made from their docstrings, to tune on.""",
    ),
    Verb(
        "preprocess",
        "text files -> token files (.bin/.idx), resumable, by any number of workers",
        PREPROCESSING_SECTIONS,
        "data.preprocessing.run:preprocess",
        "Tokenize text into Megatron's .bin/.idx files. Workers of one machine (--workers) and of many (--shard i/N, "
        "mpirun, --executor) share the work; the bytes are the same. The same command goes on after a kill.",
        reads={ObservabilityConfig: ("log_interval",)},
    ),
    Verb(
        "train-tokenizer",
        "a sentencepiece model from your own text",
        (InputConfig, TrainTokenizerConfig),
        "data.preprocessing.tokenizer_training:train_tokenizer",
        "Train a sentencepiece model (BPE or unigram) on a sample of the input, with byte fallback.",
    ),
    Verb(
        "build-retrieval",
        "database, index and neighbour tables, with a report on their quality",
        INDEX_SECTIONS,
        "retrieval.stages:build_retrieval",
        """From token files to neighbour tables, in six stages: plan, train, encode, merge, query, verify.

Every stage is cut into blocks that any number of workers share (start the same command many times, by hand, in a
SLURM array or under mpirun), and can be stopped and run again at any moment.""",
        reads={RetroConfig: ("retro_chunk_length", "retro_num_retrieved_chunks")},
    ),
    Verb(
        "find-duplicates",
        "documents of a database that come back, in it or in evaluation sets",
        (RetrievalConfig, DuplicatesConfig, ObjectStorageConfig, TokenizerConfig, WorkersConfig),
        "retrieval.duplicates:find_duplicates",
        """Name every document near an earlier one, or near one of --duplicates-held-out, before a database is made.

PROJECT/duplicates has a page to look at; build-retrieval --retro-drop-duplicates leaves these documents out.""",
        reads={RetrievalConfig: ("retro_project_dir", *_OF_A_DATABASE)},
    ),
    Verb(
        "distill-embedder",
        "static embeddings from a sentence encoder, for build-retrieval",
        (EmbedderConfig,),
        "retrieval.distillation:distill_embedder",
        """Distil the encoder of --retro-embedder (minilm, or huggingface with --retro-embedder-path) into FOLDER, once.

Each of its tokens becomes one vector. build-retrieval --retro-embedder static --retro-embedder-path FOLDER then embeds
thousands of chunks a second without a forward pass.""",
        Positional("paths", "*", "FOLDER"),
        {
            EmbedderConfig: (
                *("retro_embedder", "retro_embedder_path", "retro_embedder_pooling"),
                "retro_embedder_dimension",
            )
        },
    ),
    Verb(
        "inspect-neighbors",
        "a page of chunks, their neighbours and what they share",
        (RetrievalConfig, InspectorConfig, ObjectStorageConfig, TokenizerConfig),
        "inference.inspection:inspect_neighbors",
        """Write a page of query chunks with their neighbours, continuations, distances and documents.

Runs of tokens that a neighbour shares with the chunk or with what follows it are marked. With --inspect-model RUN it
shows what that model attends to while it predicts what follows, and what each neighbour takes off its loss.

The tables of the database's own corpora are found by themselves; name others as --retro-query-corpus NAME=PREFIX.""",
        reads={RetrievalConfig: ("retro_project_dir", "retro_query_corpus"), **_OF_ANOTHERS_TOKENIZER},
    ),
    Verb(
        "pretrain",
        "train a GPT or a Retro; the same command goes on where it stopped",
        TRAINING_SECTIONS,
        "training.program:pretrain",
        """Train a GPT, or with --retro-add-retriever a Retro, from token files (and neighbour tables).

The run lives in --save: checkpoints, events, report. The same command goes on where it stopped;
exit code 75 means: saved before the end, run me again.""",
    ),
    Verb(
        "retrieve-contexts",
        "passages of an index, written into conversations to train on",
        (ContextsConfig, LiveRetrievalConfig, ObjectStorageConfig, TokenizerConfig),
        "retrieval.conversation_contexts:retrieve_contexts",
        """Copy SOURCE, a file of conversations or questions (JSON lines), to TARGET with passages filled in.

They come from --retro-index, a project of build-retrieval: for each conversation the chunks nearest to what the user
said last. Train on TARGET with `finetune --context-place` prompt, encoder or split; the trainer does not search.""",
        Positional("paths", "*", "SOURCE TARGET"),
        _OF_ANOTHERS_TOKENIZER,
    ),
    Verb(
        "finetune",
        "train a finished model on conversations, whole or beside it",
        FINETUNING_SECTIONS,
        "training.program:finetune",
        """Train the model of --load on conversations: {"messages"}, {"prompt", "completion"} or
{"question", "answers", "contexts"}, one JSON object per line. Loss is on the last reply.

--retro-attention-gate 0 is InstructRetro's way (the encoder off). --peft-method trains LoRA, adapters,
P-tuning or (IA)3 beside the frozen model; the run's checkpoints then hold what was added, alone.""",
    ),
    Verb(
        "retrofit",
        "add a retriever to a pretrained GPT and train it",
        TRAINING_SECTIONS,
        "training.program:retrofit",
        """Take the decoder of a pretrained GPT (--load), add a fresh neighbour encoder and chunked
cross-attention, and train: everything, or with --freeze-decoder only what was added.

The decoder's shape and the tokenizer come from the checkpoint. The plan (parameter, source, trains?) is
printed first. The run lives in --save; the same command goes on where it stopped (exit code 75).""",
    ),
    Verb(
        "convert",
        "Hugging Face and Megatron-LM models in and out",
        (ConvertConfig, TokenizerConfig),
        "convert.conversion:convert",
        """Read SOURCE, write DESTINATION.

SOURCE is a Hugging Face folder (config.json with safetensors: Llama, Qwen 2 and 3, Mistral, SmolLM 3, Nemotron,
StableLM, GPT-2), a GPT or Retro of Megatron-LM (mp_rank_XX_YYY/model_optim_rng.pt, torch_dist), or a checkpoint of
ours. With --convert-to checkpoint (the default) DESTINATION becomes a run whose step 0 holds the weights: start from it
with `pretrain --load DESTINATION --finetune` or `retrofit --load DESTINATION`. With --convert-to huggingface it becomes
a folder that AutoModelForCausalLM loads. With --convert-to remote-code a whole Retro, encoder and all, becomes a folder
that it loads with trust_remote_code=True where megatron_retro is installed.
With --convert-to megatron-core it becomes a torch_dist checkpoint of Megatron-LM.

A run that tuned LoRA or (IA)3 beside a model becomes a whole model with --convert-merge, ours or Hugging Face's;
with --convert-to peft, what it tuned (P-tuning too) becomes a folder that PeftModel.from_pretrained loads over the
exported base. Such a folder comes in with --convert-base, the checkpoint that it belongs to. Tensors pass one by one;
no model is ever whole in memory.""",
        Positional("paths", "*", "SOURCE DESTINATION"),
        reads={TokenizerConfig: ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")},
    ),
    Verb(
        "push",
        "an exported folder to the Hugging Face hub, private unless told otherwise",
        (PushConfig,),
        "convert.push:push",
        """Upload FOLDER, as `convert --convert-to huggingface`, remote-code or peft made it, to the model NAME
(owner/model, or owner/model@branch) of the hub, model card and all. The model is made if it is not there, private
without --push-public. After a failure the same command goes on; what arrived is not sent again.

The token is that of `hf auth login` or HF_TOKEN; HF_ENDPOINT names another hub.""",
        Positional("paths", "*", "FOLDER NAME"),
    ),
    Verb(
        "convert-project",
        "what of a Retro project of Megatron core serves here, and the commands for the rest",
        (),
        "convert.retro_project:convert_project",
        """Look at OLD, the project directory of Megatron core's Retro preprocessing (config.json, data, db, index,
query), and say of each part whether it serves here, is not needed or is made again, with the commands that make it.
Token files are read as they are; chunks are compared with those that would be cut here. Nothing is written, neither
into OLD nor elsewhere. It needs h5py: pip install 'megatron-retro[projects]'.""",
        Positional("paths", "*", "OLD"),
    ),
    Verb(
        "generate",
        "text from a checkpoint, with the neighbours that each chunk read",
        (
            *(GenerateConfig, ChatConfig, SamplingConfig, LiveRetrievalConfig, ObjectStorageConfig),
            *(EngineConfig, CheckpointConfig, TokenizerConfig, ParallelConfig),
        ),
        "inference.program:generate",
        "Generate text from a checkpoint (--load), with live retrieval from an index (--retro-index).",
        reads=_OF_A_FINISHED_MODEL,
    ),
    Verb(
        "evaluate",
        "figures of a trained model: perplexity with intervals and leakage curve, task sets",
        EVALUATION_SECTIONS,
        "evaluation.program:evaluate",
        """Measure a trained model (--load).

perplexity: sliding windows over held-out text; bits per byte; real, no, random and shuffled neighbours with
paired intervals; the leakage curve. Data settings that are not given are those of the training run.

nq ... summscreen: question and summary sets from their published files (--eval-data TASK=FILE), asked and scored as
published; killed and started again, or shared by --shard i/N, they go on where they were.""",
        Positional("tasks", "+", "what to measure: " + ", ".join((PERPLEXITY, *QUESTION_SETS))),
        _OF_A_FINISHED_MODEL,
    ),
    Verb(
        "ablate",
        "a grid of runs over any settings, and what they say side by side",
        STUDY_SECTIONS,
        "ablation.program:run_study",
        """Run a study: a recipe whose [ablation] table says which fields vary, one run per combination.

Runs are those of pretrain, retrofit, finetune or evaluate perplexity, each in --study-output/cells/NAME and each a
process of its own. The same command goes on where it stopped; --shard i/N or a SLURM array shares the runs among
workers. The table and report.html are rewritten after each run; unfinished runs say so.""",
    ),
    Verb(
        "report",
        "one HTML page about a run: curves, retrieval health, neighbours, settings",
        (ReportConfig,),
        "inference.inspection:report",
        """Write report.html into each run's directory: curves, retrieval health, leakage, neighbours, settings.

With --report-output, one page about all runs named, for someone who has never seen them, and a line for each thing
that should be seen on it: what was measured, and whether it was seen.""",
        Positional("run", "+", "what --save named"),
    ),
    Verb(
        "serve",
        "OpenAI-compatible endpoint, and a page that shows what each chunk read",
        (
            *(ServeConfig, ChatConfig, EngineConfig, LiveRetrievalConfig, ObjectStorageConfig),
            *(CheckpointConfig, TokenizerConfig, ParallelConfig),
        ),
        "inference.program:serve",
        "Serve a checkpoint (--load): /v1/completions, /v1/chat/completions, metrics, and a page at /.",
        reads=_OF_A_FINISHED_MODEL,
    ),
    Verb(
        "inspect",
        "explain any file or directory of ours: what, made from what, intact or not",
        (),
        "data.inspection:inspect",
        "Explain files and directories of ours: what, made from what, by which settings, intact or where not.",
        Positional("paths", "+", "artifact, prefix of a token file, or a folder of artifacts"),
    ),
    Verb(
        "plan",
        "what a run costs before it starts: memory, time, balance, money, what is wrong with it",
        ALL_SECTIONS,
        "planning.plan_text:print_plan",
        "Size, time, price and faults of a recipe on a cluster (--plan-nodes, --plan-hardware), without starting it. "
        "Exit 2 if it cannot run as it stands. --suggest lists the best layouts.",
        Positional("words", "*", "words of the verb that would run; not read"),
    ),
    Verb(
        "reach",
        "whether the processes of this job reach each other",
        (),
        "runtime.reach:reach",
        "Every process of the job meets the others and adds one number (NCCL on GPUs, gloo on CPUs); exit 0 or 2.",
    ),
    Verb(
        "environment",
        "what this machine has: versions, devices, optional packages, kernels",
        (),
        "cli.environment:print_environment",
        "Versions, devices, optional packages, kernels and optimizers of this machine, with the reason for each "
        "absence.",
    ),
)
