"""The photos that the page offers as examples: files that are there without a download."""

from pathlib import Path

from gradio.media import MEDIA_ROOT

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of the Space

# Photos that come with gradio itself, and a cat of examples/README.md.
EXAMPLES_FOLDER = MEDIA_ROOT / "images"
CHEETAH, LION, TOWER = (str(EXAMPLES_FOLDER / name) for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg"))
CAT = str(ROOT / "examples" / "cat.jpg")
EXAMPLES = ((CHEETAH, CAT), (CHEETAH, LION), (LION, TOWER))
# The same photo in other company: a dog beside a cup, for a checkpoint whose masks follow the partner.
COMPANY_FOLDER = ROOT / "examples" / "company"
DOG_AND_CUP, PARROT_AND_CUP = (str(COMPANY_FOLDER / f"{name}.jpg") for name in ("dog-and-cup", "parrot-and-cup"))
TABBY = str(ROOT / "examples" / "tabby.jpg")
COMPANY_EXAMPLES = ((DOG_AND_CUP, TABBY), (DOG_AND_CUP, PARROT_AND_CUP))
COLLECTION_EXAMPLE = (CHEETAH, LION, CAT, TOWER)


def pair_examples(model: str) -> list[list[str]]:
    """Pairs that the page offers with the checkpoint of that name."""
    offered = EXAMPLES + (COMPANY_EXAMPLES if model == "macosnet-common" else ())
    return [list(pair) for pair in offered]
