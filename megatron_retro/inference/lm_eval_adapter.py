"""lm-eval on checkpoints of megatron_retro, with and without neighbours.

lm-eval finds models by a table of its own, so the program is started through this module, which adds one entry:

    python -m megatron_retro.inference.lm_eval_adapter --model megatron_retro \\
        --model_args load=RUN,retro_index=PROJECT,retrieval=live --tasks hellaswag

`model_args`: load (checkpoint or run), retro_index, retrieval (live, none, random), max_length, batch_size,
max_gen_toks, device, dtype, allow_tokenizer_mismatch, add_bos, tensor_model_parallel_size,
pipeline_model_parallel_size. Under a launcher (torchrun, srun, mpirun) replicas share the requests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_retro.config.inference import EngineConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.data.instructions.conversations import Turn
from megatron_retro.data.tokenizers import begin_tokens
from megatron_retro.errors import ConfigError
from megatron_retro.inference.chat_format import ChatFormat, load_chat_format
from megatron_retro.inference.lockstep import open_in_step
from megatron_retro.inference.sampling import Sampling
from megatron_retro.inference.scoring import rolling_windows, score_continuations
from megatron_retro.runtime.console import say
from megatron_retro.runtime.environment import require
from megatron_retro.runtime.launch import find_launch

require("lm_eval", "the lm-eval adapter")
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NAME = "megatron_retro"
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_SAMPLING_KEYS = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
# What transformers' generation takes and tasks write down although it changes nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "early_stopping": False, "use_cache": True}


@register_model(NAME)
class MegatronRetroLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint as lm-eval sees it."""

    def __init__(
        self,
        load: str,
        retro_index: str | None = None,
        retrieval: str = "live",
        max_length: int = 2048,
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        device: str | None = None,
        dtype: str = "auto",
        allow_tokenizer_mismatch: bool = False,
        add_bos: bool = True,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        **unknown: object,
    ) -> None:
        super().__init__()
        refused = sorted(set(unknown) - {"max_batch_size"})
        if refused:
            raise ConfigError(f"no such model argument: {', '.join(refused)}", fix="see the head of this module")
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        engine = EngineConfig(
            max_batch_size=self.batch_size,
            max_sequence_length=int(max_length),
            device=_device(device),
            dtype=dtype,
            add_bos=add_bos,
        )
        self.checkpoint = Path(load)
        parallel = ParallelConfig(
            tensor_model_parallel_size=int(tensor_model_parallel_size),
            pipeline_model_parallel_size=int(pipeline_model_parallel_size),
        )
        allowed = bool(allow_tokenizer_mismatch)
        opened = open_in_step(
            self.checkpoint, engine, retro_index, retrieval, parallel, allow_tokenizer_mismatch=allowed
        )
        self.generator, self.source, self.replicas = opened.generator, opened.source, opened.replicas
        self._rank, self._world_size = self.replicas.index, self.replicas.count
        self._device = self.generator.forward.device
        if (launch := find_launch()).world_size > 1:  # where both are 0, lm-eval writes results
            os.environ["LOCAL_RANK"] = str(launch.rank)
        self.max_length, self.max_gen_toks = int(max_length), int(max_gen_toks)
        self.chats = False

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all replicas in one."""
        return torch.stack(self.replicas.gather(tensor.cpu())).reshape(-1)

    def gather_object(self, obj: object, dst: int = 0) -> list[Any] | None:
        """The objects of all replicas, on one of them."""
        found = self.replicas.gather(obj)
        return found if self._rank == dst else None

    def barrier(self) -> None:
        """Until all replicas are here."""
        self.replicas.gather(None)

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self.generator.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: what begins a text, if the tokenizer has it."""
        beginning = getattr(self.generator.tokenizer, "beginning", None)
        return self.eot_token_id if beginning is None else int(beginning)

    @property
    def tokenizer_name(self) -> str:
        """Identity for lm-eval's caches."""
        return self.generator.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Tokens, behind what the tokenizer's own rules put before a text unless that is there or not wanted."""
        tokens = self.generator.tokenizer.encode(string)
        if add_special_tokens is False or not self.generator.add_bos:
            return tokens
        return [*begin_tokens(self.generator.tokenizer, tokens), *tokens]

    @cached_property
    def _chat(self) -> ChatFormat:
        return load_chat_format(self.checkpoint)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation by the model's own template; without the generation prompt it ends open."""
        self.chats = True
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        opened = "" if add_generation_prompt else turns.pop().text
        return self._chat.write(turns)[0] + opened

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        """Sums and greediness, in order; requests of like length share a forward."""
        order = sorted(range(len(requests)), key=lambda number: len(requests[number][1]) + len(requests[number][2]))
        answers: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            pairs = [(requests[number][1], requests[number][2]) for number in numbers]
            scored = score_continuations(self.generator.forward, pairs, self.source, max_length=self.max_length)
            for number, one in zip(numbers, scored, strict=True):
                answers[number] = (one.logprob, one.is_greedy)
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, window by window; what begins a text is predicted too, as in HFLM."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)
            parts = self._loglikelihood_tokens([(None, *window) for window in windows if window[1]])
            totals.append(sum(value for value, _ in parts))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, greedy unless sampling is asked for; requests of like options go together."""
        answers: dict[int, str] = {}
        for options, numbers in _by_options(requests):
            contexts = [requests[number].args[0] for number in numbers]
            for number, answer in zip(numbers, self._answers(contexts, options), strict=True):
                answers[number] = answer
                self.cache_hook.add_partial("generate_until", requests[number].args, answer)
        return [answers[number] for number in range(len(requests))]

    def _answers(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        refused = sorted(name for name in options if name not in _SAMPLING_KEYS and options[name] != _NEUTRAL.get(name))
        if refused:
            raise ConfigError(f"generation arguments that are not supported: {', '.join(refused)}")
        wanted = next((int(options[name]) for name in _LENGTHS if options.get(name)), self.max_gen_toks)
        length = min(wanted, self.max_length - 1)
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampled = bool(options.get("do_sample", False))
        sampling = Sampling(
            float(options.get("temperature", 1.0)) if sampled else 0.0,
            int(options.get("top_k", 0)) if sampled else 0,
            float(options.get("top_p", 1.0)) if sampled else 1.0,
            float(options.get("repetition_penalty", 1.0)),
        )
        generations = self.generator.generate(
            [tuple(self.tok_encode(context)[length - self.max_length :]) for context in contexts],
            max_new_tokens=length,
            sampling=sampling,
            stop_strings=[*stops, *(self._chat.stops if self.chats else ())],
            sources=[self.source] * len(contexts),
        )
        return [generation.text for generation in generations]


def _by_options(requests: list[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The numbers of requests with the same options."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
    for numbers in groups.values():
        yield dict(requests[numbers[0]].args[1]), numbers


def _device(wish: str | None) -> str:
    """lm-eval asks for cuda:0 when its user asked for nothing, so that wish is not binding."""
    if wish is not None and wish.startswith("cuda") and not torch.cuda.is_available():
        say(f"no GPU here: the model runs on the CPU, not on {wish}")
        return "cpu"
    return wish or "auto"


def main() -> None:
    """lm-eval's own command line, with our model in its table."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
