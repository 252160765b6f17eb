"""Settings of the training scripts: one dataclass a script, filled from a YAML file (`--config`) and the command line.

The command line wins over the file, the file over the defaults. Names are those that Accelerate's users know.
"""

# ruff: noqa: RUF009

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import InputError
from .joint import CASCADES
from .losses import BENCHMARK_WEIGHTS, CONTRASTIVE_FORMS, UNITS, MaCoSNetLossWeights
from .synthetic import WarpRange

DEFAULT_STEPS = 1000
_MOST_TEXT, _MOST_LEVELS = 64_000, 8  # of a YAML file: characters and levels
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# What may change between a run and its continuation, because it does not touch the result. The images are compared
# by themselves (`TrainingImages.fingerprint`), so that a folder may move.
FREE = frozenset(
    "dataset_name output_dir resume_from_checkpoint allow_changes dataloader_num_workers keep_in_memory "  # noqa: SIM905
    "skip_data_check streaming checkpointing_steps checkpoints_total_limit logging_steps validation_steps "
    "validation_pairs validation_masks validation_per_class sample_steps sample_groups load_best_model_at_end "
    "with_tracking report_to push_to_hub hub_model_id".split()
)

# Numbers with what they have to be, which `TrainingSettings` checks.
_RULES: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "a positive number": lambda value: 0 < value < math.inf,
    "a number, zero or more": lambda value: 0 <= value < math.inf,
    "a number from 0 to 1": lambda value: 0 <= value <= 1,
}
Count: TypeAlias = Annotated[int, "at least 1"]
Index: TypeAlias = Annotated[int, "a number, zero or more"]
Rate: TypeAlias = Annotated[float, "a positive number"]
Weight: TypeAlias = Annotated[float, "a number, zero or more"]
Share: TypeAlias = Annotated[float, "a number from 0 to 1"]


def option(text: str, default: Any = MISSING, **argument: Any) -> Any:
    """A field with its line in `--help`; without a default the option is required.

    Args:
        argument: further keywords of `add_argument`, such as `choices` and `metavar`.
    """
    return field(default=default, metadata={"help": text, **argument})


# Groups of options; `_argument_group_name` is how HfArgumentParser heads them in `--help`.


@dataclass(kw_only=True)
class DataOptions:
    _argument_group_name = "data"

    dataset_name: list[str] = option("folders of images, or ids of Hub data sets", metavar="FOLDER_OR_ID")
    exclude_classes: list[str] = field(default_factory=list, metadata={"help": "class folders to leave out"})
    photo_size: int = option("side to which images are resized when they are read, in pixels", 256)
    keep_in_memory: bool = option("decode all images once, at the start", False)
    streaming: bool = option(
        "read data sets as streams: nothing is stored on the disk, the resized images stay in memory", False
    )
    skip_data_check: bool = option("do not try to read every image before training", False)
    dataloader_num_workers: Index = option("processes that read images; 0: the training's own", 0)


@dataclass(kw_only=True)
class OptimizationOptions:
    _argument_group_name = "optimisation"

    per_device_train_batch_size: Count = option("samples a step and process", 16)
    gradient_accumulation_steps: Count = option("batches in a step", 1)
    max_train_steps: Count | None = option(
        f"optimiser steps; wins over --num_train_epochs ({DEFAULT_STEPS} where neither is given)", None
    )
    num_train_epochs: Rate | None = option("passes over the data", None)
    on_device: bool = option(
        "keep the images and draw the random numbers on the GPU: several times faster, other random numbers", False
    )
    max_minutes: Rate | None = option(
        "instead of --max_train_steps: as many as fit into this time at the speed of the first ones", None
    )
    learning_rate: Rate = option("of AdamW", 1e-3)
    lr_scheduler_type: str = option("schedule of the learning rate", "cosine", choices=SCHEDULES)
    num_warmup_steps: Index = option("steps in which the learning rate rises from 0", 100)
    weight_decay: Weight = option("of AdamW", 0.0)
    max_grad_norm: Rate = option("norm to which gradients are clipped", 1.0)
    ema_decay: float = option("of the moving average of the weights, which is what is saved; 0: no average", 0.999)
    mixed_precision: str | None = option(
        "default: what `accelerate launch` sets", None, choices=("no", "bf16", "fp16"), metavar="no|bf16|fp16"
    )
    seed: Index = option("of everything random", 0)


