"""Builds `csrc`; see `csrc/README.md`. Metadata is in pyproject.toml."""

from setuptools import setup

setup()
