"""How chunks become vectors, vectors an index, and the index neighbour tables."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

EMBEDDERS = ("hashed", "static", "minilm", "huggingface")
POOLINGS = ("auto", "mean", "cls")
PRECISIONS = ("auto", "fp32", "bf16")
STAGES = ("plan", "train", "encode", "merge", "query", "verify")
QUERY_METHODS = ("auto", "lists", "queries")
FAISS_DEVICES = ("auto", "cpu", "gpu")
RERANKS = ("none", "overlap", "bm25")
CANDIDATES = ("index", "bm25")
DUPLICATES = ("held-out", "within", "all")


@dataclass(frozen=True)
class EmbedderConfig:
    """What turns a chunk into a vector"""

    retro_embedder: str = option(
        "hashed",
        "hashed n-grams (no weights), a folder of static embeddings, the embed extra's MiniLM, an encoder's folder",
        choices=EMBEDDERS,
    )
    retro_embedder_path: str | None = option(None, "folder of static embeddings or of a BERT-family encoder", ours=True)
    retro_embedder_pooling: str = option("auto", "vector of a text; auto = what the folder says", choices=POOLINGS)
    retro_embedder_precision: str = option("auto", "arithmetic of the encoder", choices=PRECISIONS, ours=True)
    retro_embedder_dimension: int = option(
        256, "width of hashed vectors, a multiple of 64; distill-embedder: of static ones", minimum=64, ours=True
    )
    retro_bert_batch_size: int = option(128, "texts of one forward", minimum=1)
    retro_bert_max_chunk_length: int = option(256, "longest text, in the embedder's tokens", minimum=8)


@dataclass(frozen=True)
class RetrievalConfig:
    """Retrieval: database, index, queries, quality"""

    retro_project_dir: str = option("retro", "directory of the database, the index, the neighbour tables and reports")
    retro_tasks: tuple[str, ...] | None = option(None, "stages to run; all of them when not set", choices=STAGES)
    retro_database_corpus: tuple[str, ...] | None = option(None, "token file prefixes of the database", ours=True)
    retro_database_documents: tuple[str, ...] | None = option(
        None, "documents FIRST:LAST of each of them, to leave out a validation split", ours=True
    )
    retro_database_eod: bool = option(True, "documents end with an end-of-document id, which no chunk has", ours=True)
    retro_drop_duplicates: str | None = option(
        None,
        "leave documents out of the database that find-duplicates found: near held-out ones, near earlier ones, or all",
        choices=DUPLICATES,
        ours=True,
    )
    retro_passage_vectors: tuple[str, ...] | None = option(
        None,
        ".npy files of a published datastore: one vector for each document of the database's token files, in order, "
        "made by the embedder; they are taken for the chunks, which are not embedded",
        ours=True,
    )
    retro_query_corpus: tuple[str, ...] | None = option(
        None,
        "token file prefixes to find neighbours for, as PREFIX or NAME=PREFIX; the database's when not set",
        ours=True,
    )
    retro_query_rows: tuple[str, ...] | None = option(
        None, "row ranges to query, FIRST:LAST of each corpus or NAME=FIRST:LAST; all when not set", ours=True
    )
    retro_block_size: int = option(100_000, "chunks of one block of work", minimum=1)
    retro_memory_gb: float = option(4.0, "memory that one worker may use", minimum=0.1, ours=True)
    retro_index_str: str = option("auto", "faiss index factory string, or auto")
    retro_index_ntrain: int | None = option(None, "chunks that train the index", minimum=1)
    retro_index_train_load_fraction: float = option(1.0, "share of that sample to use", minimum=0.0, maximum=1.0)
    retro_index_add_load_fraction: float = option(1.0, "share of the blocks to add", minimum=0.0, maximum=1.0)
    retro_keep_embeddings: bool = option(False, "keep the database's vectors in half precision", ours=True)
    retro_query_ef_search: int | None = option(None, "efSearch of the list finder; chosen when not set", minimum=1)
    retro_query_nprobe: int | None = option(None, "inverted lists to search; chosen when not set", minimum=1)
    retro_query_num_neighbors_query: int = option(200, "candidates of one query", minimum=1)
    retro_query_num_neighbors_save: int = option(20, "neighbours kept of them", minimum=1)
    retro_faiss_device: str = option(
        "auto",
        "where faiss trains and searches; auto = GPUs where it has any and they cost less",
        choices=FAISS_DEVICES,
        ours=True,
    )
    retro_query_method: str = option("auto", "search list by list, or query by query", choices=QUERY_METHODS, ours=True)
    retro_candidates: str = option(
        "index", "what finds neighbours: the index, or BM25 over all chunks", choices=CANDIDATES, ours=True
    )
    retro_refine: bool = option(
        False, "order candidates by their vectors, kept or embedded again, instead of their codes", ours=True
    )
    retro_rerank: str = option("none", "order candidates by shared tokens", choices=RERANKS, ours=True)
    retro_drop_overlap: float | None = option(
        None,
        "drop neighbours that share a run of this part of a chunk with the query's successor",
        minimum=0.0,
        maximum=1.0,
        ours=True,
    )
    retro_task_validate: float = option(0.0, "share of finished blocks to compute again", minimum=0.0, maximum=1.0)
    retro_verify_queries: int = option(1000, "queries compared with exact search", minimum=1, ours=True)
    retro_verify_rows: int = option(1_000_000, "rows audited for leaks", minimum=1, ours=True)
    retro_verify_embedders: tuple[str, ...] | None = option(
        None, "embedders to compare in the quality report", choices=EMBEDDERS, ours=True
    )
    retro_recall_floor: float | None = option(
        None, "fail (exit 3) below this recall@2", minimum=0.0, maximum=1.0, ours=True
    )


@dataclass(frozen=True)
class InspectorConfig:
    """A page of query chunks and their neighbours"""

    inspect_output: str | None = option(
        None, "the page to write; PROJECT/report/neighbors-NAME.html when not set", ours=True
    )
    inspect_rows: int = option(200, "query chunks to show, evenly spread", minimum=1, ours=True)
    inspect_neighbors: int = option(5, "neighbours of each", minimum=1, ours=True)
    inspect_model: str | None = option(
        None, "a run: show what it attends to in each neighbour, and what each is worth to it", ours=True
    )
    inspect_run: int = option(4, "shared runs of this many tokens are marked", minimum=1, ours=True)


@dataclass(frozen=True)
class DuplicatesConfig:
    """Documents of the database that come back"""

    duplicates_held_out: tuple[str, ...] | None = option(
        None, "token file prefixes of evaluation sets that the database should not hold", ours=True
    )
    duplicates_held_out_documents: tuple[str, ...] | None = option(
        None, "documents FIRST:LAST of each of them", ours=True
    )
    duplicates_jaccard: float = option(
        0.8,
        "documents that share this part of all their n-grams are near duplicates",
        minimum=0.1,
        maximum=1.0,
        ours=True,
    )
    duplicates_ngram: int = option(5, "tokens of an n-gram", minimum=1, ours=True)
    duplicates_block_size: int = option(50_000, "documents of one block of work", minimum=1, ours=True)
    duplicates_shown: int = option(200, "pairs on the page", minimum=0, ours=True)
