"""The photos that the page offers as examples: free ones of `examples/`, see its README.md."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of the Space
EXAMPLES_FOLDER = ROOT / "examples"
CAT, DOG, TABBY, CUP = (str(EXAMPLES_FOLDER / f"{name}.jpg") for name in ("cat", "dog", "tabby", "cup"))
CAR = str(EXAMPLES_FOLDER / "company" / "car.jpg")
# A dog and its mirror image, which is found where photo B may be mirrored.
MIRRORED = (DOG, str(EXAMPLES_FOLDER / "company" / "dog-mirrored.jpg"))
# The same photo in other company: a dog beside a cup.
DOG_AND_CUP, PARROT_AND_CUP = (
    str(EXAMPLES_FOLDER / "company" / f"{name}.jpg") for name in ("dog-and-cup", "parrot-and-cup")
)
LABELS: dict[tuple[str, str], str] = {
    (DOG, CAT): "two heads",
    MIRRORED: "mirror image",
    (DOG_AND_CUP, TABBY): "with a cat",
    (DOG_AND_CUP, PARROT_AND_CUP): "with a cup",
    (CAT, CAR): "nothing shared",
}
"""What each pair shows."""
EXAMPLES = tuple(LABELS)
COLLECTION_EXAMPLE = (DOG, CAT, TABBY, CUP)
