"""JSON that every reader takes. JSON has no NaN and no infinity: a number that is not finite is written as null, and
null, where a number belongs, is read as NaN. All JSON of the package is written through here, or refuses such numbers.
"""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any, **style: Any) -> str:
    """`json.dumps` with null for every number that is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **style)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **style)


def number_of(value: float | str | None) -> float:
    """A number that was read from JSON; text is how logs used to spell what is not finite."""
    return math.nan if value is None else float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
