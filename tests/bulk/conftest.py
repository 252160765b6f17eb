"""Images, networks and results that the tests of bulk runs share."""

import pytest
import torch
from small_models import save_small_checkpoint

datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra `train`)")

from bulk_runs import make_images, settings_of  # noqa: E402

from macosnet_hf.bulk.run import segment_dataset  # noqa: E402
from macosnet_hf.io.checkpoints import load_model_and_processor  # noqa: E402
from macosnet_hf.io.weights import weights_digest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def network(model):
    loaded, processor = load_model_and_processor(model, "cpu")
    return {"model": loaded, "processor": processor}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "animals")


@pytest.fixture(scope="module")
def whole(images, network, tmp_path_factory):
    """The results of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    digest = weights_digest(network["model"])
    report = segment_dataset(settings_of(images, model="small", weights=digest), folder, **network)
    assert report == (13, 0, (13, 2))
    return folder


@pytest.fixture(scope="module")
def parquet(images, tmp_path_factory):
    """The same images inside three Parquet files, with other names of the columns, and a row without an image."""
    folder = tmp_path_factory.mktemp("parquet") / "rows"
    (folder / "data").mkdir(parents=True)
    names = datasets.ClassLabel(names=["ant", "cup", "dog"])
    kinds = datasets.Features({"photo": datasets.Image(), "kind": names, "name": datasets.Value("string")})
    paths = sorted(images.glob("*/*.png"))
    rows = [
        {"photo": {"bytes": path.read_bytes(), "path": path.name}, "kind": path.parent.name, "name": path.stem}
        for path in paths
    ]
    rows.append({"photo": None, "kind": None, "name": "nothing"})
    for number in range(3):
        some = datasets.Dataset.from_list(rows[5 * number : 5 * number + 5], features=kinds)
        some.to_parquet(folder / "data" / f"train-{number}.parquet")
    return folder
