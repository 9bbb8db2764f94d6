"""`megatron-retro finetune` under its name as a script."""

from megatron_retro.cli.main import run_verb

if __name__ == "__main__":
    run_verb("finetune")
