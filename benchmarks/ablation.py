"""What each part of the joint training brings: the paper's Tables 7, 8, 9 and Figure 9, on data for two cores.

    python benchmarks/ablation.py --data DATA --output_dir OUT [--model MODEL] [--steps 60] [--only NAME ...] [--resume]

DATA holds `voc2010-coseg` (`images/<class>` and `masks/<class>`), `pf-willow` (the original archive) and the folders
of images to train on. Every variant is trained from the same model with the same seed, images and number of
steps, and measured on the same images of voc2010-coseg and pairs of PF-WILLOW. Masks and keypoints are only
reported: the training sees images and class names. Results are written to OUT/ablation.json after each variant, so
that an interrupted run goes on with --resume, and to OUT/ablation.md as tables.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import hashlib
import importlib.util
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from macosnet_hf import DEFAULT_CHECKPOINT
from macosnet_hf.datasets.prepare import open_records
from macosnet_hf.datasets.schema import Record
from macosnet_hf.errors import CheckpointError, DataError, InputError, OutputError
from macosnet_hf.evaluation.predictors import ImageCache, ModelPredictor, weights_hash
from macosnet_hf.evaluation.protocols import PROTOCOLS, Options, Protocol
from macosnet_hf.evaluation.runner import evaluate, finish
from macosnet_hf.evaluation.scoring import Tally
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.io.output_folder import write_file
from macosnet_hf.training import joint_run
from macosnet_hf.training.checkpoints import writing
from macosnet_hf.training.images import TrainingImages
from macosnet_hf.training.launch import run_script
from macosnet_hf.training.loop import NonFiniteLossError
from macosnet_hf.training.losses import PerceptualNetwork
from macosnet_hf.training.pseudo_masks import load_masks, make_masks, save_masks
from macosnet_hf.training.settings import JointSettings, parse_settings


@dataclass(frozen=True)
class Variant:
    """A row of the tables: its name for `--only`, its heading, and what it changes in the settings of the full model.

    Attributes:
        words: arguments of `training/train.py`; `None` is the start, which is not trained.
        untrained: the task whose part stays that of the start.
    """

    name: str
    heading: str
    words: tuple[str, ...] | None = ()
    untrained: str = ""


VARIANTS = (
    Variant("start", "start (no joint training)", None),
    Variant("full", "full model"),
    Variant("no-matching", "w/o L_matching", ("--lambda_matching=0",)),
    Variant("no-cycle", "w/o L_cycle-consis", ("--lambda_cycle=0",)),
    Variant("no-transitivity", "w/o L_trans-consis", ("--lambda_trans=0",)),
    Variant("no-task", "w/o L_task-consis", ("--lambda_task=0",)),
    Variant("no-contrast", "w/o L_contrast", ("--lambda_contrast=0",)),
    Variant("separate-streams", "both streams, not coupled", ("--separate_streams",)),
    Variant(
        "matching-alone",
        "matching stream alone",
        ("--separate_streams", "--no-train_decoder", "--lambda_contrast=0", "--lambda_task=0", "--prior_weight=0"),
        untrained="masks",
    ),
    Variant(
        "segmentation-alone",
        "segmentation stream alone",
        (
            *("--separate_streams", "--no-train_predictor", "--lambda_matching=0", "--lambda_cycle=0"),
            *("--lambda_trans=0", "--lambda_task=0", "--synthetic_weight=0", "--local_weight=0"),
        ),
        untrained="matching",
    ),
    Variant("no-local", "w/o local distillation", ("--local_weight=0",)),
    Variant("no-prior", "w/o pseudo-mask prior", ("--prior_weight=0",)),
    Variant("no-synthetic", "w/o synthetic anchor", ("--synthetic_weight=0",)),
    Variant("pixels", "L_contrast on masked pixels", ("--contrastive_form=pixels",)),
    Variant("mirrored-partners", "mirrored partners", ("--mirror_partners",)),
    Variant("margin-0", "margin m = 0", ("--margin=0",)),
    Variant("margin-1", "margin m = 1", ("--margin=1",)),
    Variant("margin-2", "margin m = 2", ("--margin=2",)),
    Variant("margin-5", "margin m = 5", ("--margin=5",)),
    Variant("margin-10", "margin m = 10", ("--margin=10",)),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
MARGINS = tuple(name for name in BY_NAME if name.startswith("margin-"))

# Rows of the paper, "Ours" with ResNet-101: Table 7 (Internet; P and J of airplane, car, horse, mean), Table 8
# (PF-WILLOW; PCK at 0.05, 0.1, 0.15), Table 9 (TSS; P and J).
TABLE_7: dict[str, tuple[float, ...]] = {
    "full": (0.941, 0.65, 0.940, 0.82, 0.922, 0.63, 0.935, 0.70),
    "no-matching": (0.940, 0.64, 0.927, 0.78, 0.887, 0.61, 0.918, 0.68),
    "no-cycle": (0.936, 0.64, 0.929, 0.81, 0.920, 0.62, 0.928, 0.69),
    "no-transitivity": (0.939, 0.65, 0.928, 0.81, 0.922, 0.62, 0.930, 0.69),
    "no-task": (0.938, 0.65, 0.915, 0.78, 0.883, 0.60, 0.912, 0.68),
    "no-contrast": (0.444, 0.39, 0.302, 0.26, 0.475, 0.43, 0.425, 0.38),
}
TABLE_8: dict[str, tuple[float, ...]] = {
    "full": (0.538, 0.854, 0.939),
    "no-matching": (0.494, 0.822, 0.927),
    "no-cycle": (0.529, 0.847, 0.938),
    "no-transitivity": (0.532, 0.851, 0.930),
    "no-task": (0.514, 0.842, 0.928),
    "no-contrast": (0.502, 0.823, 0.922),
}
TABLE_9: dict[str, tuple[float, float]] = {"crf": (0.933, 0.68), "otsu": (0.927, 0.65), "grabcut": (0.935, 0.70)}

# Classes of voc2010-coseg that Table 7 has too, under its names.
SHARED_CLASSES = {"Airplane": "Aero", "Car": "Car", "Horse": "Horse"}

ALPHAS = (0.05, 0.1, 0.15)
WAYS = {"transform": "bare transform", "local": "with local matching"}
# In place of the configuration's perceptual network where that cannot be had; it comes inside a package.
SPARE_NETWORK = "tf_efficientnet_lite0"
FORMAT = 1

Figures = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", help="folder that holds voc2010-coseg, pf-willow and the images to train on")
    parser.add_argument("--output_dir", help="where results and tables go")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="where every variant starts; default: the embedded")
    parser.add_argument(
        "--config",
        default=str(Path(__file__).resolve().parents[1] / "training" / "configs" / "lite.yaml"),
        help="settings of the full model, as for training/train.py (default: training/configs/lite.yaml)",
    )
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each variant (default: 60)")
    parser.add_argument(
        "--photographs",
        nargs="+",
        default=["voc2010-coseg", "voc2007-6x2"],
        help="folders in DATA to train on (default: voc2010-coseg voc2007-6x2)",
    )
    parser.add_argument("--photos_per_class", type=int, default=20, help="to train on (default: 20)")
    parser.add_argument("--evaluation_photos", type=int, default=5, help="of each class of voc2010-coseg (default: 5)")
    parser.add_argument("--evaluation_pairs", type=int, default=200, help="of PF-WILLOW, over all classes")
    parser.add_argument("--refine_size", type=int, default=200, help="longer side when masks are refined, in pixels")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default=None, help="of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some variants: {', '.join(BY_NAME)}")
    parser.add_argument("--resume", action="store_true", help="go on with the results that are in the output folder")
    parser.add_argument("--keep_models", action="store_true", help="keep each variant's model in OUTPUT_DIR/runs")
    return parser


def chosen_variants(names: Sequence[str] | None) -> list[Variant]:
    """The variants of `--only`, in the table's order; all of them by default.

    Raises:
        InputError: for a name that is none.
    """
    for name in names or ():
        if name not in BY_NAME:
            close = difflib.get_close_matches(name, BY_NAME, n=1)
            hint = f" Is {close[0]} meant?" if close else ""
            raise InputError(f"There is no variant {name!r}.{hint} Choose among {', '.join(BY_NAME)}.")
    return [variant for variant in VARIANTS if names is None or variant.name in names]


def check_arguments(args: argparse.Namespace) -> None:
    """Raises what can be found out before anything is loaded: [`InputError`], [`DataError`] for missing folders."""
    if args.output_dir is None:
        raise InputError("Say where the results go with --output_dir.")
    for name, least in (
        *(("steps", 1), ("photos_per_class", 3), ("evaluation_photos", 2)),
        *(("evaluation_pairs", 1), ("refine_size", 0), ("seed", 0)),
    ):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}.")
    for name in dict.fromkeys(["voc2010-coseg", "pf-willow", *args.photographs]):
        if not (Path(args.data) / name).is_dir():
            raise DataError(f"{args.data} holds no folder {name}.")


def training_words(args: argparse.Namespace, images: Sequence[str], output: Path) -> list[str]:
    """The command line of `training/train.py` for the full model."""
    words = ["--config", args.config, "--model_name_or_path", str(args.model), "--output_dir", str(output)]
    words += ["--dataset_name", *images]
    settings = {
        "seed": args.seed,
        "max_train_steps": args.steps,
        "num_warmup_steps": args.steps // 10,
        "photos_per_class": args.photos_per_class,
        "logging_steps": max(1, args.steps // 3),
        # Every variant ends after the same number of steps; which of its steps was best is another question.
        "validation_steps": args.steps,
        "validation_groups": 1,
        "checkpointing_steps": args.steps + 1,
        # No annotation is looked at while training.
        "validation_pairs": "",
        "validation_masks": "",
    }
    words += [f"--{name}={value}" for name, value in settings.items()]
    words += ["--no-load_best_model_at_end", "--no-with_tracking", "--no-push_to_hub", "--keep_in_memory"]
    return words + ([f"--mixed_precision={args.mixed_precision}"] if args.mixed_precision else [])


# ---------------------------------------------------------------------------------------------------------------------
# What all variants share
# ---------------------------------------------------------------------------------------------------------------------


def copy_images(images: TrainingImages, folder: Path) -> None:
    """Writes the images as they are trained on, so that each variant reads small squares and no original again."""
    from PIL import Image

    numbers = {name: number for number, name in enumerate(images.classes())}
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        for index, name in enumerate(images.class_names):
            path = folder / f"{numbers[name]:03d} {name}" / f"{index:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = images[index].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(path, compress_level=1)


def shared_masks(path: Path, images: TrainingImages, model: Any, processor: Any) -> None:
    """Makes the pseudo-masks of all variants once, unless the file of an interrupted run holds them."""
    try:
        found = load_masks(path, images.fingerprint())
    except DataError:
        found = None  # damaged: made anew
    if found is not None:
        return
    print(f"Making pseudo-masks of {len(images)} images ...", flush=True)
    images.keep_in_memory(quiet=True)
    masks = make_masks(model.macosnet, processor, images)
    with writing(path):
        save_masks(path, masks, images.fingerprint())


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items at even distances, all of them where there are not more."""
    if count >= len(items):
        return list(items)
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def by_class(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by class, sorted, so that a choice among them depends on nothing but the data."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record["class_name"], record["id"])):
        groups.setdefault(record["class_name"], []).append(record)
    return groups


def evaluation_records(args: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """Images with masks, and pairs with keypoints: a fixed choice from all classes.

    Raises:
        DataError: if a data set cannot be read.
    """
    images = by_class(open_records("coseg", Path(args.data) / "voc2010-coseg")[0])
    pairs = by_class(open_records("pf-willow", Path(args.data) / "pf-willow")[0])
    # The first classes take what does not divide evenly.
    shares = [(args.evaluation_pairs + len(pairs) - 1 - k) // len(pairs) for k in range(len(pairs))]
    return (
        [record for group in images.values() for record in spread(group, args.evaluation_photos)],
        [record for group, share in zip(pairs.values(), shares, strict=True) for record in spread(group, share)],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Judge:
    """Measures models on the same images and pairs.

    Features of equal encoders are reused from one model to the next, and so are figures where all that they depend on
    is equal: a stream that a variant does not train is not measured again.


    Args:
        images, pairs: records of [`evaluation_records`].
        refine_size: longer side when masks are refined.
    """

    def __init__(self, images: list[Record], pairs: list[Record], refine_size: int):
        self.images, self.pairs, self.refine_size = images, pairs, refine_size
        self._caches: dict[tuple[str, str], ImageCache] = {}
        self._known: dict[tuple[str, ...], Figures] = {}

    def measure(self, folder: str | Path, refinements: tuple[str, ...]) -> Figures:
        """`masks`: P and J, soft and for each refinement; `matching`: PCK for each way. Overall and by class."""
        model, processor = load_model_and_processor(folder)
        base = model.macosnet
        encoder = weights_hash(base.encoder)
        self._caches = {key: cache for key, cache in self._caches.items() if key[1] == encoder}

        def known(task: str, without: tuple[str, ...], measure: Callable[[str], Figures], *more: str) -> Figures:
            parts = nn.ModuleDict({name: part for name, part in base.named_children() if name not in without})
            key = (task, weights_hash(parts), *more)
            if key not in self._known:
                self._known[key] = measure(encoder)
            return copy.deepcopy(self._known[key])

        return {
            "masks": known(
                "masks",
                ("affine_head", "tps_head"),
                lambda encoder: self._masks(model, processor, encoder, refinements),
                *refinements,
            ),
            "matching": known("matching", ("decoder",), lambda encoder: self._matching(model, processor, encoder)),
        }

    def _predictor(self, model: Any, processor: Any, encoder: str, task: str) -> ModelPredictor:
        predictor = ModelPredictor(model, processor, masks=task == "masks")
        predictor.cache = self._caches.setdefault((task, encoder), predictor.cache)
        return predictor

    def _masks(self, model: Any, processor: Any, encoder: str, refinements: tuple[str, ...]) -> Figures:
        protocol = replace(PROTOCOLS["coseg"], label_transfer=False)
        found: Figures = {}
        for refine in refinements:
            predictor = self._predictor(model, processor, encoder, "masks")
            options = Options(refine=refine, refine_size=self.refine_size)
            tally = next(iter(_tallies(self.images, protocol, predictor, options).values()))
            overall, classes = tally.overall(), tally.class_means()
            found[refine] = _precision_and_jaccard(overall, classes, "")
            found["soft"] = _precision_and_jaccard(overall, classes, "before_refinement.")
        return found

    def _matching(self, model: Any, processor: Any, encoder: str) -> Figures:
        protocol = replace(PROTOCOLS["pf-willow"], pck=("image",), alphas=ALPHAS)
        predictor = self._predictor(model, processor, encoder, "matching")
        tallies = _tallies(self.pairs, protocol, predictor, Options())
        names = {f"{alpha:g}": f"pck.image.{alpha:g}" for alpha in ALPHAS}
        return {
            way: {
                "all": {alpha: tally.overall()[name] for alpha, name in names.items()},
                "classes": {
                    class_name: {alpha: figures[name] for alpha, name in names.items()}
                    for class_name, figures in tally.class_means().items()
                },
            }
            for way, tally in tallies.items()
        }


def _tallies(
    records: list[Record], protocol: Protocol, predictor: ModelPredictor, options: Options
) -> dict[str, Tally]:
    result = evaluate(records, protocol, predictor, options)
    finish(result, protocol, predictor, options)
    return result.variants


def _precision_and_jaccard(overall: dict[str, float], classes: dict[str, dict[str, float]], prefix: str) -> Figures:
    def both(figures: dict[str, float]) -> dict[str, float | None]:
        return {"P": figures[f"{prefix}precision"], "J": figures.get(f"{prefix}jaccard")}

    return {"all": both(overall), "classes": {name: both(figures) for name, figures in classes.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# Results on the disk
# ---------------------------------------------------------------------------------------------------------------------


class Results:
    """What is known of each variant, in `ablation.json`: there as a whole or not at all.

    Args:
        folder: the output folder, which is made.
        settings: what must be equal for results to stand in one table.
        resume: whether to go on with what is there.

    Raises:
        DataError: if the file that is there is damaged.
        InputError: if it was made with other settings, or is there although nothing is to be resumed.
        OutputError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool):
        self.path, self.settings = folder / "ablation.json", settings
        self.variants: dict[str, Figures] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The output folder {folder} cannot be made ({error.strerror}).") from error
        if not self.path.exists():
            self.save()
            return
        if not resume:
            raise InputError(f"{self.path} is there already: go on with --resume, or choose another --output_dir.")
        before, self.variants = _read_results(self.path)
        known = json.loads(json.dumps(settings))  # as it looks after a way through the file
        changed = [name for name in sorted({*before, *known}) if before.get(name) != known.get(name)]
        if changed:
            shown = ", ".join(f"{name} {before.get(name)} (now {known.get(name)})" for name in changed[:5])
            raise InputError(f"{self.path} was made with other settings: {shown}; choose another --output_dir.")

    def add(self, name: str, figures: Figures) -> None:
        """Takes in a variant and saves."""
        self.variants[name] = figures
        self.save()

    def save(self) -> None:
        write_file(self.path, json.dumps({"settings": self.settings, "variants": self.variants}, indent=1) + "\n")


def _read_results(path: Path) -> tuple[dict[str, Any], dict[str, Figures]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        settings, variants = data["settings"], data["variants"]
        for name, figures in variants.items():
            sound = name in BY_NAME and ("masks" in figures) == ("matching" in figures)
            if not sound or not ({"masks", "skipped", "failed"} & set(figures)):
                raise ValueError(f"the variant {name}")
            if "masks" in figures and not (
                figures["masks"]["grabcut"]["all"] and figures["matching"]["transform"]["all"]
            ):
                raise ValueError(f"the variant {name}")
        return dict(settings), dict(variants)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); move it away, or choose another --output_dir.") from error


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


class Ablation:
    """One table: what is shared is made once, then each variant is trained, measured and written down.

    Raises:
        MaCoSNetError: for what cannot be done, in one sentence; settings, data and model before anything is trained.
    """

    def __init__(self, args: argparse.Namespace):
        check_arguments(args)
        self.args, self.out = args, Path(args.output_dir)
        self.chosen = chosen_variants(args.only)
        sources = [str(Path(args.data) / name) for name in args.photographs]
        # All command lines are read before the first run.
        for variant in self.chosen:
            self._parse(variant, sources)
        full = self._parse(BY_NAME["full"], sources)
        model, processor = load_model_and_processor(args.model)
        originals = TrainingImages(
            sources, full.photo_size, exclude=tuple(full.exclude_classes), limit=args.photos_per_class
        )
        images, pairs = evaluation_records(args)
        self.judge = Judge(images, pairs, args.refine_size)
        settings = {
            "format": FORMAT,
            "model": weights_hash(model.macosnet)[:16],
            "photographs": originals.fingerprint(),
            "evaluation images": f"{len(images)} ({_digest([record['id'] for record in images])})",
            "evaluation pairs": f"{len(pairs)} ({_digest([record['id'] for record in pairs])})",
            "refine_size": args.refine_size,
            **{f"training.{name}": value for name, value in effective(full).items()},
        }
        self.results = Results(self.out, settings, args.resume)
        self.copies = self.out / "images"
        originals.keep_in_memory(quiet=True)
        copy_images(originals, self.copies)
        self.masks = self.out / "pseudo_masks.npz"
        if any(variant.words is not None and self._parse(variant, sources).prior_weight for variant in self._missing()):
            copied = TrainingImages([str(self.copies)], full.photo_size)
            shared_masks(self.masks, copied, model, processor)
        self.image_count, self.class_count = len(originals), len(originals.classes())

    def _parse(self, variant: Variant, images: Sequence[str]) -> JointSettings:
        words = training_words(self.args, images, self.out / "runs" / variant.name) + list(variant.words or ())
        return parse_settings(JointSettings, words)

    def _missing(self) -> list[Variant]:
        """Variants of which nothing is known, or that could not be had when they were tried last."""
        return [v for v in self.chosen if "masks" not in self.results.variants.get(v.name, {})]

    def run(self) -> None:
        """All variants that are missing, then the tables."""
        missing = self._missing()
        print(f"{len(self.chosen) - len(missing)} variants are known, {len(missing)} to do: ", end="")
        print(", ".join(variant.name for variant in missing) or "none", flush=True)
        spent: list[float] = []
        for number, variant in enumerate(missing):
            start = time.monotonic()
            figures = self._one(variant)
            figures["seconds"] = round(time.monotonic() - start, 1)
            self.results.add(variant.name, figures)
            write_file(self.out / "ablation.md", self.report())
            if "trained" in figures:
                spent.append(figures["seconds"])
            left = len(missing) - number - 1
            guess = f"; about {statistics.mean(spent) * left / 60:.0f} minutes left" if spent and left else ""
            print(f"== {variant.name}: {summary(figures)} ({figures['seconds']:.0f} s{guess})", flush=True)
        text = self.report()
        write_file(self.out / "ablation.md", text)
        if not self._missing():
            shutil.rmtree(self.copies, ignore_errors=True)
        print(f"\n{text}")

    def _one(self, variant: Variant) -> Figures:
        refinements: tuple[str, ...] = ("grabcut",)
        if variant.name == "full":
            refinements += ("otsu", "crf") if importlib.util.find_spec("pydensecrf") else ("otsu",)
        if variant.words is None:
            return self.judge.measure(self.args.model, refinements)
        settings = self._parse(variant, [str(self.copies)])
        settings = replace(settings, pseudo_masks=str(self.masks) if settings.prior_weight else None)
        if settings.contrastive_form == "pixels":
            network, reason = perceptual_network(settings.perceptual_network)
            if network is None:
                return {"skipped": reason}
            settings = replace(settings, perceptual_network=network)
        digest = _digest([f"{name}={value}" for name, value in effective(settings).items()])
        for name, known in self.results.variants.items():
            if known.get("settings") == digest and set(refinements) <= set(known.get("masks", ())):
                return {"masks": known["masks"], "matching": known["matching"], "same_as": name}
        print(f"== {variant.name}: training", flush=True)
        folder = Path(settings.output_dir)
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        try:
            joint_run.run(settings)
        except NonFiniteLossError as error:
            return {"failed": str(error).partition(";")[0]}
        figures = {**self.judge.measure(folder, refinements), "trained": True, "settings": digest}
        if settings.contrastive_form == "pixels":
            figures["network"] = settings.perceptual_network
        if not self.args.keep_models:
            shutil.rmtree(folder, ignore_errors=True)
        return figures

    def report(self) -> str:
        """The tables in Markdown, with what made them."""
        args, results = self.args, self.results.variants
        seconds = sum(figures["seconds"] for figures in results.values())
        threads = torch.get_num_threads()
        command = shlex.join(["python", "benchmarks/ablation.py", *args.words])
        images, pairs = self.judge.images, self.judge.pairs
        classes = len({record["class_name"] for record in images})
        batch = self.results.settings["training.per_device_train_batch_size"]
        lines = [
            "# Ablation",
            f"`{command}`",
            f"Every variant starts from the same weights ({self.results.settings['model']}) and trains for "
            f"{args.steps} steps of {batch} groups of images with the settings of `{Path(args.config).name}` and one "
            f"seed ({args.seed}), on {self.image_count} images of {self.class_count} classes "
            f"({', '.join(args.photographs)}). Measured on {len(images)} images of {classes} classes of "
            f"voc2010-coseg and {len(pairs)} pairs of PF-WILLOW, whose masks and keypoints no training saw. "
            f"{seconds / 60:.1f} minutes for {len(results)} variants, torch {torch.__version__}, {threads} "
            f"thread{'s' if threads > 1 else ''}. Masks are refined at {args.refine_size or 'full'} pixels. The "
            "paper's rows are for another encoder (ResNet-101), whole test sets and a full training, so only the order "
            "of the rows can be compared.",
            tables(results),
        ]
        return "\n\n".join(lines) + "\n"


def effective(settings: JointSettings) -> dict[str, Any]:
    """The settings of a run that touch its result; model and images are compared by their content instead."""
    left_out = {"model_name_or_path", "pseudo_masks", "validation_groups"}
    return {name: value for name, value in sorted(settings.of_result().items()) if name not in left_out}


def perceptual_network(wanted: str) -> tuple[str | None, str]:
    """A network F whose ImageNet weights can be had: the one that is wanted, else one from a package.

    Returns:
        Its name, or `None` and why not.
    """
    for name in dict.fromkeys((wanted, SPARE_NETWORK)):
        try:
            PerceptualNetwork(name).load_imagenet_weights()
        except CheckpointError:
            print(f"The ImageNet weights of {name} cannot be had here.", flush=True)
        else:
            return name, ""
    return None, f"no perceptual network can be had ({wanted}, {SPARE_NETWORK})"


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def summary(figures: Figures) -> str:
    """One line for the terminal."""
    if "masks" not in figures:
        return figures.get("skipped") or figures["failed"]
    pck = [f"{_figure(figures['matching'][way]['all']['0.1'])} {WAYS[way]}" for way in WAYS]
    masks = [f"J {_figure(figures['masks'][kind]['all']['J'])} {kind}" for kind in ("soft", "grabcut")]
    same = f"same settings as {figures['same_as']}: " if "same_as" in figures else ""
    return f"{same}PCK@0.1 {', '.join(pck)}; {', '.join(masks)}"


def tables(results: dict[str, Figures]) -> str:
    """All tables of the results that are there."""
    measured = {name: results[name] for name in BY_NAME if "masks" in results.get(name, {})}
    parts = [
        *("## Joint training against each stream alone", streams_table(measured), verdict(measured)),
        "## Table 7: co-segmentation, each part left out (GrabCut; the mean also before it)",
        table_7(measured),
        "## Table 8: semantic matching on PF-WILLOW (PCK `image`), each part left out",
        table_8(measured),
        *("## Table 9: post-processing of the full model's masks", table_9(measured)),
        *("## Figure 9: the margin m of the contrastive loss", figure_9(measured)),
        *("## At test time: transform alone, or local matching around it", test_time_table(measured)),
    ]
    notes = [_note(name, results[name]) for name in BY_NAME if name in results]
    if any(notes):
        parts.append("\n".join(f"- {note}" for note in notes if note))
    return "\n\n".join(parts)


def _note(name: str, figures: Figures) -> str:
    heading = BY_NAME[name].heading
    if "skipped" in figures or "failed" in figures:
        what = f"skipped, {figures['skipped']}" if "skipped" in figures else f"failed: {figures['failed']}"
        return f"{heading}: {what}."
    if "same_as" in figures:
        return f"{heading}: the settings are those of “{BY_NAME[figures['same_as']].heading}”, trained once."
    if "network" in figures:
        return f"{heading}: F is {figures['network']}."
    return ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; numbers with three digits, `None` as a dash."""
    lines = ["| " + " | ".join(header) + " |", "|:--" + "|--:" * (len(header) - 1) + "|"]
    for row in rows:
        cells = [cell if isinstance(cell, str) else _figure(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _mask_cells(figures: Figures, kind: str, class_name: str | None = None) -> list[float | None]:
    found = figures["masks"].get(kind, {})
    cells = found.get("all", {}) if class_name is None else found.get("classes", {}).get(class_name, {})
    return [cells.get("P"), cells.get("J")]


def _pck_cells(figures: Figures, way: str) -> list[float | None]:
    return [figures["matching"][way]["all"][f"{alpha:g}"] for alpha in ALPHAS]


def _table_rows(measured: dict[str, Figures]) -> dict[str, Figures]:
    """The rows of Tables 7 and 8: margins have a table of their own."""
    return {name: figures for name, figures in measured.items() if name not in MARGINS}


def table_7(measured: dict[str, Figures]) -> str:
    """P and J of the three classes that the paper has too, and the mean over all classes; the paper's rows below."""
    header = ["method"]
    header += [f"{name} {metric}" for name in (*SHARED_CLASSES, "mean") for metric in "PJ"] + ["soft P", "soft J"]
    rows: list[list[Any]] = []
    for name, figures in _table_rows(measured).items():
        row: list[Any] = [BY_NAME[name].heading]
        for class_name in SHARED_CLASSES.values():
            row += _mask_cells(figures, "grabcut", class_name)
        rows.append([*row, *_mask_cells(figures, "grabcut"), *_mask_cells(figures, "soft")])
    for name, paper in TABLE_7.items():
        rows.append([f"*paper, Internet, ResNet-101:* {BY_NAME[name].heading}", *paper, None, None])
    return _table(header, rows)


def table_8(measured: dict[str, Figures]) -> str:
    """PCK of the bare transform, as in the paper, and with local matching, which the paper has not."""
    header = ["method", *(f"{WAYS[way]} α = {alpha:.2f}" for way in WAYS for alpha in ALPHAS)]
    rows: list[list[Any]] = [
        [BY_NAME[name].heading, *_pck_cells(figures, "transform"), *_pck_cells(figures, "local")]
        for name, figures in _table_rows(measured).items()
    ]
    for name, paper in TABLE_8.items():
        rows.append([f"*paper, all 450 pairs, ResNet-101:* {BY_NAME[name].heading}", *paper, *[None] * len(ALPHAS)])
    return _table(header, rows)


def table_9(measured: dict[str, Figures]) -> str:
    """The full model's masks without and with each way of refining them."""
    if "full" not in measured:
        return "The full model was not run."
    names = {"soft": "none (threshold 0.5)", "crf": "DenseCRF", "otsu": "Otsu", "grabcut": "GrabCut"}
    rows: list[list[Any]] = []
    for kind, heading in names.items():
        missing = kind == "crf" and "crf" not in measured["full"]["masks"]
        ours = _mask_cells(measured["full"], kind)
        rows.append(
            [
                f"{heading} (skipped: pydensecrf2 missing)" if missing else heading,
                *ours,
                *TABLE_9.get(kind, (None,) * 2),
            ]
        )
    return _table(["method", "P", "J", "*paper (TSS, ResNet-101)* P", "*paper* J"], rows)


def figure_9(measured: dict[str, Figures]) -> str:
    """P and J for each margin, J as bars."""
    found = {name.partition("-")[2]: measured[name] for name in MARGINS if name in measured}
    if not found:
        return "No margin was run."
    rows: list[list[Any]] = []
    for margin, figures in found.items():
        jaccard = figures["masks"]["grabcut"]["all"]["J"]
        bar = "█" * round(40 * (jaccard or 0))
        rows.append([margin, *_mask_cells(figures, "soft"), *_mask_cells(figures, "grabcut"), bar])
    paper = (
        "*Paper (TSS, ResNet-101), a curve without figures:* severe drops in P and J at m = 0, best at 2, lower again "
        "at 5 and 10."
    )
    return _table(["m", "soft P", "soft J", "GrabCut P", "GrabCut J", "J"], rows) + f"\n\n{paper}"


def test_time_table(measured: dict[str, Figures]) -> str:
    """Both ways of transferring points, for the start and the full model."""
    rows: list[list[Any]] = []
    for name in ("start", "full"):
        if name in measured:
            rows += [[f"{BY_NAME[name].heading}, {WAYS[way]}", *_pck_cells(measured[name], way)] for way in WAYS]
    return _table(["method", *(f"α = {alpha:.2f}" for alpha in ALPHAS)], rows)


def streams_table(measured: dict[str, Figures]) -> str:
    """The claim of the paper's title in figures; a stream that was not trained is in brackets."""
    header = ["training", "PCK@0.1 bare transform", "PCK@0.1 with local matching"]
    header += ["soft P", "soft J", "GrabCut P", "GrabCut J"]
    rows: list[list[Any]] = []
    for name in ("start", "matching-alone", "segmentation-alone", "separate-streams", "full"):
        if name not in measured:
            continue
        figures, untrained = measured[name], BY_NAME[name].untrained
        matching = [_figure(figures["matching"][way]["all"]["0.1"]) for way in WAYS]
        masks = [_figure(cell) for kind in ("soft", "grabcut") for cell in _mask_cells(figures, kind)]
        matching = [f"({cell})" for cell in matching] if untrained == "matching" else matching
        masks = [f"({cell})" for cell in masks] if untrained == "masks" else masks
        rows.append([BY_NAME[name].heading, *matching, *masks])
    return _table(header, rows) + "\n\nFigures in brackets are those of the start: the row does not train that stream."


@dataclass(frozen=True)
class Difference:
    """Full model minus one stream alone, with the standard error of the mean over classes (`None` for one class)."""

    what: str
    mean: float
    error: float | None

    def text(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.3f}"
        return f"{self.what} {self.mean:+.3f}{error}"


def difference(what: str, full: Figures, alone: Figures, metric: str) -> Difference:
    """The difference in one metric, class by class, of two entries with `all` and `classes`."""
    pairs = [(full["classes"][name].get(metric), alone["classes"][name].get(metric)) for name in full["classes"]]
    steps = [first - second for first, second in pairs if first is not None and second is not None]
    error = statistics.stdev(steps) / len(steps) ** 0.5 if len(steps) > 1 else None
    return Difference(what, (full["all"][metric] or 0) - (alone["all"][metric] or 0), error)


def verdict(measured: dict[str, Figures]) -> str:
    """Whether joint training beats each stream trained alone on both tasks, in this run."""
    needed = ("full", "matching-alone", "segmentation-alone")
    missing = [name for name in needed if name not in measured]
    if missing:
        return f"Whether joint training beats each stream alone is open: {', '.join(missing)} not run."
    full, matching, masks = (measured[name] for name in needed)
    by_task = {
        "matching": [
            difference(f"PCK@0.1 {WAYS[way]}", full["matching"][way], matching["matching"][way], "0.1") for way in WAYS
        ],
        "segmentation": [
            difference(f"J {kind}", full["masks"][kind], masks["masks"][kind], "J") for kind in ("soft", "grabcut")
        ],
    }
    answers, details = [], []
    for task, differences in by_task.items():
        better = [found.mean > 0 for found in differences]
        answers.append("yes" if all(better) else "in part" if any(better) else "no")
        details.append(f"{task}: {answers[-1]} ({', '.join(found.text() for found in differences)})")
    overall = (
        "yes" if set(answers) == {"yes"} else "no" if "yes" not in answers and "in part" not in answers else "in part"
    )
    return (
        f"**Joint training beats each stream alone on both tasks in this run: {overall}.** {'; '.join(details)}. "
        "Full model minus the stream alone, ± the standard error over classes; one seed."
    )


# ---------------------------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(words)
    args.words = list(sys.argv[1:] if words is None else words)
    if args.data is None:
        print("Needs --data (a folder with voc2010-coseg, pf-willow and images to train on) and --output_dir.")
        return 0
    try:
        Ablation(args).run()
    except KeyboardInterrupt:
        print("\nInterrupted; the same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_script(main)
