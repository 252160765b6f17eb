"""The decoder that sees what images have in common: its cues against a slow reference, and the model around them."""

import math

import pytest
import torch
from small_models import small_config, small_model, small_processor

from macosnet_hf import InputError, MaCoSNetConfig, MaCoSNetForKeypointMatching
from macosnet_hf.collection import Collection
from macosnet_hf.common_object import CONTEXT_CHANNELS, CUES, centre_prior, common_context, object_weights, partner_cues


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-3)


def slow_cues(own, partner, weight):
    """The cues of every position in plain loops, float64: lists in the order of `CUES`."""
    own, partner, weight = own.double(), partner.double(), weight.double()
    (channels, height, width), places = (
        own.shape,
        [(y, x) for y in range(partner.shape[1]) for x in range(partner.shape[2])],
    )
    mine = [(y, x) for y in range(height) for x in range(width)]

    def cosine(p, q):
        return sum(float(own[c, p[0], p[1]]) * float(partner[c, q[0], q[1]]) for c in range(channels))

    table = {(p, q): cosine(p, q) for p in mine for q in places}
    strongest = {q: max(table[p, q] for p in mine) for q in places}

    def mean_of(share):
        total = [sum(share(q) * float(partner[c, q[0], q[1]]) for q in places) for c in range(channels)]
        length = math.sqrt(sum(value**2 for value in total))
        return [value / length for value in total]

    means = mean_of(lambda q: float(weight[q])), mean_of(lambda q: 1 - float(weight[q]))
    found = torch.zeros(len(CUES), height, width, dtype=torch.float64)
    for p in mine:
        values = [table[p, q] for q in places]
        best = sorted(values, reverse=True)[:5]
        on = sorted((table[p, q] * float(weight[q]) for q in places), reverse=True)[:5]
        off = sorted((table[p, q] * (1 - float(weight[q])) for q in places), reverse=True)[:5]

        def softly(sharpness, value, p=p, values=values):
            top = max(values)
            chances = [math.exp(sharpness * (table[p, q] - top)) for q in places]
            return sum(chance * value(q) for chance, q in zip(chances, places, strict=True)) / sum(chances)

        row = [
            best[0],
            sum(best) / 5,
            sum(on) / 5,
            sum(off) / 5,
            sum(on) / 5 - 0.5 * sum(off) / 5,
            softly(60, lambda q, p=p: math.exp(20 * (table[p, q] - strongest[q]))),
            softly(30, lambda q: float(weight[q])),
            *(sum(float(own[c, p[0], p[1]]) * mean[c] for c in range(channels)) for mean in means),
        ]
        found[:, p[0], p[1]] = torch.tensor(row, dtype=torch.float64)
    return found


def test_cues_are_those_of_a_slow_reference():
    own, partners = unit(2, 6, 3, 4), unit(2, 2, 6, 4, 3, seed=1)
    weights = torch.rand(2, 2, 4, 3, generator=torch.Generator().manual_seed(2))
    found = partner_cues(own, partners, weights)
    for b in range(2):
        for k in range(2):
            torch.testing.assert_close(
                found[b, k].double(), slow_cues(own[b], partners[b, k], weights[b, k]), atol=1e-5, rtol=1e-5
            )


def test_the_context_holds_mean_and_maximum_raw_and_standardised():
    own, partners = unit(2, 6, 3, 4), unit(2, 3, 6, 3, 4, seed=1)
    weights, mine = torch.rand(2, 3, 3, 4), torch.rand(2, 3, 4)
    context = common_context(own, partners, mine, weights)
    assert context.shape == (2, CONTEXT_CHANNELS, 3, 4)
    cues, count = partner_cues(own, partners, weights), len(CUES)
    torch.testing.assert_close(context[:, :count], cues.mean(1))
    torch.testing.assert_close(context[:, count : 2 * count], cues.amax(1))
    standardised = context[:, 2 * count : 4 * count]
    assert standardised.mean(dim=(2, 3)).abs().max() < 1e-5
    for b in range(2):
        for channel in range(2 * count):
            values = context[b, channel]
            expected = (values - values.mean()) / (values.std(correction=0) + 1e-3)
            torch.testing.assert_close(standardised[b, channel], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(context[:, -1], mine)


def test_absent_partners_do_not_count_and_their_order_does_not_matter():
    own, partners = unit(2, 6, 3, 3), unit(2, 3, 6, 3, 3, seed=1)
    weights, mine = torch.rand(2, 3, 3, 3), torch.rand(2, 3, 3)
    present = torch.tensor([[True, False, True], [True, True, True]])
    found = common_context(own, partners, mine, weights, present)
    alone = common_context(own[:1], partners[:1, [2, 0]], mine[:1], weights[:1, [2, 0]])
    torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[:1], common_context(own[:1], partners[:1], mine[:1], weights[:1]))


