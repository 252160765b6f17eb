"""Composites, groups of images, and the objective that teaches the decoder what they have in common."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import small_model

from macosnet_hf import DataError, InputError, MaCoSNetModel
from macosnet_hf.datasets.composites import compose, in_a_row, object_boxes, pasted, scattered, side_by_side
from macosnet_hf.training.common_masks import CommonObjective, CompositeGroups, dice_loss
from macosnet_hf.training.features import class_similarity
from macosnet_hf.training.loop import parameter_groups

COLOURS = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1), "cyan": (1, 2)}  # channels


class Images:
    """Images of five classes; each image holds a rectangle of its class's colour on noise."""

    def __init__(self, size=96, per_class=5):
        draw = np.random.default_rng(0)
        self.size, self.names = size, [name for name in COLOURS for _ in range(per_class)]
        self.pixels, self.masks = [], []
        for name in self.names:
            image = draw.integers(0, 60, (3, size, size), dtype=np.uint8)
            top, left = draw.integers(10, size // 2, 2)
            mask = np.zeros((size, size), bool)
            mask[top : top + 30, left : left + 24] = True
            for channel in COLOURS[name]:
                image[channel][mask] = 255
            self.pixels.append(torch.from_numpy(image))
            self.masks.append(torch.from_numpy(mask))
        self.masks = torch.stack(self.masks)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.pixels[index]

    def classes(self):
        return {name: [k for k, other in enumerate(self.names) if other == name] for name in dict.fromkeys(self.names)}

    def fingerprint(self):
        return "coloured rectangles"


def both_objects(count=12):
    images = Images()
    red, green = (torch.tensor([rows[k % 5] for k in range(count)]) for rows in list(images.classes().values())[:2])
    pixels = torch.stack(images.pixels).float() / 255
    return (pixels[red], images.masks[red].float()), (pixels[green], images.masks[green].float())


@pytest.mark.parametrize("make", ["side", "paste", "both"])
def test_a_mask_lies_on_its_object_and_on_nothing_else(make):
    first, second = both_objects()
    generator, backgrounds = torch.Generator().manual_seed(3), torch.zeros_like(first[0])
    if make == "side":
        made = side_by_side(first, second, generator)
    else:
        made = (pasted if make == "paste" else compose)(first, second, backgrounds, generator)
    red, green = made.images[:, 0], made.images[:, 1]
    for row in range(len(red)):
        own, beside = made.masks[row]
        for mask, colour, other in ((own, red[row], green[row]), (beside, green[row], red[row])):
            sure = mask > 0.95
            if not sure.any():  # the other object covers it, or the window shows none of it
                continue
            assert (colour - other)[sure].min() > 0.2, (make, row)
        unmasked = made.masks[row].sum(0) < 0.02
        strong = (red[row] > 0.8) ^ (green[row] > 0.8)
        assert float((strong & unmasked).sum()) < 0.02 * unmasked.numel()  # reflected borders may repeat a piece
    assert float(made.masks.prod(1).max()) < 0.6


@pytest.mark.parametrize("make", ["in a row", "scattered"])
def test_three_objects_share_an_image_in_every_order(make):
    first, second = both_objects(60)
    third = (first[0][:, [1, 2, 0]], first[1].flip(2))  # blue, and elsewhere
    objects, generator = (first, second, (third[0].flip(3), third[1])), torch.Generator().manual_seed(3)
    backgrounds = torch.zeros_like(first[0])
    made = in_a_row(objects, generator) if make == "in a row" else scattered(objects, backgrounds, generator)
    assert made.masks.shape == (60, 3, *first[0].shape[-2:])
    orders, seen = set(), 0
    for row, masks in enumerate(made.masks):
        for number, channel in enumerate((0, 1, 2)):
            sure = masks[number] > 0.95
            if not sure.any():
                continue
            seen += 1
            pixels = made.images[row][:, sure]
            assert (pixels[channel] - pixels[[k for k in range(3) if k != channel]].amax(0)).min() > 0.2, (make, row)
        if all(mask.gt(0.5).any() for mask in masks):
            centres, _ = object_boxes(masks)
            orders.add(tuple(centres[:, 0].argsort().tolist()))
    assert seen > 120
    assert len(orders) == 6


def test_composites_follow_the_seed_alone():
    first, second = both_objects(4)
    again = [
        compose(first, second, first[0].roll(1, 0), torch.Generator().manual_seed(seed)).images for seed in (1, 1, 2)
    ]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


def test_boxes_are_those_of_the_objects():
    masks = torch.zeros(2, 11, 21)
    masks[0, 3:6, 10:17] = 1
    centre, half = object_boxes(masks)
    # Columns 10 to 16 of 21 lie from 0 to 0.6, rows 3 to 5 of 11 from -0.4 to 0.
    torch.testing.assert_close(centre[0], torch.tensor([0.3, -0.2]))
    torch.testing.assert_close(half[0], torch.tensor([0.3, 0.2]))
    torch.testing.assert_close(torch.stack((centre[1], half[1])), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_groups_are_of_one_class_but_for_the_odd_ones():
    images = Images()
    groups = CompositeGroups(images, images.masks, length=300, seed=4)
    kinds = []
    for number in range(len(groups)):
        own, beside, common = groups.rows(number)
        names = [images.names[row] for row in own]
        kinds.append("".join("x" if belongs else "-" for belongs in common))
        assert len({name for name, belongs in zip(names, common, strict=True) if belongs}) <= 1
        assert not {images.names[row] for row in beside} & set(names)
        if not any(common):
            assert len(set(names)) == len(names)
        assert groups.rows(number) == (own, beside, common)
    shares = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    assert set(shares) == {"xxxx", "xxx-", "----"}
    assert 0.6 < shares["xxxx"] < 0.8
    assert min(shares["xxx-"], shares["----"]) > 0.08
    pixels, masks, common = groups[0]
    assert pixels.shape == (8, 3, 96, 96)
    assert masks.dtype == common.dtype == torch.bool


def test_one_class_or_a_group_of_one_is_refused():
    images = Images()
    images.names = ["red"] * len(images.names)
    with pytest.raises(DataError, match="two or more classes"):
        CompositeGroups(images, images.masks)
    with pytest.raises(InputError, match="two or more images"):
        CompositeGroups(Images(), Images().masks, group_size=1)


def test_dice_is_that_of_a_slow_reference():
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 20, 24, generator=draw)
    labels = (torch.rand(3, 20, 24, generator=draw) < 0.4).float()
    labels[2] = 0  # has no object and does not count
    total = 0.0
    for number in range(2):
        p, m = logits[number].double().sigmoid(), labels[number].double()
        both = sum(float(p[y, x] * m[y, x]) for y in range(20) for x in range(24))
        total += 1 - (2 * both + 1) / (float(p.sum()) + float(m.sum()) + 1)
    assert float(dice_loss(logits, labels)) == pytest.approx(total / 2, abs=1e-5)


def small_common_model(**settings):
    return small_model(MaCoSNetModel, decoder_inputs="common", decoder_input_width=16, **settings)


def batch_of(groups, numbers):
    return tuple(torch.stack(parts) for parts in zip(*(groups[number] for number in numbers), strict=True))


def test_only_the_decoder_learns_and_it_learns_to_follow_the_partners():
    images = Images()
    model = small_common_model(decoder_rounds=2)
    before = copy.deepcopy(model.state_dict())
    objective = CommonObjective(model, [0.5] * 3, [0.5] * 3)
    groups = CompositeGroups(images, images.masks, length=200)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-2)
    objective.train()
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(30):
        loss = objective(batch_of(groups, range(4 * step, 4 * step + 4)), generator)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    for name, value in model.state_dict().items():
        assert name.startswith("decoder.") or torch.equal(value, before[name]), name


