"""Makes the installed classes known to transformers' auto classes, so that they need no `trust_remote_code`."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForKeypointMatching

from .configuration_macosnet import MaCoSNetConfig
from .image_processing_macosnet import MaCoSNetImageProcessor
from .modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel


def register_auto_classes() -> None:
    """Registers configuration, models and image processor; calling it again changes nothing."""
    AutoConfig.register(MaCoSNetConfig.model_type, MaCoSNetConfig, exist_ok=True)
    AutoModel.register(MaCoSNetConfig, MaCoSNetModel, exist_ok=True)
    AutoModelForKeypointMatching.register(MaCoSNetConfig, MaCoSNetForKeypointMatching, exist_ok=True)
    AutoImageProcessor.register(
        MaCoSNetConfig,
        # One class serves both of the library's back ends, whichever of them a caller's environment prefers.
        image_processor_classes={"pil": MaCoSNetImageProcessor, "torchvision": MaCoSNetImageProcessor},
        exist_ok=True,
    )
