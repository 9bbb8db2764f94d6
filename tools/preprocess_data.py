"""Text to token files, under the name that Megatron users know: `megatron-retro preprocess`."""

from megatron_retro.cli.main import run_verb

if __name__ == "__main__":
    run_verb("preprocess")