def test_a_partner_may_be_moved_about_without_changing_the_cues():
    """The cues say nothing of the partner's layout: any permutation of its positions gives the same."""
    own, partner = unit(1, 6, 3, 3), unit(1, 1, 6, 3, 3, seed=1)
    weights = torch.rand(1, 1, 3, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = partner.flatten(3)[..., order].unflatten(-1, (3, 3)), weights.flatten(2)[..., order].unflatten(-1, (3, 3))
    torch.testing.assert_close(partner_cues(own, partner, weights), partner_cues(own, *moved), atol=1e-5, rtol=1e-5)


def test_weights_of_positions_are_means_of_the_mask():
    masks = torch.rand(2, 48, 32)
    weights = object_weights(masks)
    assert weights.shape == (2, 3, 2)
    torch.testing.assert_close(weights[1, 2, 0], masks[1, 32:48, :16].mean())
    middle = centre_prior(15, 15)
    assert middle[7, 7] == 1
    assert middle.argmax() == 7 * 15 + 7
    assert middle[0, 0] < 0.01


def common_model(**settings):
    return small_model(MaCoSNetForKeypointMatching, decoder_inputs="common", decoder_input_width=8, **settings)


def pixels(model, count, seed=0):
    size = model.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rounds", [1, 2])
def test_masks_of_a_batch_are_those_of_each_pair(rounds):
    model = common_model(decoder_rounds=rounds)
    images = pixels(model, 6).unflatten(0, (3, 2))
    with torch.inference_mode():
        together = model.macosnet(images).mask_logits
        for row in range(3):
            alone = model.macosnet(images[row : row + 1]).mask_logits
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_the_mask_depends_on_the_partner_and_the_rounds():
    one, two = common_model(), common_model(decoder_rounds=2)
    two.load_state_dict(one.state_dict())
    images = pixels(one, 3)
    with torch.inference_mode():
        first, other = (one.macosnet(images[[0, k]][None]).mask_logits[0, 0] for k in (1, 2))
        again = two.macosnet(images[[0, 1]][None]).mask_logits[0, 0]
    assert not torch.allclose(first, other, atol=1e-4)
    assert not torch.allclose(first, again, atol=1e-4)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_collection_of_two_has_the_masks_of_the_pair(rounds):
    from PIL import Image

    model, processor = common_model(decoder_rounds=rounds), small_processor()
    draw = torch.Generator().manual_seed(5)
    images = [
        Image.fromarray(torch.randint(0, 256, (60, 80, 3), generator=draw).to(torch.uint8).numpy()) for _ in range(2)
    ]
    collection = Collection(model, processor)
    collection.add(images)
    found = collection.first_pass(propagate=False, common=torch.tensor([True, True])).masks
    with torch.inference_mode():
        expected = model(processor([images], return_tensors="pt")["pixel_values"]).mask_logits[0].sigmoid()
    torch.testing.assert_close(found.own, expected, atol=1e-4, rtol=1e-4)


def test_saving_and_loading_keeps_the_masks(tmp_path):
    model = common_model(decoder_rounds=2)
    model.save_pretrained(tmp_path)
    again = MaCoSNetForKeypointMatching.from_pretrained(tmp_path).eval()
    images = pixels(model, 2)[None]
    with torch.inference_mode():
        assert torch.equal(model(images).mask_logits, again(images).mask_logits)


@pytest.mark.parametrize("setting", [{"decoder_inputs": "both"}, {"decoder_rounds": 3}, {"decoder_input_width": 0}])
def test_wrong_settings_are_named(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        MaCoSNetConfig(**setting)


def test_the_paper_s_input_is_the_default():
    assert small_config().decoder_inputs == "paper"
    assert MaCoSNetConfig.from_preset("paper").decoder_inputs == "paper"
