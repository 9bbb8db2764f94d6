"""Draws the figures of docs/experiments.md from the raw results beside this file, with intervals over documents.

python docs/experiments/figures.py                            draw
python docs/experiments/figures.py NAME=STUDY/study.json ..   take the finished runs of a study as NAME.json, then draw
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.ablation.grid import SEED, Cell, Choice
from megatron_retro.ablation.results import Configuration, Result, difference
from megatron_retro.ablation.runs import Outcome
from megatron_retro.reporting.plots import Series, bars, line_plot
from megatron_retro.reporting.study_page import Difference
from megatron_retro.runtime.run_records import EvaluationRecord
from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import json_text

HERE = Path(__file__).parent
REAL_DECODER = {
    "decoder": "alone",
    "continued": "trained on",
    "noise, real": "from noise",
    "mixed, real": "Retro",
    "mixed, real, kept": "kept",
    "prompt, real": "prompt",
}
Bar = tuple[str, str, str]  # label, configuration, the one that it is compared with
BARS: Mapping[str, tuple[str, Sequence[Bar]]] = {
    "findings": (
        "Loss minus that of Retro (frozen: +0.16)",
        [
            ("GPT, equal steps", "case=gpt-equal-steps", "case=retro"),
            ("no positions", "case=no-neighbor-positions", "case=retro"),
            ("gate 50 %", "case=adaptive-50", "case=retro"),
            ("half absent", "case=half-the-chunks", "case=retro"),
            ("half random", "case=half-random", "case=retro"),
        ],
    ),
    "composition": (
        "Held-out loss minus that with all three sources",
        [
            ("all but ref.", "case=no-reference", "case=all"),
            ("but codecs", "case=no-codecs", "case=all"),
            ("but library", "case=no-library", "case=all"),
            ("reference", "case=reference", "case=all"),
            ("codecs", "case=codecs", "case=all"),
            ("library", "case=library", "case=all"),
            ("a tenth", "case=library-tenth", "case=all"),
            ("none", "case=none", "case=all"),
        ],
    ),
    "retriever_quality": (
        "Held-out loss minus that with the whole database",
        [
            ("1/2", "case=half", "case=whole"),
            ("1/4", "case=quarter", "case=whole"),
            ("1/8", "case=eighth", "case=whole"),
            ("by chunk", "case=eighth-by-chunk", "case=whole"),
            ("overlap", "case=overlap-reranked", "case=whole"),
            ("BM25", "case=bm25-reranked", "case=whole"),
            ("25 %", "case=random-25", "case=whole"),
            ("50 %", "case=random-50", "case=whole"),
            ("random", "case=random-100", "case=whole"),
            ("none", "case=none", "case=whole"),
        ],
    ),
    "retriever_kinds": (
        "Held-out loss minus that with hashed n-grams",
        [(name, f"case={name}", "case=hashed") for name in ("hashed-bm25", "minilm", "minilm-bm25", "random", "none")],
    ),
    "retriever_training": (
        "Trained with each: loss minus that of hashed n-grams",
        [(name, f"case={name}", "case=hashed") for name in ("hashed-bm25", "minilm", "minilm-bm25")],
    ),
    "saturation": (
        "Retro minus GPT of the same width",
        [(f"width {size}", f"kind=retro,size={size}", f"kind=gpt,size={size}") for size in (32, 64, 128)],
    ),
}
_STYLE = (
    "<style>svg{background:#fff;--s0:#0b5cad;--s1:#b35900;--s2:#1a7f37;--s3:#8250df;--s4:#cf222e;--s5:#57606a} "
    "text{fill:#1b1f24;font:12px system-ui,sans-serif} .title{font-weight:600} .axis{stroke:#57606a} "
    ".grid{stroke:#d4dae0} .bound{stroke:#1b1f24;stroke-width:1.5} .dot{fill:#b35900}</style>"
)


def main(words: Sequence[str]) -> None:
    """Take what is named, draw everything."""
    for word in words:
        name, _, path = word.partition("=")
        study = json.loads(Path(path).read_text(encoding="utf-8"))
        study["runs"] = [run for run in study["runs"] if run["state"] == "finished"]
        (HERE / f"{name}.json").write_text(json_text(study, separators=(",", ":")) + "\n", encoding="utf-8")
    for name, picture in figures().items():
        (HERE / f"{name}.svg").write_text(picture, encoding="utf-8")


def figures() -> dict[str, str]:
    """Every figure by its name, without its ending."""
    drawn = {name: _bars(name, title, pairs) for name, (title, pairs) in BARS.items()}
    return drawn | {"leakage_gain": _leakage(), "real_decoder": _real_decoder()}


def _bars(name: str, title: str, pairs: Sequence[Bar]) -> str:
    found = _configurations(name)
    compared = [_compared(found[one], found[other]) for _, one, other in pairs]
    labels, title = [label for label, _, _ in pairs], f"{title}, 95 % over documents"
    bounds = [one.over_documents.to_json()[1:] for one in compared if isinstance(one.over_documents, Interval)]
    dots = [one.by_seed if len(one.by_seed) > 1 else () for one in compared]
    title += "; a dot per seed" if any(dots) else ""
    means = [one.mean for one in compared]
    plot = bars(
        labels, means, title=title, y_label="nats per token", bounds=[(low, high) for low, high in bounds], dots=dots
    )
    return _standing_alone(plot, title)


def _leakage() -> str:
    (curve,) = [run for run in _runs("leakage_gain") if run["name"] == "of=quickstart"]
    facts = curve["evaluation"]["facts"]["leakage"]
    series = []
    for variant, label in (("none", "no neighbours"), ("random", "random"), ("shuffled", "of another chunk")):
        means, lows, highs = zip(*facts["excess"][variant], strict=True)
        series.append(Series(label, facts["alphas"], means, lows, highs))
    title = "What other neighbours cost the quickstart's Retro, 95 % over documents"
    across = "chunks that share at most this part with their neighbours"
    return _standing_alone(line_plot(series, title=title, x_label=across, y_label="bits per byte"), title)


def _real_decoder() -> str:
    """Loss of SmolLM2 on the chunks that were prompted too, against operations per token."""
    found = json.loads((HERE / "real_decoder.json").read_text(encoding="utf-8"))
    costs, measured = found["costs"], found["chunks that were prompted"]["all"]
    series = []
    for name, label in REAL_DECODER.items():
        one = costs.get(name.partition(",")[0], costs["warm"])
        reads = "prompt adds" if name.startswith("prompt") else "retro adds" if "," in name else ""
        run, kept = name.removesuffix(", kept"), ", kept" * name.endswith(", kept")
        operations = (one["decoder"] + (one[reads + kept] if reads else 0.0)) / 1e9
        (_, low, high), alone = measured[run]["gain"], measured["decoder"]["loss"]
        series.append(Series(label, [operations] * 3, [alone - low, measured[run]["loss"], alone - high]))
    title = "SmolLM2's loss and operations, 95 % of the difference from the decoder alone"
    plot = line_plot(series, title=title, x_label="GFLOP per token", y_label="nats per token")
    return _standing_alone(plot, title)


def _runs(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["runs"]
    return [run for run in found if run["state"] == "finished"]


def _configurations(name: str) -> dict[str, Configuration]:
    """By name, all seeds of each."""
    results: dict[str, list[Result]] = {}
    for run in _runs(name):
        words = [word for word in run["name"].split(",") if not word.startswith(f"{SEED}=")]
        cell = Cell({SEED: Choice(str(run["changes"].get(SEED, "")), {})})
        result = Result(
            cell,
            Outcome(0, run["outcome"]["seconds"], 0.0),
            evaluations=(EvaluationRecord.from_json(run["evaluation"]),),
        )
        results.setdefault(",".join(words), []).append(result)
    return {words: Configuration((words,), tuple(found)) for words, found in results.items()}


def _compared(one: Configuration, other: Configuration) -> Difference:
    found = difference(one, other)
    if found is None or isinstance(found.over_documents, str):
        raise SystemExit(f"{one.labels} and {other.labels} cannot be compared")
    return found


def _standing_alone(figure: str, title: str) -> str:
    """The picture of a page's figure as a file of its own, under its title."""
    attributes, inside = re.findall(r"<svg ([^>]*)>(.*?)</svg>", figure, re.DOTALL)[0]
    attributes = attributes.replace('viewBox="0 0 640 320"', 'viewBox="0 -24 640 344"')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="344" {attributes}>{_STYLE}'
    return f'{head}<text class="title" x="64" y="-8">{title}</text>{inside}</svg>\n'


if __name__ == "__main__":
    main(sys.argv[1:])
