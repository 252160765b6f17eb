"""The photos that the page offers as examples: files that are there without a download."""

from pathlib import Path

from gradio.media import MEDIA_ROOT

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of the Space

# Photos that come with gradio itself, and a cat of examples/README.md.
EXAMPLES_FOLDER = MEDIA_ROOT / "images"
CHEETAH, LION, TOWER = (str(EXAMPLES_FOLDER / name) for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg"))
CAT = str(ROOT / "examples" / "cat.jpg")
# A dog and its mirror image, which is found where photo B may be mirrored.
MIRRORED = (str(ROOT / "examples" / "dog.jpg"), str(ROOT / "examples" / "company" / "dog-mirrored.jpg"))
# The same photo in other company: a dog beside a cup.
COMPANY_FOLDER = ROOT / "examples" / "company"
DOG_AND_CUP, PARROT_AND_CUP = (str(COMPANY_FOLDER / f"{name}.jpg") for name in ("dog-and-cup", "parrot-and-cup"))
TABBY = str(ROOT / "examples" / "tabby.jpg")
LABELS: dict[tuple[str, str], str] = {
    (CHEETAH, CAT): "same kind",
    MIRRORED: "mirror image",
    (DOG_AND_CUP, TABBY): "with a cat",
    (DOG_AND_CUP, PARROT_AND_CUP): "with a cup",
    (LION, TOWER): "nothing shared",
}
"""What each pair shows."""
EXAMPLES = tuple(LABELS)
COLLECTION_EXAMPLE = (CHEETAH, LION, CAT, TOWER)
