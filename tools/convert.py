"""Starts `megatron-retro convert`."""

from megatron_retro.cli.main import run_verb

if __name__ == "__main__":
    run_verb("convert")
