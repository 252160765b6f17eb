"""Second stage: the decoder gets a sensible start from masks that nobody drew (see `pseudo_masks.py`).

    accelerate launch training/warm_start_decoder.py --model_name_or_path OUT_OF_STAGE_1 --dataset_name PHOTOS
    --output_dir OUT

Needs photographs in class folders. Encoder and predictor stay as they are; the decoder learns the pseudo-masks by
cross-entropy, each photograph together with a partner of its class. The pseudo-masks are kept in the output folder.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    add_common_arguments,
    check_enough,
    make_accelerator,
    parse_with_config,
    run_script,
    save_model,
    train,
)
from photos import Photographs
from pseudo_masks import pseudo_masks
from synthetic import photometric, random_view
from torch import Tensor, nn
from torch.utils.data import Dataset

from macosnet_hf import MaCoSNetImageProcessor
from macosnet_hf.errors import DataError, InputError, MaCoSNetError
from macosnet_hf.geometry import sampling_grid, warp
from macosnet_hf.image_io import load_image
from macosnet_hf.loading import load_model_and_processor
from macosnet_hf.modeling_macosnet import MaCoSNetModel, correlate


def class_pairs(photographs: Photographs, partners: int, seed: int) -> list[tuple[int, int]]:
    """Each photograph beside up to `partners` others of its class, chosen once by the seed.

    Raises:
        DataError: if a class has a single photograph.
        InputError: if `partners` is not positive.
    """
    generator = torch.Generator().manual_seed(seed)
    if partners < 1:
        raise InputError("--partners must be at least 1.")
    pairs: list[tuple[int, int]] = []
    for name, members in photographs.classes().items():
        if len(members) < 2:
            raise DataError(
                f"The class {name!r} has one photograph, and a pair takes two: add some, or pass --exclude_classes."
            )
        for index in members:
            others = [member for member in members if member != index]
            chosen = torch.randperm(len(others), generator=generator)[:partners].tolist()
            pairs += [(index, others[k]) for k in chosen]
    return pairs


class MaskedPairs(Dataset):
    """Pairs of photographs with their pseudo-masks."""

    def __init__(self, photographs: Photographs, masks: Tensor, pairs: list[tuple[int, int]]):
        self.photographs, self.masks, self.pairs = photographs, masks, pairs

    def fingerprint(self) -> str:
        """Of photographs and masks; the pairs follow from the photographs and the settings."""
        masks = hashlib.sha256(np.packbits(self.masks.numpy()).tobytes()).hexdigest()[:16]
        return f"{self.photographs.fingerprint()}, masks {masks}"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """uint8 pictures `(2, 3, S, S)` and masks `(2, S, S)`."""
        pair = list(self.pairs[number])
        return torch.stack([self.photographs[index] for index in pair]), self.masks[pair]


class DecoderObjective(nn.Module):
    """Cross-entropy of the decoder against pseudo-masks, under random crops, flips and photometric changes."""

    def __init__(self, model: MaCoSNetModel, mean: list[float], std: list[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        model.requires_grad_(False)
        model.decoder.requires_grad_(True)

    def train(self, mode: bool = True) -> DecoderObjective:
        """Encoder and predictor keep their statistics."""
        super().train(mode)
        for part in (self.model.encoder, self.model.affine_head, self.model.tps_head):
            part.eval()
        return self

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """uint8 `(B, 2, 3, S, S)` pictures and bool `(B, 2, S, S)` masks to the loss."""
        size = self.model.config.image_size
        with torch.no_grad():
            pictures, masks = batch[0].flatten(0, 1).float() / 255, batch[1].flatten(0, 1).float()
            grid = sampling_grid(random_view(len(pictures), generator, pictures.device), size=(size, size))
            pixels = photometric(warp(pictures, grid, padding_mode="reflection"), generator)
            labels = warp(masks[:, None], grid, padding_mode="reflection")[:, 0]
            features = self.model.encoder(((pixels - self.mean) / self.std).to(memory_format=torch.channels_last))
            partner = features.normalized.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            correlation = correlate(partner, features.normalized)
        logits = self.model.predict_masks(features, correlation).float()
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return {"total": loss, "area": logits.detach().sigmoid().mean()}


def mask_validation(
    folder: str, processor: MaCoSNetImageProcessor, per_class: int
) -> Callable[[nn.Module, int], dict[str, float]]:
    """J and P of soft masks (threshold 0.5, no refinement) on `images/<class>/*` with `masks/<class>/*.png`.

    Raises:
        DataError: if the folder or one of its files cannot be used.
    """
    groups: list[tuple[Tensor, list[np.ndarray]]] = []
    try:
        for class_folder in sorted((Path(folder) / "images").iterdir()):
            paths = sorted(class_folder.iterdir())[:per_class]
            pixels = processor.preprocess_views([load_image(path) for path in paths], return_tensors="pt")
            drawn = [Path(folder) / "masks" / class_folder.name / f"{path.stem}.png" for path in paths]
            truth = [np.array(load_image(path).convert("L")) > 127 for path in drawn]
            groups.append((pixels["pixel_values"], truth))
    except (OSError, MaCoSNetError) as error:
        raise DataError(f"--validation_masks {folder} cannot be used: {error}") from error
    if not groups:
        raise DataError(f"--validation_masks {folder} holds no classes.")

    @torch.no_grad()
    def validate(objective: nn.Module, step: int) -> dict[str, float]:
        jaccard, precision, area = [], [], []
        model = objective.model
        for pixels, drawn in groups:
            features = model.get_image_features(pixels.to(model.device))
            correlation = correlate(features.normalized.roll(1, dims=0), features.normalized)
            soft = model.predict_masks(features, correlation).float().sigmoid()
            for found, truth in zip(soft, drawn, strict=True):
                full = F.interpolate(found[None, None], size=truth.shape, mode="bilinear", align_corners=True)[0, 0]
                mask = full.cpu().numpy() >= 0.5
                jaccard.append((mask & truth).sum() / max(1, (mask | truth).sum()))
                precision.append((mask == truth).mean())
                area.append(mask.mean())
        return {
            "jaccard": float(np.mean(jaccard)),
            "precision": float(np.mean(precision)),
            "area": float(np.mean(area)),
        }

    return validate


def encode_all(model: MaCoSNetModel, photographs: Photographs, mean: list[float], std: list[float]) -> Tensor:
    """Stride-16 features of all photographs, `(N, C, h, w)` float32 on the CPU."""
    size = model.config.image_size
    centre, spread = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(photographs), 16):
            stop = min(start + 16, len(photographs))
            pictures = torch.stack([photographs[index] for index in range(start, stop)]).float() / 255
            pictures = F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=True)
            parts.append(model.get_image_features(((pictures - centre) / spread).to(model.device)).last.float().cpu())
    return torch.cat(parts).clone()


def save_masks(path: Path, masks: Tensor, fingerprint: str) -> None:
    """Packs bool masks `(N, S, S)` into a file that is there as a whole or not at all."""
    partial = path.with_name(f"partial-{path.name}")
    np.savez_compressed(partial, masks=np.packbits(masks.numpy()), shape=masks.shape, photographs=fingerprint)
    partial.rename(path)


def load_masks(path: Path, fingerprint: str) -> Tensor | None:
    """What [`save_masks`] wrote; `None` if there is nothing, or it is of other photographs."""
    if not path.is_file():
        return None
    with np.load(path) as saved:
        if str(saved["photographs"]) != fingerprint:
            return None
        shape = tuple(saved["shape"].tolist())
        return torch.from_numpy(np.unpackbits(saved["masks"], count=int(np.prod(shape))).reshape(shape).astype(bool))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_common_arguments(parser)
    parser.add_argument("--model_name_or_path", required=True, help="the model of the first stage")
    parser.add_argument("--photo_size", type=int, default=256)
    parser.add_argument("--photos_per_class", type=int, default=None, help="use at most so many photographs of a class")
    parser.add_argument("--partners", type=int, default=4, help="partners of each photograph")
    parser.add_argument("--validation_masks", default=None, help="folder with images/<class> and masks/<class>")
    parser.add_argument("--validation_per_class", type=int, default=6)
    return parse_with_config(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    accelerator = make_accelerator(args)
    photographs = Photographs(
        args.dataset_name,
        args.photo_size,
        exclude=tuple(args.exclude_classes),
        limit=args.photos_per_class,
        streaming=args.streaming,
    )
    pairs = class_pairs(photographs, args.partners, args.seed)
    check_enough(len(pairs), args, accelerator, "pairs")
    model, processor = load_model_and_processor(args.model_name_or_path, accelerator.device)
    mean, std = list(processor.image_mean), list(processor.image_std)
    validate = (
        mask_validation(args.validation_masks, processor, args.validation_per_class) if args.validation_masks else None
    )
    photographs.keep_in_memory(quiet=not accelerator.is_main_process)
    # Made once, on the first process, and kept for a resumed run: they must not change between the two.
    path = Path(args.output_dir) / "pseudo_masks.npz"
    with accelerator.main_process_first():
        others_made = args.resume_from_checkpoint or not accelerator.is_main_process
        masks = load_masks(path, photographs.fingerprint()) if others_made else None
        if masks is None:
            pictures = torch.stack([photographs[index] for index in range(len(photographs))])
            features = encode_all(model.macosnet, photographs, mean, std)
            masks = pseudo_masks(pictures, features, photographs.class_names)
            del pictures, features
            if accelerator.is_main_process:
                save_masks(path, masks, photographs.fingerprint())
    dataset = MaskedPairs(photographs, masks, pairs)
    trained = train(accelerator, DecoderObjective(model.macosnet, mean, std), dataset, args, validate=validate)
    model.macosnet.load_state_dict(trained.model.state_dict())
    save_model(accelerator, args, model, processor)
    return 0


if __name__ == "__main__":
    run_script(main)