@dataclass(kw_only=True)
class CheckpointOptions:
    _argument_group_name = "checkpoints and results"

    output_dir: str = option("where checkpoints, log and the final model go", metavar="FOLDER")
    checkpointing_steps: Count = option("save the state every N steps", 500)
    checkpoints_total_limit: Count = option("checkpoints to keep, the newest", 2)
    resume_from_checkpoint: str | None = option("a checkpoint folder, or `latest`", None, metavar="FOLDER")
    allow_changes: bool = option("resume although settings or images differ", False)
    push_to_hub: bool = option("upload the final model, without checkpoints", False)
    hub_model_id: str | None = option("its repository (default: the name of the output folder)", None, metavar="ID")


@dataclass(kw_only=True)
class ReportOptions:
    _argument_group_name = "log"

    logging_steps: Count = option("write the mean losses every N steps", 50)
    validation_steps: Count = option("validate every N steps", 500)
    with_tracking: bool = option("log to a tracker too", False)
    report_to: str = option("tensorboard, trackio, wandb, ..., or all", "tensorboard")


@dataclass(kw_only=True)
class SyntheticOptions:
    _argument_group_name = "first stage"

    preset: str = option("configuration of a fresh model: lite, base, paper, vgg16, dinov2-small, ...", "lite")
    encoder_name_or_path: str | None = option(
        "a fresh dinov2-small or dinov3-small has the weights of this model of transformers", None, metavar="MODEL"
    )
    model_name_or_path: str | None = option("start from this model instead of a fresh one", None, metavar="MODEL")
    background_swap: Share = option("share of pairs whose backgrounds differ", 0.5)
    feature_noise: float = option("largest noise added to features, relative to their own size", 0.7)
    exact_share: Share = option("share of steps in which the spline sees re-encoded pixels", 0.5)
    validation_pairs: str | None = option("CSV of pairs with keypoints, to report PCK on", None, metavar="FILE")


@dataclass(kw_only=True)
class DecoderOptions:
    _argument_group_name = "second stage"

    model_name_or_path: str = option("the model of the first stage", metavar="MODEL")
    photos_per_class: int | None = option("use at most N images of a class", None)
    partners: Count = option("partners of each image", 4)
    paste_share: Share = option("share of pairs whose objects are pasted onto other images", 0.4)
    decoder_inputs: str | None = option(
        "give the model a fresh decoder of this kind: paper, or common, which is trained on composites of two classes",
        None,
        choices=("paper", "common"),
    )
    decoder_rounds: int = option("of the kind common", 2, choices=(1, 2))
    group_size: Count = option("with the kind common: images in a group", 4)
    composite_share: Share = option("with the kind common: share of images that are composites", 0.45)
    rival_share: Share = option(
        "with the kind common: share of the other objects in composites that are of a class that looks alike", 0.0
    )
    train_encoder: bool = option(
        "with the kind common: the encoder learns too, its batch-norm statistics do not", False
    )
    encoder_learning_rate: Rate = option("of the encoder", 1e-4)
    freeze_fine_stages: bool = option(
        "with --train_encoder: what its stages of stride 8 and less are made of stays as it is, which saves time", False
    )
    feature_weight: Weight = option("with --train_encoder: of how far its features move, which matching needs", 0.0)
    pseudo_masks: str | None = option("take the pseudo-masks from this pseudo_masks.npz", None, metavar="FILE")
    mask_teacher: list[str] = field(
        default_factory=list,
        metadata={
            "help": "let this trained model make the pseudo-masks; several, with the kind common: their mean, without "
            "the images on which they disagree",
            "metavar": "MODEL",
        },
    )
    validation_masks: str | None = option("folder with images/<class> and masks/<class>", None, metavar="FOLDER")
    validation_per_class: Count = option("images of a class to validate on", 6)


