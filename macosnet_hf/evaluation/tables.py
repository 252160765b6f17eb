"""Tables: our figures by class, the paper's beside them, the protocol named underneath.

The paper's figures are those of "Ours, ResNet-101" in Tables 1 to 6 of "Show, Match and Segment", as shares of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..datasets.benchmarks.common import VOC_CLASSES
from .protocols import Options, Protocol
from .scoring import Evaluation, Tally

OVERALL = "all"

_TABLE_4 = (
    83.4, 87.4, 85.3, 72.2, 76.6, 94.6, 94.7, 86.6, 54.9, 89.6, 52.6, 80.2, 70.6, 79.2, 73.3, 70.5, 100.0, 63.0, 66.3,
    64.4,
)  # fmt: skip

PAPER: dict[str, dict[str, dict[str, float]]] = {
    # Table 5
    "pf-willow": {
        "pck.image.0.05": {OVERALL: 0.538},
        "pck.image.0.1": {OVERALL: 0.854},
        "pck.image.0.15": {OVERALL: 0.939},
    },
    # Table 4
    "pf-pascal": {
        "pck.image.0.1": {
            **{name: round(value / 100, 3) for name, value in zip(VOC_CLASSES, _TABLE_4, strict=True)},
            OVERALL: 0.790,
        }
    },
    # Table 6, trained on PF-PASCAL (26.6 with weak training on SPair-71k itself)
    "spair-71k": {"pck.bbox.0.1": {OVERALL: 0.258}},
    # Tables 1 and 2. Table 1 is the block without the resizing to 100 pixels.
    "tss": {
        "flow_pck.0.05": {"FG3DCar": 0.908, "JODS": 0.783, "PASCAL": 0.615, OVERALL: 0.769},
        "precision": {"FG3DCar": 0.963, "JODS": 0.940, "PASCAL": 0.939, OVERALL: 0.947},
        "jaccard": {"FG3DCar": 0.90, "JODS": 0.77, "PASCAL": 0.86, OVERALL: 0.84},
    },
    # Table 3
    "internet": {
        "precision": {"Airplane": 0.941, "Car": 0.940, "Horse": 0.922, OVERALL: 0.935},
        "jaccard": {"Airplane": 0.65, "Car": 0.82, "Horse": 0.63, OVERALL: 0.70},
    },
}


@dataclass(frozen=True)
class Column:
    """A metric's dotted name and its heading."""

    metric: str
    heading: str


def columns_of(protocol: Protocol, tally: Tally, options: Options) -> list[Column]:
    """Columns of the table: the metrics that were measured, in the protocol's order."""
    alphas = options.alphas or protocol.alphas
    columns = [Column(f"pck.{name}.{alpha:g}", f"PCK {name} @{alpha:g}") for name in protocol.pck for alpha in alphas]
    columns += [Column(f"flow_pck.{alpha:g}", f"flow PCK @{alpha:g}") for alpha in alphas if protocol.flow]
    refined = "" if options.refine == "none" else f" {options.refine}"
    columns += [
        Column("before_refinement.precision", "P soft"),
        Column("before_refinement.jaccard", "J soft"),
        Column("precision", f"P{refined}"),
        Column("jaccard", f"J{refined}"),
        Column("label_transfer.accuracy", "label transfer accuracy"),
        Column("label_transfer.iou", "label transfer IoU"),
    ]
    if options.refine == "none":
        columns = [column for column in columns if not column.metric.startswith("before_refinement.")]
    measured = tally.overall()
    return [column for column in columns if column.metric in measured]


def markdown_table(protocol: Protocol, tally: Tally, options: Options, name: str) -> str:
    """A table by class in Markdown; each metric of which the paper has a figure is followed by the paper's.

    Args:
        protocol: what was measured.
        tally: the sums of one variant.
        options: of the evaluation.
        name: the predictor's name, for the title.
    """
    columns = columns_of(protocol, tally, options)
    paper = PAPER.get(protocol.benchmark, {})
    header = ["class", "samples"]
    for column in columns:
        header.append(column.heading)
        if column.metric in paper:
            header.append("paper")
    rows = [header]
    means = tally.class_means()
    for class_name in [*means, OVERALL]:
        figures = tally.overall() if class_name == OVERALL else means[class_name]
        count = tally.count() if class_name == OVERALL else int(tally.sums[class_name]["samples"][1])
        row = [class_name, str(count)]
        for column in columns:
            row.append(_figure(figures.get(column.metric)))
            if column.metric in paper:
                row.append(_figure(paper[column.metric].get(class_name)))
        rows.append(row)
    # `tabulate` would pad every column by two more unless a constant of its module were changed.
    widths = [max(len(row[index]) for row in rows) for index in range(len(header))]
    lines = [_line(rows[0], widths), "|" + "|".join(_rule(index, width) for index, width in enumerate(widths)) + "|"]
    lines += [_line(row, widths) for row in rows[1:]]
    if options.masks == "collection":
        name += ", each class as one collection"
    return f"### {protocol.benchmark}: {name}\n\n" + "\n".join(lines) + f"\n\n{protocol.text}\n"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _line(row: list[str], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "| " + " | ".join(cells) + " |"


def _rule(index: int, width: int) -> str:
    return ":" + "-" * (width + 1) if index == 0 else "-" * (width + 1) + ":"


def nested(figures: dict[str, float]) -> dict[str, Any]:
    """Dotted names to the JSON's nesting: `pck.image.0.1` becomes `{"pck": {"image": {"0.1": ...}}}`."""
    result: dict[str, Any] = {}
    for name, value in figures.items():
        if name == "samples":
            continue
        head, *rest = name.split(".", 2 if name.startswith("pck") else 1)
        place = result
        for part in [head, *rest][:-1]:
            place = place.setdefault(part, {})
        place[[head, *rest][-1]] = value
    return result


def json_report(
    protocol: Protocol,
    result: Evaluation,
    options: Options,
    *,
    model: str,
    variant: str,
    split: str,
    seconds: float,
) -> dict[str, Any]:
    """What `--json` writes.

    Args:
        variant: the way of transferring points that `metrics` and `per_class` report; the others are under `variants`.
    """
    tally = result.variants[variant]
    report: dict[str, Any] = {
        "benchmark": protocol.benchmark,
        "protocol": protocol.text,
        "split": split,
        "model": model,
        "matching": variant,
        "refine": options.refine if protocol.masks else None,
        "masks": options.masks if protocol.kind == "images" else None,
        "samples": tally.count(),
        "metrics": nested(tally.overall()),
        "per_class": {
            name: {"samples": int(tally.sums[name]["samples"][1]), **nested(figures)}
            for name, figures in tally.class_means().items()
        },
        "paper": {name: dict(values) for name, values in PAPER.get(protocol.benchmark, {}).items()},
        "seconds": round(seconds, 3),
        "left_out": {"count": len(result.problems), "messages": result.problems},
    }
    if protocol.masks and tally.count("jaccard"):
        report["samples_with_object"] = tally.count("jaccard")
    if protocol.direction:
        report["points"] = _points(tally)
    others = {name: {"metrics": nested(other.overall())} for name, other in result.variants.items() if name != variant}
    if others:
        report["variants"] = others
    if variant in result.difficulty and result.difficulty[variant].sums:
        report["by_difficulty"] = {
            name: {"samples": int(result.difficulty[variant].sums[name]["samples"][1]), **nested(figures)}
            for name, figures in result.difficulty[variant].class_means().items()
        }
    return report


def _points(tally: Tally) -> int:
    names = [name for row in tally.sums.values() for name in row if name.startswith("pck_per_point.")]
    return tally.count(names[0]) if names else 0
