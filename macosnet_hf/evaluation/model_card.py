"""The figures of a model card, from the JSON that `macosnet evaluate --json` wrote.

    python -m macosnet_hf.evaluation.model_card model_card.md --keep benchmarks/results pf-willow.json msrc-coseg.json

replaces the card's model-index and keeps the files, without the paths of this machine, where a test compares them with
the card. A file's name is the data set's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..errors import DataError, MaCoSNetError
from ..io.output_folder import write_file

_KEPT = ("benchmark", "protocol", "split", "model", "matching", "refine", "samples", "metrics", "per_class", "variants")
_NAMES = {
    "pf-willow": "PF-WILLOW",
    "pf-pascal": "PF-PASCAL",
    "spair-71k": "SPair-71k",
    "tss": "TSS",
    "tss-sample": "TSS, the three sample pairs",
    "internet": "Internet",
    "voc2010-coseg": "PASCAL VOC 2010 co-segmentation",
    "msrc-coseg": "MSRC co-segmentation",
}
_ALPHAS = ("0.05", "0.1", "0.15")
# (type, place in `metrics`, name); what a benchmark does not measure is left out.
_MATCHING = [
    *(("pck", ("pck", kind, alpha), f"PCK {kind} @{alpha}") for kind in ("image", "bbox") for alpha in _ALPHAS),
    ("flow_pck", ("flow_pck", "0.05"), "flow PCK @0.05"),
]
_MASKS = [("jaccard", ("jaccard",), "Jaccard index"), ("precision", ("precision",), "Precision")]


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `macosnet evaluate --json` wrote, as far as it belongs into a repository.

    Raises:
        DataError: if it is no such file.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        chosen = {name: report[name] for name in _KEPT if name in report}
        chosen["model"] = Path(str(chosen["model"])).name
        if not chosen["samples"] or not isinstance(chosen["metrics"], dict):
            raise KeyError("metrics")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no report of `macosnet evaluate --json` ({error}).") from error
    return chosen


def eval_results(reports: dict[str, dict[str, Any]]) -> list[EvalResult]:
    """The figures of a card's model-index.

    Args:
        reports: of each data set, by its name, as [`read_report`] gives them.
    """
    return [
        EvalResult(
            task_type=task,
            task_name=title,
            dataset_type=dataset,
            dataset_name=_NAMES.get(dataset, dataset),
            dataset_split=report.get("split", "test"),
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(value), 3),
        )
        for dataset, report in reports.items()
        for task, title, wanted in (
            ("keypoint-detection", "Semantic matching", _MATCHING),
            ("image-segmentation", "Object co-segmentation", _MASKS),
        )
        for kind, place, name in wanted
        if (value := _look_up(report["metrics"], place)) is not None
    ]


def _look_up(metrics: Any, place: Sequence[str]) -> float | None:
    for name in place:
        metrics = (metrics or {}).get(name)
    return metrics


def fill(card: str | os.PathLike[str], reports: dict[str, dict[str, Any]]) -> None:
    """Replaces the model-index at the head of a model card; the text and all other settings stay.

    Raises:
        DataError: if the card has no head of settings.
        OutputError: if it cannot be written.
    """
    path = Path(card)
    if not re.match(r"\s*---\n.*?\n---\n", path.read_text(encoding="utf-8"), re.DOTALL):
        raise DataError(f"{path} does not begin with settings between two lines of ---.")
    filled = ModelCard.load(path)
    filled.data.model_name = filled.data.model_name or path.stem
    filled.data.eval_results = eval_results(reports)
    write_file(path, str(filled))


def main(arguments: Sequence[str] | None = None) -> int:
    """Fills a card; returns 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m macosnet_hf.evaluation.model_card", description=__doc__)
    parser.add_argument("card", metavar="CARD", help="model_card.md, or the README.md of a model's folder")
    parser.add_argument("reports", metavar="JSON", nargs="+", help="named after their data sets")
    parser.add_argument("--keep", metavar="FOLDER", help="copy the reports here, without paths")
    args = parser.parse_args(arguments)
    try:
        reports = {Path(path).stem: read_report(path) for path in args.reports}
        fill(args.card, reports)
        if args.keep:
            Path(args.keep).mkdir(parents=True, exist_ok=True)
            for name, report in reports.items():
                write_file(Path(args.keep) / f"{name}.json", json.dumps(report, indent=1) + "\n")
    except (MaCoSNetError, OSError) as error:
        print(f"model_card: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
