"""A checkpoint whose encoder is an ONNX graph: written, used, refused, and left alone where it cannot serve."""

import copy
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import FUSED, IMAGE_SIZE, random_images, small_model

from macosnet_hf import CheckpointError, InputError, MaCoSNetForKeypointMatching, MaCoSNetImageProcessor, match_pair
from macosnet_hf.commands.main import main
from macosnet_hf.conversion.encoder_export import export_encoder
from macosnet_hf.io import encoder_graph
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.io.encoder_graph import ENCODER_GRAPH, open_graph, use_encoder_graph

PHOTOS = sorted((Path(__file__).parents[2] / "examples").glob("*.jpg"))

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra export",
)


def _photos(count: int) -> list[Image.Image]:
    """Crops of real photos."""
    draw = np.random.default_rng(0)
    images = [Image.open(path).convert("RGB") for path in PHOTOS]
    found = []
    for number in range(count):
        image = images[number % len(images)]
        left, top = (int(draw.integers(0, side // 2)) for side in image.size)
        found.append(image.crop((left, top, left + image.width // 2, top + image.height // 2)))
    return found


@pytest.fixture(scope="module")
def model():
    return small_model(MaCoSNetForKeypointMatching, mutual_fit=True, **FUSED)


@pytest.fixture(scope="module")
def processor():
    return MaCoSNetImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


@pytest.fixture(scope="module")
def folders(model, processor, tmp_path_factory):
    """Checkpoints with a graph in float32 and in 8-bit integers."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("float32", "int8")}
    written = export_encoder(model, processor, found["float32"])
    assert written.path == found["float32"] / ENCODER_GRAPH
    assert written.cosine > 0.99999
    assert export_encoder(model, processor, found["int8"], _photos(10)).cosine > 0.95
    for folder in found.values():
        assert not list(folder.glob("prepared*"))
    return found


def _used(model) -> bool:
    return isinstance(model.macosnet.encoder.backbone.forward, encoder_graph._GraphOrTorch)


@pytest.fixture
def watched(monkeypatch):
    """How often torch's backbone is asked."""
    asked = []
    serves = encoder_graph._GraphOrTorch._serves
    monkeypatch.setattr(
        encoder_graph._GraphOrTorch, "_serves", lambda self, pixels: asked.append(serves(self, pixels)) or asked[-1]
    )
    return asked


def test_float32_graph_gives_the_model_s_outputs(model, folders, watched):
    fast, _ = load_model_and_processor(folders["float32"], "cpu")
    assert _used(fast)
    pixels = random_images(3, 2)
    with torch.inference_mode():
        found, expected = fast(pixels), model(pixels)
    assert watched
    assert all(watched)
    for name in expected:
        assert torch.allclose(found[name].float(), expected[name].float(), atol=1e-3), name
    with torch.inference_mode():
        several, one = fast.macosnet.encoder(pixels[:, 0]), fast.macosnet.encoder(pixels[1:2, 0])
    assert torch.allclose(several.last[1:2], one.last, atol=1e-4)


def test_int8_graph_is_near_and_smaller(model, folders):
    fast, processor = load_model_and_processor(folders["int8"], "cpu")
    assert open_graph(folders["int8"] / ENCODER_GRAPH).get_modelmeta().custom_metadata_map["precision"] == "int8"
    pixels = processor([_photos(2)], return_tensors="pt")["pixel_values"][0]
    with torch.inference_mode():
        found, expected = fast.macosnet.encoder(pixels), model.macosnet.encoder(pixels)
    assert not torch.equal(found.last, expected.last)
    assert (found.normalized * expected.normalized).sum(1).mean() > 0.95
    assert [each.shape for each in found.skips] == [each.shape for each in expected.skips]


def test_pair_of_photos_is_matched_as_without_a_graph(model, processor, folders):
    fast, its_processor = load_model_and_processor(folders["float32"], "cpu")
    found = match_pair(PHOTOS[0], PHOTOS[1], model=fast, processor=its_processor)
    expected = match_pair(PHOTOS[0], PHOTOS[1], model=model, processor=processor)
    assert np.allclose(found.tps, expected.tps, atol=1e-3)
    assert (found.source_mask == expected.source_mask).mean() > 0.999


def test_torch_computes_where_the_graph_cannot_serve(model, folders, watched):
    fast, _ = load_model_and_processor(folders["float32"], "cpu")
    pixels = random_images(1, 2)[0]
    expected = model.macosnet.encoder(pixels)
    with torch.enable_grad():
        found = fast.macosnet.encoder(pixels.requires_grad_())
    assert torch.equal(found.last, expected.last)
    found.last.sum().backward()
    assert pixels.grad is not None
    with torch.inference_mode():
        half = copy.deepcopy(fast).to(torch.bfloat16).macosnet.encoder(pixels.detach().bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            fast.macosnet.encoder(pixels.detach())
        larger = fast.macosnet.encoder(torch.rand(1, 3, 2 * IMAGE_SIZE, IMAGE_SIZE))
    assert half.last.dtype == torch.bfloat16
    assert larger.last.shape[-2:] == (IMAGE_SIZE // 8, IMAGE_SIZE // 16)
    assert watched == [False] * 4


def test_copies_have_their_own_weights(folders):
    """A copy that computed with the weights of the first model in torch would train nothing."""
    fast, _ = load_model_and_processor(folders["float32"], "cpu")
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    pixels = random_images(1, 2)[0]
    assert other.macosnet.encoder(pixels).last.abs().max() == 0
    assert fast.macosnet.encoder(pixels).last.abs().max() > 0


def test_saved_again_it_has_its_weights(model, folders, tmp_path):
    fast, _ = load_model_and_processor(folders["int8"], "cpu")
    fast.save_pretrained(tmp_path)
    again = MaCoSNetForKeypointMatching.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_graph_of_another_encoder_is_refused(folders, processor, tmp_path):
    small_model(MaCoSNetForKeypointMatching, seed=1, **FUSED).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    shutil.copy(folders["float32"] / ENCODER_GRAPH, tmp_path)
    with pytest.raises(CheckpointError, match=r"not the graph of this model's encoder.*macosnet export --encoder"):
        load_model_and_processor(tmp_path, "cpu")


@pytest.mark.parametrize("content", [b"", b"no graph", None], ids=["empty", "text", "cut"])
def test_damaged_graph_is_refused(folders, tmp_path, content):
    shutil.copytree(folders["float32"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / ENCODER_GRAPH
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(CheckpointError, match=r"encoder\.onnx is damaged, or no ONNX graph"):
        load_model_and_processor(tmp_path, "cpu")


def test_graph_cannot_read_other_files(model, folders, tmp_path):
    """A graph may keep weights in files beside it, by a path; one that asks for such a file is refused."""
    import onnx

    shutil.copytree(folders["float32"], tmp_path, dirs_exist_ok=True)
    graph = onnx.load(tmp_path / ENCODER_GRAPH)
    onnx.save(graph, tmp_path / ENCODER_GRAPH, save_as_external_data=True, location="other.bin", size_threshold=0)
    assert (tmp_path / "other.bin").is_file()
    with pytest.raises(CheckpointError, match=r"encoder\.onnx"):
        load_model_and_processor(tmp_path, "cpu")


def test_without_onnxruntime_torch_computes(folders, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    fast, _ = load_model_and_processor(folders["float32"], "cpu")
    assert not _used(fast)
    assert not use_encoder_graph(fast.macosnet, folders["float32"] / "nowhere")


def test_too_few_images_are_refused(model, processor, tmp_path):
    with pytest.raises(InputError, match="8 images or more; got 3"):
        export_encoder(model, processor, tmp_path / "out", _photos(3))
    assert not (tmp_path / "out").exists()


def test_command_writes_a_checkpoint(folders, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(_photos(9)):
        image.save(photos / f"{number}.png")
    out = tmp_path / "out"
    words = ["export", str(out), "--encoder", "--int8", str(photos), "--model", str(folders["float32"])]
    assert main(words) == 0
    assert "cosine similarity" in capsys.readouterr().out
    assert _used(load_model_and_processor(out, "cpu")[0])
    assert main(["export", str(out), "--int8", str(photos)]) == 2
    assert "--int8 goes with --encoder" in capsys.readouterr().err
