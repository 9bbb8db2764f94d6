"""What tests of foreign checkpoints share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The library, silent."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers
