"""What is evaluated, on which data, under which protocol."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

CONTEXTS = ("given", "bm25", "dense", "none")


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
