"""Makes the installed classes known to transformers, so that they need no `trust_remote_code`."""

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForKeypointMatching
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.keypoint_matching import KeypointMatchingPipeline

from ..configuration_macosnet import MaCoSNetConfig
from ..image_processing_macosnet import MaCoSNetImageProcessor
from ..modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel, MaCoSNetPreTrainedModel
from ..pipeline_macosnet import MaCoSNetCosegmentationPipeline, MaCoSNetKeypointMatchingPipeline


class _KeypointMatchingPipelineOfTheModel(KeypointMatchingPipeline):
    """Our pipeline for our models; every other model keeps the library's."""

    _load_video_processor = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        ours = isinstance(model, MaCoSNetPreTrainedModel)
        return (MaCoSNetKeypointMatchingPipeline if ours else KeypointMatchingPipeline)(*args, **kwargs)


def register_auto_classes() -> None:
    """Registers configuration, models, image processor and pipelines; calling it again changes nothing."""
    AutoConfig.register(MaCoSNetConfig.model_type, MaCoSNetConfig, exist_ok=True)
    AutoModel.register(MaCoSNetConfig, MaCoSNetModel, exist_ok=True)
    AutoModelForKeypointMatching.register(MaCoSNetConfig, MaCoSNetForKeypointMatching, exist_ok=True)
    AutoImageProcessor.register(
        MaCoSNetConfig,
        # One class serves both of the library's back ends, whichever of them a caller's environment prefers.
        image_processor_classes={"pil": MaCoSNetImageProcessor, "torchvision": MaCoSNetImageProcessor},
        exist_ok=True,
    )
    # Not `register_pipeline`, which warns about every task that is there already.
    tasks = PIPELINE_REGISTRY.supported_tasks
    tasks["keypoint-matching"] = {**tasks["keypoint-matching"], "impl": _KeypointMatchingPipelineOfTheModel}
    tasks["image-co-segmentation"] = {
        "impl": MaCoSNetCosegmentationPipeline,
        "pt": (AutoModelForKeypointMatching,),
        "type": "image",
    }
