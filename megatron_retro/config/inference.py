"""How text is generated and served."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option
from megatron_retro.errors import ConfigError

RETRIEVAL_MODES = ("live", "none", "random")


@dataclass(frozen=True)
class SamplingConfig:
    """Choice of the next token"""

    max_new_tokens: int = option(128, "tokens to generate at most", minimum=1, ours=True)
    temperature: float = option(0.0, "sampling temperature; 0 = greedy", minimum=0.0)
    top_k: int = option(0, "sample among this many most likely tokens; 0 = all", minimum=0)
    top_p: float = option(1.0, "sample among the most likely tokens of this mass", minimum=0.0, maximum=1.0)
    repetition_penalty: float = option(1.0, "makes seen tokens less likely; 1 = off", minimum=0.01, ours=True)
    sampling_seed: int = option(0, "seed of the draws", minimum=0, ours=True)
    stop: tuple[str, ...] | None = option(None, "texts that end an answer", ours=True)


@dataclass(frozen=True)
class LiveRetrievalConfig:
    """Neighbours while text is generated"""

    retro_index: str | None = option(
        None,
        "directory of a built index (--retro-project-dir of build-retrieval) to search while generating",
        ours=True,
    )


@dataclass(frozen=True)
class ChatConfig:
    """Conversations"""

    chat_template: str | None = option(
        None,
        "instruct-retro, auto or the path of a Jinja template; the one that the model was tuned with when not set",
        ours=True,
    )


@dataclass(frozen=True)
class GenerateConfig:
    """Prompts"""

    prompt: tuple[str, ...] | None = option(None, "texts to go on from", ours=True)
    prompt_file: str | None = option(
        None, "JSON lines with `prompt` or `question`, or a text file of one prompt", ours=True
    )
    output: str | None = option(None, "write answers with neighbours as JSON lines here", ours=True)
    chat: bool = option(False, "write each prompt as the user's turn of a conversation", ours=True)
    retrieval: str = option("live", "where neighbours come from", choices=RETRIEVAL_MODES, ours=True)
    retrieval_step: int | None = option(
        None, "tokens between retrievals, from the prompt's end; else at each chunk's end", minimum=1, ours=True
    )
    passages: tuple[str, ...] | None = option(None, "texts to read as neighbours instead of searching", ours=True)
    show_neighbors: bool = option(True, "print the neighbours that each chunk read", ours=True)
    stream: bool = option(True, "print text while it comes (a single prompt)", ours=True)


@dataclass(frozen=True)
class EngineConfig:
    """Generation engine"""

    max_batch_size: int = option(8, "sequences generated together", minimum=1, ours=True)
    max_sequence_length: int = option(2048, "longest prompt and answer together", minimum=2, ours=True)
    prefill_tokens: int = option(
        512, "prompt tokens of one forward, so that others are not held up", minimum=1, ours=True
    )
    add_bos: bool = option(
        True, "begin a text with the token that the tokenizer's own rules put there, if any", ours=True
    )
    dtype: str = option("auto", "arithmetic of generation", choices=("auto", "fp32", "bf16"), ours=True)
    device: str = option("auto", "where to generate", choices=("auto", "cpu", "cuda"), ours=True)
    keep_encoded_mb: int | None = option(
        None,
        "memory for neighbours that are encoded once; 256 where the encoder does not read the chunk, else 0",
        minimum=0,
        ours=True,
    )

    def refuse_to_keep_encoded(self) -> None:
        """For a model that is cut: its ranks keep nothing that they encoded."""
        if self.keep_encoded_mb:
            raise ConfigError(
                "encoded neighbours are kept by whole models only",
                got=f"--keep-encoded-mb {self.keep_encoded_mb} with a model that is cut",
                fix="leave it out, or the parallel sizes",
            )


@dataclass(frozen=True)
class ServeConfig:
    """HTTP service"""

    host: str = option("127.0.0.1", "address to listen on", ours=True)
    port: int = option(8000, "port to listen on; 0 = any free one", minimum=0, maximum=65535, ours=True)
    allowed_hosts: tuple[str, ...] | None = option(
        None,
        "names of this service, beside localhost, this machine's name, --host and addresses; * = any",
        ours=True,
    )
    api_key_file: str | None = option(
        None, "file with the keys that clients may send, one on each line; none = no key", ours=True
    )
    requests_per_key: int | None = option(
        None, "requests that one key may have open; more are refused with 429", minimum=1, ours=True
    )
    max_connections: int = option(
        256, "clients at a time; a new one takes the place of the one that is slowest to send", minimum=2, ours=True
    )
    receive_seconds: float = option(
        20.0, "a client whose request is not here in whole after this long is dropped", minimum=0.1, ours=True
    )
    queue_size: int = option(64, "requests that may wait; more are refused with 429", minimum=1, ours=True)
    queue_seconds: float = option(60.0, "longest wait for a place; then 503", minimum=0.0, ours=True)
    max_body_bytes: int = option(1 << 20, "largest request", minimum=1024, ours=True)
    send_seconds: float = option(30.0, "a client that takes nothing for this long is dropped", minimum=0.1, ours=True)
    served_model_name: str | None = option(None, "name in /v1/models; the checkpoint's folder when not set", ours=True)
