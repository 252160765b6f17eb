"""What the verdicts on pairs are worth, and the constants of `macosnet_hf/inference/verdict.py`.

    python benchmarks/verdicts.py DATA [--model MODEL] [--pairs N] [--fast] [--evidence FILE] [--fit]

DATA holds caltech101, msrc-coseg, voc2007-6x2 and leordeanu-cars; `verdict_pairs.py` draws the pairs. `--fit` chooses
a rule on one half of the images and prints it as a line of the module. The table is always of the other half, with the
rule that the module has. A source may show the object mirrored. `--evidence` keeps the evidence of all pairs in a file,
from which the rest takes a second.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from verdict_pairs import known_pairs

from macosnet_hf import DEFAULT_CHECKPOINT
from macosnet_hf.inference.pair import match_images
from macosnet_hf.inference.verdict import RULE, UPRIGHT_SCALE, Evidence, evidence_of, judged_features, verdict_of
from macosnet_hf.io.checkpoints import load_model_and_processor

RELATED, WRONG = ("same image", "same side"), ("unrelated", "blank", "texture")
KINDS = (*RELATED, "mirrored", "turned", "class", "kin", *WRONG)


def gather(data: Path, model_name: str, count: int | None, fast: bool) -> Iterable[dict[str, Any]]:
    """Kind, half and evidence of pairs in random order, and whether the transform mirrors."""
    model, processor = load_model_and_processor(model_name)
    if fast:
        model.config.cascade = "fast"
    pairs = list(known_pairs(data))
    random.Random(1).shuffle(pairs)
    for pair in tqdm(pairs[:count], desc="pairs"):
        images = (pair.source(), pair.target())
        result = match_images(images, model=model, processor=processor, refine="none", orientations="mirror")
        outputs, masks = result._found.outputs, torch.from_numpy(result.probabilities)
        features = judged_features(model.macosnet, outputs.features[0])
        evidence = evidence_of(features, masks.to(model.device), model.transforms(outputs)[0])
        mirrors = bool(result.transforms[:1].determinant() < 0)
        yield {"kind": pair.kind, "half": pair.half, "name": pair.name, "mirrors": mirrors, **evidence._asdict()}


def is_right(row: dict[str, Any]) -> bool:
    """Whether a pair of one class is matched the right way round: its transform mirrors where the images do."""
    return (row["kind"] in RELATED and not row["mirrors"]) or (row["kind"] == "mirrored" and row["mirrors"])


def numbers(row: dict[str, Any]) -> list[float]:
    """What the logistic regression of a rule takes."""
    return [row["similarity"], row["near"], np.tanh(row["upright"] / UPRIGHT_SCALE), 1.0]


def fit(rows: list[dict[str, Any]]) -> None:
    """Prints the rule that rows choose: a regression of right pairs against all that should not match.

    Related pairs that the transform mirrors are left out: many objects are their own mirror image.
    """
    something = np.array([row["structure"] for row in rows if row["kind"] in (*RELATED, "class", "kin", "mirrored")])
    nothing = np.array([row["structure"] for row in rows if row["kind"] == "blank"])
    print(f"structure: at most {nothing.max():.3f} in blank pairs; in others, quantiles 0 0.01 0.02 0.05:", end=" ")
    print(np.quantile(something, [0, 0.01, 0.02, 0.05]).round(3))
    rows = [row for row in rows if row["kind"] not in ("class", "kin", "blank")]
    rows = [row for row in rows if not (row["kind"] in RELATED and row["mirrors"])]
    values, right = np.array([numbers(row) for row in rows]), np.array([is_right(row) for row in rows], dtype=float)
    balance = np.where(right == 1, 0.5 / right.mean(), 0.5 / (1 - right.mean()))
    weights = np.zeros(values.shape[1])
    for _ in range(50):  # Newton's method, with a little ridge
        chance = 1 / (1 + np.exp(-values @ weights))
        gradient = values.T @ (balance * (right - chance)) - 0.01 * weights
        curvature = (values * (balance * chance * (1 - chance))[:, None]).T @ values + 0.01 * np.eye(len(weights))
        weights = weights + np.linalg.solve(curvature, gradient)
    print("Rule(similarity={:.3g}, near={:.3g}, upright={:.3g}, bias={:.3g})".format(*weights))
    chance = 1 / (1 + np.exp(-values @ weights))
    kind = np.array([row["kind"] for row in rows])
    groups = {"same side": kind == "same side", "unrelated": kind == "unrelated", "wrong": right == 0}
    print("threshold: share above it of", ", ".join(groups))
    for threshold in np.arange(0.3, 0.95, 0.04):
        shares = [np.mean(chance[some] >= threshold) for some in groups.values()]
        print(f"{threshold:.2f}: " + " ".join(f"{share:.3f}" for share in shares))


def table(rows: list[dict[str, Any]]) -> str:
    """The verdicts on rows, by kind, in percent."""
    lines = ["| pairs | number | good | fair | poor |", "|---|---:|---:|---:|---:|"]
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        groups = {kind: of_kind}
        if kind == "mirrored":
            groups = {
                f"mirrored, {said}": [row for row in of_kind if row["mirrors"] is found]
                for found, said in ((True, "recognised as such"), (False, "not recognised"))
            }
        for name, some in groups.items():
            words = [verdict_of(Evidence(*(row[field] for field in Evidence._fields)), RULE).quality for row in some]
            shares = " | ".join(
                f"{100 * words.count(word) / max(1, len(words)):.1f}" for word in ("good", "fair", "poor")
            )
            lines.append(f"| {name} | {len(some)} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--pairs", type=int, help="at most so many, drawn by chance")
    parser.add_argument("--fast", action="store_true", help="the cascade that warps features, not images")
    parser.add_argument("--evidence", type=Path)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    if arguments.evidence and arguments.evidence.exists():
        rows = json.loads(arguments.evidence.read_text())
    else:
        rows = list(gather(arguments.data, arguments.model, arguments.pairs, arguments.fast))
        if arguments.evidence:
            arguments.evidence.write_text(json.dumps(rows))
    if arguments.fit:
        fit([row for row in rows if row["half"] == "choose"])
    print(table([row for row in rows if row["half"] == "report"]))


if __name__ == "__main__":
    main()
