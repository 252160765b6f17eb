"""Tables: our figures by class, the paper's beside them, the protocol named underneath.

The paper's figures are those of "Ours, ResNet-101" in Tables 1 to 6 of "Show, Match and Segment", as shares of one.
"""

from __future__ import annotations

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


def columns_of(protocol: Protocol, tally: Tally, options: Options) -> dict[str, str]:
    """Headings of the metrics that were measured, by their dotted names, in the protocol's order."""
    alphas = options.alphas or protocol.alphas
    columns = {f"pck.{name}.{alpha:g}": f"PCK {name} @{alpha:g}" for name in protocol.pck for alpha in alphas}
    columns |= {f"flow_pck.{alpha:g}": f"flow PCK @{alpha:g}" for alpha in alphas}
    refined = ""
    if options.refine != "none":
        refined = f" {options.refine}"
        columns |= {
            "before_refinement.precision": "P soft",
            "before_refinement.jaccard": "J soft",
            "before_refinement.boundary_f": "F soft",
        }
    columns |= {
        "precision": f"P{refined}",
        "jaccard": f"J{refined}",
        "boundary_f": f"F{refined}",
        "label_transfer.accuracy": "label transfer accuracy",
        "label_transfer.iou": "label transfer IoU",
        "right": "right",
        "jaccard.asked": "J asked",
        "jaccard.others": "J others",
        "answers_iou": "IoU of answers",
        "jaccard.same": "J, same class",
        "jaccard.strangers": "J, other classes",
        "jaccard.itself": "J, itself",
    }
    measured = tally.overall()
    return {metric: heading for metric, heading in columns.items() if metric in measured}


def markdown_table(protocol: Protocol, tally: Tally, options: Options, name: str, *, text: str | None = None) -> str:
    """A table by class in Markdown; each metric of which the paper has a figure is followed by the paper's.

    Args:
        protocol: what was measured.
        tally: the sums of one variant.
        options: of the evaluation.
        name: the predictor's name, for the title.
        text: under the table, instead of the protocol's.
    """
    paper = PAPER.get(protocol.benchmark, {})
    means = tally.class_means()
    figures = [*means.values(), tally.overall()]
    header = ["class", "samples"]
    rows = [[class_name, str(int(tally.sums[class_name]["samples"][1]))] for class_name in means]
    rows.append([OVERALL, str(tally.count())])
    for metric, heading in columns_of(protocol, tally, options).items():
        header += [heading, "paper"] if metric in paper else [heading]
        for row, values in zip(rows, figures, strict=True):
            row.append(_figure(values.get(metric)))
            if metric in paper:
                row.append(_figure(paper[metric].get(row[0])))
    # `tabulate` would pad every column by two more unless a constant of its module were changed.
    first, *widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        f"| {label.ljust(first)} | " + " | ".join(map(str.rjust, cells, widths)) + " |"
        for label, *cells in [header, *rows]
    ]
    lines.insert(1, f"|:{'-' * (first + 1)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths))
    if options.masks == "collection":
        name += f", each {'image and its partners' if protocol.composites else 'class'} as one collection"
    if options.source_symmetry != "identity":
        name += f", sources moved by {options.source_symmetry}"
    if options.max_side is not None:
        name += f", images of at most {options.max_side} pixels"
    text = protocol.text if text is None else text
    if not options.flip_annotation:
        text += " The annotation of mirrored pairs is ignored: no source is mirrored before matching."
    if without_box := _without_box(protocol, tally, options):
        text += (
            f" {without_box} of {tally.count()} pairs are left out of PCK `bbox`: keypoints at one place span no box."
        )
    return f"### {protocol.benchmark}: {name}\n\n" + "\n".join(lines) + (f"\n\n{text}\n" if text else "\n")


def _without_box(protocol: Protocol, tally: Tally, options: Options) -> int:
    """How many pairs have no PCK `bbox`, since keypoints at one place span no box."""
    if "bbox" not in protocol.pck:
        return 0
    return tally.count() - tally.count(f"pck.bbox.{(options.alphas or protocol.alphas)[0]:g}")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def nested(figures: dict[str, float]) -> dict[str, Any]:
    """Dotted names to the JSON's nesting: `pck.image.0.1` becomes `{"pck": {"image": {"0.1": ...}}}`."""
    result: dict[str, Any] = {}
    for name, value in figures.items():
        if name == "samples":
            continue
        *groups, last = name.split(".", 2 if name.startswith("pck") else 1)
        place = result
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return result


def _by_class(tally: Tally) -> dict[str, Any]:
    """Number of samples and figures of each class, or of each level of difficulty."""
    return {
        name: {"samples": int(tally.sums[name]["samples"][1]), **nested(figures)}
        for name, figures in tally.class_means().items()
    }


def json_report(
    protocol: Protocol,
    result: Evaluation,
    options: Options,
    *,
    model: str,
    variant: str,
    split: str,
    seconds: float,
    orientations: str | None = None,
) -> dict[str, Any]:
    """What `--json` writes.

    Args:
        variant: the way of transferring points that `metrics` and `per_class` report; the others are under `variants`.
        orientations: how sources may face, where the predictor looks at more than one.
    """
    tally = result.variants[variant]
    report: dict[str, Any] = {
        "benchmark": protocol.benchmark,
        "protocol": protocol.text,
        "split": split,
        "model": model,
        "matching": variant,
        "refine": options.refine if protocol.masks or (protocol.composites and options.masks == "collection") else None,
        "masks": options.masks if protocol.kind == "images" else None,
        "orientations": orientations,
        "source_symmetry": options.source_symmetry,
        "flip_annotation": options.flip_annotation,
        "max_side": options.max_side,
        "samples": tally.count(),
        "metrics": nested(tally.overall()),
        "per_class": _by_class(tally),
        "paper": {name: dict(values) for name, values in PAPER.get(protocol.benchmark, {}).items()},
        "seconds": round(seconds, 3),
        "left_out": {"count": len(result.problems), "messages": result.problems},
    }
    if protocol.masks and tally.count("jaccard"):
        report["samples_with_object"] = tally.count("jaccard")
    if protocol.direction:
        per_point = [name for row in tally.sums.values() for name in row if name.startswith("pck_per_point.")]
        report["points"] = tally.count(per_point[0]) if per_point else 0
    if without_box := _without_box(protocol, tally, options):
        report["left_out_of_bbox"] = without_box
    others = {name: {"metrics": nested(other.overall())} for name, other in result.variants.items() if name != variant}
    if protocol.composites:
        others["company"]["per_class"] = _by_class(result.variants["company"])
    if others:
        report["variants"] = others
    if result.notes:
        report["notes"] = result.notes
    if variant in result.difficulty and result.difficulty[variant].sums:
        report["by_difficulty"] = _by_class(result.difficulty[variant])
    return report