@dataclass(kw_only=True)
class GroupOptions:
    _argument_group_name = "groups of images"

    model_name_or_path: str = option("the model to train further", metavar="MODEL")
    group_size: int = option("pairs or triplets of a class", 3, choices=(2, 3))
    photos_per_class: int | None = option("use at most N images of a class", None)
    smallest_crop: float = option("side of the smallest random crop; 1: no crops", 0.8)
    flip_probability: Share = option("of mirroring a whole group", 0.5)
    mirror_partners: bool = option("mirror the images of a group that face another way than its first one", False)
    photometric: bool = option("change colours, blur and noise at random", False)


@dataclass(kw_only=True)
class LossOptions:
    _argument_group_name = "losses (a weight of 0 turns a loss off)"

    benchmark_weights: str = option(
        "the paper's weights for this benchmark; each --lambda_ that is given wins over them",
        "pf-pascal",
        choices=tuple(BENCHMARK_WEIGHTS),
    )
    lambda_matching: float | None = option("weight of the matching loss (the paper's is 1)", None)
    lambda_cycle: float | None = option("weight of the forward-backward loss", None)
    lambda_trans: float | None = option("weight of the transitivity loss; needs triplets", None)
    lambda_contrast: float | None = option("weight of the contrastive loss", None)
    lambda_task: float | None = option("weight of the consistency between matches and masks", None)
    margin: float = option("m of the contrastive loss", 2.0)
    contrastive_form: str = option(
        "features: pooled features of whole images (stable); pixels: masked images as in the paper",
        "features",
        choices=CONTRASTIVE_FORMS,
    )
    perceptual_network: str = option("timm name of F, for the form pixels", "resnet50")
    cycle_unit: str = option("of the forward-backward and transitivity losses", "pixel", choices=UNITS)
    squared_norms: bool = option("square their norms, as the authors' code does", False)
    separate_streams: bool = option("no coupling: matching without masks, no consistency between the tasks", False)
    detach_masks: bool = option("keep the matching loss from training the decoder", False)
    synthetic_weight: Weight = option("weight of the first stage's loss on known warps of the same images", 0.0)
    prior_weight: Weight = option("weight of the masks' cross-entropy against pseudo-masks", 0.0)
    local_weight: Weight = option("weight of the distance to what local matching finds on the same pairs", 0.0)
    paste_share: Share = option("share of groups whose objects, by the pseudo-masks, are pasted onto other images", 0.0)
    pseudo_masks: str | None = option("take the pseudo-masks from this pseudo_masks.npz", None, metavar="FILE")
    mask_teacher: str | None = option("let this trained model make the pseudo-masks", None, metavar="MODEL")


@dataclass(kw_only=True)
class PartOptions:
    _argument_group_name = "what is trained"

    train_encoder: bool = option("its batch-norm statistics stay frozen", False)
    train_predictor: bool = option("the heads that predict transforms", True)
    train_decoder: bool = option("the decoder that predicts masks", True)
    encoder_learning_rate: Rate | None = option("default: --learning_rate", None)
    decoder_learning_rate: Rate = option("of the decoder", 1e-4)
    freeze_predictor_statistics: bool = option("keep the batch-norm statistics of the heads", True)
    freeze_decoder_statistics: bool = option("keep the batch-norm statistics of the decoder", False)
    cascade: str = option("exact: encode every warped image again", "features", choices=CASCADES)
    gradient_checkpointing: bool = option("less memory, more computing", False)
    channels_last: bool = option("memory layout of the images", True)
    torch_compile: bool = option("compile the parts of the network", False)


