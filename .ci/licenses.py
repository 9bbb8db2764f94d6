"""Writes .ci/licenses.txt: the licence of every locked package, as the metadata of what is installed here says it.

.venv/bin/python .ci/licenses.py
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

HERE = Path(__file__).parent
LISTED = HERE / "licenses.txt"
_LONGEST = 60  # characters; some packages give the whole text


def locked() -> set[str]:
    """Names in all locks."""
    locks = (path.read_text(encoding="utf-8") for path in (HERE / "locks").glob("*.txt"))
    return {name for text in locks for name in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)}


def license_of(name: str) -> str | None:
    """An expression, else what classifiers say, else how the text begins; None for what is not installed."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return None
    facts = package.metadata
    classified = [
        one.rpartition(" :: ")[2] for one in facts.get_all("Classifier") or () if one.startswith("License :: ")
    ]
    files = [file.read_text() for file in package.files or () if file.name.upper().startswith("LICEN")]
    text = "\n".join([facts["License"] or "", *files]).strip().splitlines()
    return facts["License-Expression"] or ", ".join(classified) or (text[0][:_LONGEST] if text else "not said")


def installed() -> dict[str, str]:
    """Package -> licence."""
    found = {name: license_of(name) for name in sorted(locked())}
    return {name: said for name, said in found.items() if said is not None}


if __name__ == "__main__":
    LISTED.write_text("".join(f"{name}: {said}\n" for name, said in installed().items()), encoding="utf-8")
