"""The checkpoints that come with the package, by name."""

import os

import numpy as np
import pytest

from macosnet_hf import DEFAULT_CHECKPOINT, CheckpointError, load_image
from macosnet_hf.collection import Collection
from macosnet_hf.io.checkpoints import check_checkpoint, load_model_and_processor
from macosnet_hf.io.package import EMBEDDED, checkpoint_name


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_checkpoint_is_found_by_its_name(name):
    check_checkpoint(name)
    assert os.path.isfile(os.path.join(EMBEDDED[name], "README.md"))
    assert checkpoint_name(name) == checkpoint_name(EMBEDDED[name]) == f"macosnet-{name}"


@pytest.mark.parametrize(("typed", "meant"), [("bse", "base"), ("litte", "lite")])
def test_a_mistyped_name_is_answered_with_the_nearest_one(typed, meant):
    with pytest.raises(CheckpointError, match=f"is '{meant}' meant"):
        check_checkpoint(typed)


def test_names_that_are_unlike_may_be_repositories_of_the_hub():
    check_checkpoint("somebody/lite")
    check_checkpoint("gpt2")


def test_a_checkpoint_has_the_modules_that_the_package_has():
    links = [{file for file in os.listdir(folder) if file.endswith(".py")} for folder in EMBEDDED.values()]
    assert all(each == links[0] for each in links)


def test_the_default_is_lite():
    assert EMBEDDED["lite"] == DEFAULT_CHECKPOINT


@pytest.mark.slow
def test_masks_follow_the_partners():
    """One image in two companies: beside others of its kind the object is there, beside strangers it is not."""
    gradio = pytest.importorskip("gradio")
    images = os.path.join(os.path.dirname(gradio.__file__), "media_assets", "images")
    lion, others, strangers = "lion.jpg", ("cheetah1.jpg", "cheetah.jpg"), ("tower.jpg", "bus.png")
    model, processor = load_model_and_processor("lite", "cpu")

    def area(company):
        collection = Collection(model, processor)
        collection.add([load_image(os.path.join(images, name)) for name in (lion, *company)])
        numbers = range(len(collection))
        masks = collection.decoder_masks([[other for other in numbers if other != number] for number in numbers])
        return float(np.mean(masks[0].numpy() >= 0.5))

    assert area(others) > 0.3
    assert area(strangers) < 0.5 * area(others)