@dataclass(kw_only=True)
class ValidationOptions:
    _argument_group_name = "validation and sample images"

    validation_pairs: str | None = option("CSV of pairs with keypoints, to report PCK on", None, metavar="FILE")
    validation_masks: str | None = option("folder with images/<class> and masks/<class>", None, metavar="FOLDER")
    validation_per_class: Count = option("images of a class to validate on", 6)
    validation_groups: Count = option("held-out groups to judge by where no labels are given", 32)
    load_best_model_at_end: bool = option("the result is the best model instead of the last", False)
    sample_steps: Count | None = option("draw sample images every N steps", None)
    sample_groups: Count = option("groups on a sheet of samples", 4)


@dataclass(kw_only=True)
class TrainingSettings(DataOptions, OptimizationOptions, CheckpointOptions, ReportOptions):
    """What every training script takes.

    Raises:
        InputError: for a number that makes no sense.
    """

    def __post_init__(self) -> None:
        values = vars(self)
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for part in (hint, *get_args(hint)):  # the hint itself, or one side of `Count | None`
                if get_origin(part) is Annotated and values[name] is not None:
                    rule = get_args(part)[1]
                    if not _RULES[rule](values[name]):
                        raise InputError(f"--{name} must be {rule}.")
        if not 0 <= self.ema_decay < 1:
            raise InputError("--ema_decay must be at least 0 and less than 1.")

    def of_result(self) -> dict[str, Any]:
        """The settings that touch the result, which a run and its continuation share; see `FREE`."""
        return {name: value for name, value in vars(self).items() if name not in FREE}


@dataclass(kw_only=True)
class SyntheticSettings(TrainingSettings, SyntheticOptions, WarpRange):
    """Settings of `training/pretrain_synthetic.py`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_device_train_batch_size < 2 and self.background_swap > 0:
            raise InputError(
                "--background_swap takes the other background from the batch: use a batch of at least 2, or 0."
            )


def _check_pseudo_masks(file: str | None, teachers: Sequence[str]) -> None:
    if file is not None and not Path(file).is_file():
        raise InputError(f"There is no file {file} (--pseudo_masks).")
    if file is not None and teachers:
        raise InputError("--mask_teacher makes pseudo-masks, and does not go with --pseudo_masks.")


@dataclass(kw_only=True)
class DecoderSettings(TrainingSettings, DecoderOptions):
    """Settings of `training/warm_start_decoder.py`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise InputError("--group_size must be at least 2.")
        if self.feature_weight and not self.train_encoder:
            raise InputError("--feature_weight is of no use without --train_encoder.")
        if self.freeze_fine_stages and not self.train_encoder:
            raise InputError("--freeze_fine_stages is of no use without --train_encoder.")
        _check_pseudo_masks(self.pseudo_masks, self.teachers)

    @property
    def teachers(self) -> Sequence[str]:
        """The trained models that make the pseudo-masks."""
        return self.mask_teacher


