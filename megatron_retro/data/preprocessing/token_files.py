"""What `preprocess` does with token files that are finished: joins, describes and verifies them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.data import InputConfig, PreprocessConfig
from megatron_retro.data.token_file import bin_path, idx_path
from megatron_retro.data.token_writer import describe_token_file, merge_token_files, verify_token_file
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.runtime.console import say


def join_token_files(inputs: InputConfig, config: PreprocessConfig, allow_mismatch: bool) -> None:
    """`--merge-token-files`: token files one after another in a new one."""
    if inputs.input is not None or config.output_prefix is None:
        raise ConfigError(
            "--merge-token-files needs --output-prefix and reads no --input",
            got=f"--output-prefix {config.output_prefix}, --input {inputs.input}",
        )
    target = config.output_prefix
    existing = [path for path in (bin_path(target), idx_path(target)) if path.exists()]
    if existing:
        raise ArtifactError(f"{existing[0]} exists already", fix="remove it, or give another --output-prefix")
    counts = merge_token_files(config.merge_token_files or (), target, allow_mismatch=allow_mismatch).counts
    if config.verify:
        verify_file(target)
    say(f"wrote {target}.bin and .idx: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


def describe_token_files(prefixes: Sequence[str]) -> None:
    """`--checksum-token-files`: a manifest and block checksums beside files of other programs."""
    for prefix in prefixes:
        counts = describe_token_file(prefix).counts
        say(f"described {prefix}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


def verify_file(prefix: str, vocab_size: int | None = None) -> None:
    """Read a finished file again; any fault is an error."""
    problems = verify_token_file(prefix, vocab_size)
    if problems:
        raise ArtifactError(f"{prefix} is not what was written:\n  " + "\n  ".join(problems))
    say(f"{prefix}: verified")