def test_the_encoder_learns_and_its_features_are_held():
    """The weight of the distance holds them; the distance is that of a slow reference."""
    images = Images()
    groups = CompositeGroups(images, images.masks, length=50)
    moved = {}
    for weight in (0.0, 10.0):
        model = small_common_model()
        first = copy.deepcopy(model.encoder)
        options = {"trained": ("encoder", "decoder"), "feature_weight": weight}
        objective = CommonObjective(model, [0.5] * 3, [0.5] * 3, **options).train()
        heads = copy.deepcopy(model.affine_head.state_dict())
        statistics = [buffer.clone() for buffer in model.encoder.buffers()]
        optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=1e-3)
        for step in range(8):
            losses = objective(batch_of(groups, range(2 * step, 2 * step + 2)), torch.Generator().manual_seed(step))
            assert ("moved" in losses) == bool(weight)
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
        assert all(torch.equal(model.affine_head.state_dict()[name], value) for name, value in heads.items())
        assert all(torch.equal(a, b) for a, b in zip(statistics, model.encoder.buffers(), strict=True))
        pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            now, then = model.encoder(pixels), first(pixels)
        cells = list(zip(now.last.double(), then.last.double(), strict=True))
        cosines = [
            float(a[:, y, x] @ b[:, y, x] / (a[:, y, x].norm() * b[:, y, x].norm()))
            for a, b in cells
            for y in range(a.shape[1])
            for x in range(a.shape[2])
        ]
        moved[weight] = 1 - np.mean(cosines)
        if weight:
            assert float(objective._moved(now, pixels, every=1)) == pytest.approx(moved[weight], abs=1e-5)
            first_image = 1 - np.mean(cosines[: len(cosines) // 2])
            assert float(objective._moved(now, pixels, every=2)) == pytest.approx(first_image, abs=1e-5)
    assert moved[0.0] > 1e-5
    assert moved[10.0] < 0.5 * moved[0.0]


@pytest.mark.parametrize("training", [False, True])
def test_fine_stages_can_stay(training):
    """What the skip connections depend on keeps its weights, the rest of the encoder learns."""
    images = Images()
    groups = CompositeGroups(images, images.masks, length=50)
    model = small_common_model().train(training)
    before = copy.deepcopy(model.encoder.state_dict())
    objective = CommonObjective(
        model, [0.5] * 3, [0.5] * 3, trained=("encoder", "decoder"), freeze_fine_stages=True
    ).train()
    assert all(torch.equal(before[name], value) for name, value in model.encoder.state_dict().items())
    (group,) = parameter_groups(objective, {"encoder": 1e-3})
    assert 0 < len(group.parameters) < len(list(model.encoder.parameters()))
    optimizer = torch.optim.AdamW(group.parameters, lr=1e-3)
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        then = model.encoder(pixels)
    objective(batch_of(groups, range(2)), torch.Generator().manual_seed(0))["total"].backward()
    optimizer.step()
    with torch.no_grad():
        now = model.encoder(pixels)
    assert then.skips
    assert all(torch.equal(a, b) for a, b in zip(then.skips, now.skips, strict=True))
    assert not torch.equal(then.last, now.last)


def test_the_others_are_rivals_where_they_are_wanted():
    images = Images()
    draw = torch.Generator().manual_seed(2)
    alike = torch.rand(5, 5, generator=draw)
    alike = alike + alike.t()
    classes = list(images.classes().values())
    number_of = {row: number for number, rows in enumerate(classes) for row in rows}
    met = {share: [] for share in (0.0, 1.0)}
    for share, found in met.items():
        groups = CompositeGroups(images, images.masks, length=60, alike=alike, rival_share=share)
        groups_again = CompositeGroups(images, images.masks, length=60, alike=alike, rival_share=share)
        for number in range(60):
            own, beside, common = groups.rows(number)
            assert (own, beside, common) == groups_again.rows(number)
            if all(common):
                chosen = number_of[own[0]]
                ranks = sorted((k for k in range(5) if k != chosen), key=lambda k: -float(alike[chosen, k]))
                assert groups.rivals[chosen].tolist() == ranks
                found.extend(ranks.index(number_of[row]) for row in beside)
    assert set(met[0.0]) == {0, 1, 2, 3}
    with pytest.raises(InputError, match="how much the classes look alike"):
        CompositeGroups(images, images.masks, rival_share=0.5)


def test_rivals_are_the_nearest_classes_of_many():
    images = Images(per_class=2)
    images.names = [f"class {k // 2}" for k in range(20)]
    images.pixels, images.masks = images.pixels * 2, images.masks.repeat(2, 1, 1)
    alike = -(torch.arange(10)[:, None] - torch.arange(10)).abs().float()  # neighbours by number
    groups = CompositeGroups(images, images.masks, length=200, alike=alike, rival_share=1.0)
    for number in range(200):
        own, beside, common = groups.rows(number)
        if all(common):
            assert all(abs(row // 2 - own[0] // 2) <= 6 for row in beside)
    far = CompositeGroups(images, images.masks, length=200, alike=alike, rival_share=0.0)
    assert any(abs(row // 2 - far.rows(k)[0][0] // 2) > 6 for k in range(200) for row in far.rows(k)[1])


def test_images_without_a_pseudo_mask_are_left_out():
    images = Images()
    masks = images.masks.clone()
    empty = [0, 3, 7]
    masks[empty] = False
    masks[10:15] = False  # a whole class
    groups = CompositeGroups(images, masks, length=200)
    drawn = {row for number in range(200) for part in groups.rows(number)[:2] for row in part}
    assert drawn == set(range(25)) - set(empty)


def test_similarity_of_classes_is_that_of_their_objects():
    """Against loops in float64 over cells, images and classes."""
    images = Images()
    images.batch = lambda rows: torch.stack([images[row] for row in rows])
    model = small_common_model().eval()
    size = model.config.image_size
    processor = SimpleNamespace(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    images.masks[[3, 7, 8]] = False  # images on which the models that made the masks disagreed
    found = class_similarity(model, processor, images, images.masks)
    means = []
    for row in range(len(images)):
        pixels = F.interpolate(images[row][None].float() / 255, size=(size, size), mode="bilinear", align_corners=False)
        pixels = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
            1, 3, 1, 1
        )
        with torch.no_grad():
            maps = model.encoder(pixels).normalized[0].double().numpy()
        side = maps.shape[-1]
        step = images.size / side
        total = np.zeros(len(maps))
        for y in range(side):
            for x in range(side):
                rows, columns = (slice(math.floor(k * step), math.ceil((k + 1) * step)) for k in (y, x))
                total += maps[:, y, x] * images.masks[row][rows, columns].double().mean().item()
        means.append(total / np.linalg.norm(total) if total.any() else None)
    members = images.classes().values()
    classes = [np.mean([means[row] for row in rows if means[row] is not None], axis=0) for rows in members]
    middle = np.mean(classes, axis=0)
    for i, one in enumerate(classes):
        for j, other in enumerate(classes):
            a, b = one - middle, other - middle
            assert float(found[i, j]) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-3)


def test_members_that_do_not_belong_are_taught_an_empty_mask():
    images = Images()
    objective = CommonObjective(small_common_model(), [0.5] * 3, [0.5] * 3)
    groups = CompositeGroups(images, images.masks, length=100)
    odd = next(number for number in range(100) if groups.rows(number)[2] == [True, True, True, False])
    _, labels = objective.make_images(batch_of(groups, [odd, odd]), torch.Generator().manual_seed(0))
    areas = labels.unflatten(0, (2, 4)).mean(dim=(2, 3))
    assert areas[:, :3].min() > 0
    assert areas[:, 3].max() == 0


def test_every_member_has_a_partner_of_its_own_group_that_counts():
    common = torch.ones(5, 4, dtype=torch.bool)
    common[1, 3], common[2] = False, False
    partners, present = CommonObjective._choose_partners(common, torch.Generator().manual_seed(0))
    belongs = common.flatten()[partners]
    assert ((belongs & present).any(dim=1) == belongs.any(dim=1)).all()
    assert present.any(dim=1).all()
    assert not present.all()
    rows = torch.arange(20).unsqueeze(1)
    assert torch.equal(partners // 4, (rows // 4).expand_as(partners))
    assert (partners != rows).all()
    assert all(len(set(row)) == 3 for row in partners.tolist())


def test_the_paper_s_decoder_is_refused():
    with pytest.raises(InputError, match="decoder_inputs"):
        CommonObjective(small_model(MaCoSNetModel), [0.5] * 3, [0.5] * 3)