@dataclass(kw_only=True)
class JointSettings(TrainingSettings, GroupOptions, LossOptions, PartOptions, ValidationOptions):
    """Settings of `training/train.py` and `macosnet adapt`."""

    learning_rate: Rate = 1e-5
    per_device_train_batch_size: Count = 8
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.photos_per_class is not None and self.photos_per_class < self.group_size:
            raise InputError(f"--photos_per_class must be at least {self.group_size}, the size of a group.")
        if not 0 < self.smallest_crop <= 1:
            raise InputError("--smallest_crop must lie in (0, 1].")
        if self.pseudo_masks is not None and not self.prior_weight:
            raise InputError("--pseudo_masks is of no use without --prior_weight.")
        if self.mask_teacher is not None and not self.prior_weight:
            raise InputError("--mask_teacher makes the masks of --prior_weight, and is of no use without it.")
        _check_pseudo_masks(self.pseudo_masks, self.teachers)
        self.loss_weights()

    @property
    def teachers(self) -> Sequence[str]:
        """The trained models that make the pseudo-masks: one or none."""
        return [self.mask_teacher] if self.mask_teacher else []

    def loss_weights(self) -> MaCoSNetLossWeights:
        """The benchmark's weights with the `--lambda_` that are given in their places.

        Raises:
            InputError: for a weight that makes no sense.
        """
        given = {
            "matching": self.lambda_matching,
            "cycle": self.lambda_cycle,
            "trans": self.lambda_trans,
            "contrast": self.lambda_contrast,
            "task": self.lambda_task,
        }
        if self.group_size == 2:
            if self.lambda_trans:
                raise InputError("--lambda_trans needs triplets: use --group_size 3.")
            given["trans"] = 0.0
        return MaCoSNetLossWeights.from_benchmark(
            self.benchmark_weights,
            margin=self.margin,
            contrastive_form=self.contrastive_form,
            unit=self.cycle_unit,
            squared=self.squared_norms,
            **{name: value for name, value in given.items() if value is not None},
        )

    def trained(self) -> tuple[str, ...]:
        """The parts of the network that learn."""
        parts = {"encoder": self.train_encoder, "predictor": self.train_predictor, "decoder": self.train_decoder}
        return tuple(name for name, learns in parts.items() if learns)

    def learning_rates(self) -> dict[str, float]:
        """Of each part."""
        return {
            "predictor": self.learning_rate,
            "encoder": self.encoder_learning_rate or self.learning_rate,
            "decoder": self.decoder_learning_rate,
        }

    def frozen_statistics(self) -> tuple[str, ...]:
        """The parts whose batch norms keep their statistics while they learn."""
        parts = {"predictor": self.freeze_predictor_statistics, "decoder": self.freeze_decoder_statistics}
        return tuple(name for name, frozen in parts.items() if frozen)


Settings = TypeVar("Settings", bound=TrainingSettings)


def parse_settings(
    kind: type[Settings], words: Sequence[str] | None = None, description: str | None = None
) -> Settings:
    """Settings from a command line on top of the YAML file that its `--config` names.

    Args:
        kind: the dataclass.
        words: the command line; by default that of this process.
        description: of the script, for `--help`.

    Raises:
        InputError: for a file that cannot be read; an unknown name, with the nearest known one; a value of the wrong
            type, with the one that is expected; a value that makes no sense.
    """
    words = list(sys.argv[1:] if words is None else words)
    parser = _parser(kind, description)
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(words)[0].config
    if config is not None:
        values = _read_config(config, parser)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    found, unknown = parser.parse_known_args(words)
    if unknown:
        raise InputError(f"There is no argument {unknown[0]}.{_hint(unknown[0].lstrip('-'), parser)}")
    return kind(**{name: value for name, value in vars(found).items() if name != "config"})


