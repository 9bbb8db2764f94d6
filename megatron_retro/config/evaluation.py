"""What is measured, planned and shown: evaluation sets, perplexity, studies, reports, the cost of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

PERPLEXITY = "perplexity"
QUESTION_SETS = (
    *("nq", "triviaqa", "webquestions", "squad1", "squad2", "newsqa", "quoref", "drop", "narrativeqa"),
    *("qasper", "quality", "doc2dial", "boolq", "qmsum", "govreport", "summscreen"),
)
CONTEXTS = ("given", "bm25", "dense", "none")
SPLITS = ("train", "valid", "test")
STUDY_VERBS = ("pretrain", "retrofit", "finetune", PERPLEXITY)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation sets and protocol"""

    eval_data: tuple[str, ...] | None = option(
        None, "files of the sets, as TASK=FILE (or FILE for one task)", ours=True
    )
    eval_output: str = option("evaluation", "directory of results, tables and predictions", ours=True)
    eval_limit: int | None = option(None, "questions per set; all when not set", minimum=1, ours=True)
    eval_contexts: str = option("given", "where contexts come from", choices=CONTEXTS, ours=True)
    eval_passages: str | None = option(
        None, "JSON lines of `title` and `text` to retrieve contexts from, for bm25 and dense", ours=True
    )
    eval_query_encoder: str | None = option(None, "folder of the question encoder (DPR, Dragon), for dense", ours=True)
    eval_passage_encoder: str | None = option(None, "folder of the passage encoder, for dense", ours=True)
    eval_num_contexts: int = option(5, "contexts in the prompt", minimum=0, ours=True)
    eval_encoder_contexts: int = option(
        2, "of these, contexts that the neighbour encoder reads too", minimum=0, ours=True
    )
    eval_encoder: bool = option(
        True, "read contexts through the neighbour encoder (off = the decoder alone)", ours=True
    )
    eval_max_new_tokens: int = option(256, "longest answer", minimum=1, ours=True)
    eval_batch_size: int = option(8, "questions answered together", minimum=1, ours=True)
    eval_first_answer: bool = option(False, "score against the first gold answer only", ours=True)
    eval_stemming: bool = option(True, "stem words in ROUGE", ours=True)


@dataclass(frozen=True)
class PerplexityConfig:
    """Perplexity: sliding windows, variants of neighbours, leakage curve"""

    perplexity_split: str = option("valid", "documents to measure on", choices=SPLITS, ours=True)
    perplexity_stride: int | None = option(
        None, "tokens that each window scores, a multiple of the chunk length; half the sequence when not set",
        minimum=1, ours=True,
    )  # fmt: skip
    perplexity_windows: int | None = option(
        None, "windows at most, evenly over the text; all when not set", minimum=1, ours=True
    )
    perplexity_batch_size: int = option(8, "windows of one forward", minimum=1, ours=True)
    leakage_neighbors: int = option(
        10, "nearest neighbours that the leakage curve compares each chunk with; 0 = no curve", minimum=0, ours=True
    )
    verbatim_tokens: int = option(
        1 << 31,
        "tokens of the database, evenly, in which held-out text is looked for word for word; 0 = not at all",
        minimum=0,
        ours=True,
    )


@dataclass(frozen=True)
class AblationConfig:
    """Ablation: a grid of runs, and their comparison"""

    study_output: str | None = option(None, "directory of the study: one directory per run, and the report", ours=True)
    study_title: str = option("Ablation", "heading of the report", ours=True)
    study_verb: str = option(
        "pretrain", "the verb of every run; perplexity = evaluate perplexity", choices=STUDY_VERBS, ours=True
    )
    study_grid: tuple[str, ...] = option(
        (), 'fields to vary, each as TOML: "retro_num_neighbors = [0, 2, 4]"; runs are the product', ours=True
    )
    study_cases: tuple[str, ...] = option(
        (),
        'named groups of fields: "frozen = {freeze_decoder = true}"; "size.small = {..}" on an axis "size"',
        ours=True,
    )
    study_launcher: tuple[str, ...] | None = option(
        None, "words before the verb, a launcher of many ranks say; this program when not set", ours=True
    )


@dataclass(frozen=True)
class ReportConfig:
    """One page about all runs that are named; the last one that reads neighbours is what it is about"""

    report_output: str | None = option(
        None, "write one page about all runs here, instead of a page into each of them", ours=True
    )
    report_retrieval: str | None = option(
        None, "its index (--retro-project-dir of build-retrieval): quality and neighbours", ours=True
    )
    report_attention: bool = option(
        False, "read the neighbours shown with each run's model: what it attends to, what each is worth", ours=True
    )
    report_texts: tuple[str, ...] | None = option(
        None, "its texts, as NAME=FILE: what `generate --output` wrote, with and without retrieval say", ours=True
    )
    report_answers: tuple[str, ...] | None = option(
        None, "answers to the same questions, as NAME=FILE: before and after tuning say", ours=True
    )
    report_questions: str | None = option(None, "those questions with their gold answers (JSON lines)", ours=True)
    report_stages: str | None = option(None, "JSON lines of `stage` and `seconds`", ours=True)


@dataclass(frozen=True)
class PlanningConfig:
    """Planning: cluster, prices, corpus"""

    plan_for: str = option("pretrain", "the verb that would run", ours=True)
    plan_model: str | None = option(None, "a Hugging Face folder whose shape the plan takes", ours=True)
    plan_hardware: str = option("H100", "accelerator, a row of the hardware table", ours=True)
    plan_hardware_table: str | None = option(None, "a hardware table of your own (TOML)", ours=True)
    plan_nodes: int = option(1, "nodes of the cluster", minimum=1, ours=True)
    plan_gpus_per_node: int = option(8, "accelerators of a node", minimum=1, ours=True)
    plan_memory_margin: float = option(
        0.08, "share of the memory left to the allocator, the driver and NCCL", minimum=0.0, maximum=0.9, ours=True
    )
    plan_price_per_gpu_hour: float | None = option(None, "price of a GPU hour", minimum=0.0, ours=True)
    plan_price_per_cpu_hour: float | None = option(None, "price of a CPU core hour", minimum=0.0, ours=True)
    plan_corpus_tokens: int | None = option(
        None, "tokens of the training corpus; the token files' when they are there", minimum=1, ours=True
    )
    plan_database_tokens: int | None = option(
        None, "tokens of the retrieval database; the corpus's when not set", minimum=1, ours=True
    )
    plan_document_tokens: int = option(800, "tokens of a document, on average", minimum=1, ours=True)
    plan_data_workers: int = option(1, "workers that share the data and index work", minimum=1, ours=True)
    plan_shards: bool = option(True, "build every distinct shard on the meta device", ours=True)
    suggest: bool = option(False, "search layouts for this cluster and list the best five", ours=True)
    plan_json: str | None = option(None, "also write the plan's numbers to this file", ours=True)

    def world_size(self) -> int:
        """Accelerators of the cluster."""
        return self.plan_nodes * self.plan_gpus_per_node
