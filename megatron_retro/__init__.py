"""Megatron-style training of language models that retrieve (RETRO, InstructRetro)."""

__version__ = "0.1.0"