def read_settings(kind: type[Settings], config: str | Path, **values: Any) -> Settings:
    """Settings from a YAML file, with values that win over it; errors as [`parse_settings`]."""
    return kind(**{**_read_config(str(config), _parser(kind, None)), **values})


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Instead of two screens of usage."""
        raise InputError(f"The command line cannot be used: {message}; see --help.")


def _parser(kind: type[TrainingSettings], description: str | None) -> _Parser:
    """HfArgumentParser's reading of the groups of options, with `--no-NAME` for every flag and a shorter `--help`."""
    parser = _Parser(
        [base for base in kind.__mro__ if "_argument_group_name" in vars(base)],
        usage="%(prog)s [--config FILE] [options]",
        description=description,
        epilog="--no-NAME turns a flag off.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**{f.name: f.default for f in fields(kind) if f.default is not MISSING})
    for action in list(parser._actions):
        if action.dest == "help":
            continue
        if action.const is False:  # HfArgumentParser's --no_NAME of a flag that is on
            action.help = argparse.SUPPRESS
            continue
        if action.nargs == "?":  # a flag
            parser.add_argument(f"--no-{action.dest}", dest=action.dest, action="store_false", help=argparse.SUPPRESS)
            action.metavar = "true|false"
        elif action.nargs == "+" and not action.required:
            action.nargs = "*"
        if action.metavar is None and action.choices is None:
            metavars: dict[Any, str] = {int: "N", float: "X", str: "NAME"}
            action.metavar = metavars[action.type]
        if action.default not in (None, []) and action.default is not False:
            action.help = f"{action.help} (default {'true' if action.default is True else action.default})"
        action.option_strings = action.option_strings[:1]  # the spelling with dashes works, but is not listed
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line wins over it")
    return parser


class _FlatLoader(yaml.SafeLoader):
    """Refuses what settings do not need and a stranger's file may use: a few lines of aliases stand for any number of
    values, and thousands of levels end in a `RecursionError`."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read here", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > _MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem="there are too many levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # yaml's own, of a value that is not what its tag says: `!!int ""`, `!!bool maybe`, `!!timestamp soon`.
            raise yaml.MarkedYAMLError(problem="the value cannot be read", problem_mark=node.start_mark) from error

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 1 << 63:
            raise yaml.MarkedYAMLError(problem="the number is too large", problem_mark=node.start_mark)
        return value


_FlatLoader.add_constructor("tag:yaml.org,2002:int", _FlatLoader.construct_yaml_int)


def _read_config(path: str, parser: _Parser) -> dict[str, Any]:
    """The values of a YAML file, by name, as the command line would give them."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_TEXT + 1)
        if len(text) > _MOST_TEXT:
            raise ValueError(f"it is longer than {_MOST_TEXT} characters")
        values = yaml.load(text, _FlatLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"The configuration {path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise InputError(f"The configuration {path} holds no lines of the form `name: value`.")
    known = _options(parser)
    for key, value in values.items():
        if key not in known:
            raise InputError(f"The configuration {path} has an unknown key {key!r}.{_hint(str(key), parser)}")
        if value is not None:
            try:
                values[key] = _value(known[key], value)
            except ValueError as error:
                raise InputError(
                    f"The key {key!r} of the configuration {path} takes {_expected(known[key])}, not {value!r}."
                ) from error
    return {key: value for key, value in values.items() if value is not None}


def _options(parser: _Parser) -> dict[str, argparse.Action]:
    """By name; of a flag, the one that turns it on."""
    return {action.dest: action for action in reversed(parser._actions) if action.dest not in ("help", "config")}


def _value(action: argparse.Action, value: Any) -> Any:
    """A value of a YAML file in the option's type; a `ValueError` where it does not fit."""
    if action.nargs == "?":
        if not isinstance(value, bool):
            raise ValueError
        return value
    if action.nargs in ("+", "*"):
        return [_scalar(action, item) for item in (value if isinstance(value, list) else [value])]
    return _scalar(action, value)


def _scalar(action: argparse.Action, value: Any) -> Any:
    if value is False and action.choices and "no" in action.choices:  # YAML reads a bare `no` as false
        return "no"
    if value is None or isinstance(value, (bool, list, dict)):
        raise ValueError
    convert: Callable[[str], Any] = action.type  # type: ignore[assignment]  # always a type here
    found = convert(str(value))  # `1e-3` is text to YAML
    if action.choices is not None and found not in action.choices:
        raise ValueError
    return found


def _expected(action: argparse.Action) -> str:
    """What an option takes, in words."""
    if action.nargs == "?":
        return "true or false"
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    if action.nargs in ("+", "*"):
        return "one or several names"
    names: dict[Any, str] = {int: "a whole number", float: "a number", str: "text"}
    return names[action.type]


def _hint(name: str, parser: _Parser) -> str:
    known = _options(parser)
    close = difflib.get_close_matches(name.partition("=")[0].replace("-", "_"), known, n=1)
    return f" Is {close[0]} meant ({_expected(known[close[0]])})?" if close else ""
