"""Saving a model so that its folder serves every auto class, and is never half of one model and half of another.

The module travels with the model to the Hub.
"""

from __future__ import annotations

import copy
import os
import shutil
from typing import Any

from transformers import PreTrainedModel


class AtomicSaving(PreTrainedModel):
    """A model whose folder is written whole, and loads with every auto class of ours and with `pipeline`."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder serves every auto class of ours, whichever class is saved.

        Over an older model, the new one is written as a whole first and its weights take their name last: a run that
        is killed leaves the older model, the new one, or none that loads, never the weights of one with the
        settings of the other. (Not with `push_to_hub`, which transformers does from the folder itself.)
        """
        # By default transformers writes the weights of some encoders (DINOv2's) under names of older versions.
        kwargs.setdefault("save_original_format", False)
        # A class has one `_auto_class`, and transformers writes only that of the class that it saves.
        module = "modeling_macosnet"
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModel": f"{module}.MaCoSNetModel",
            "AutoModelForKeypointMatching": f"{module}.MaCoSNetForKeypointMatching",
        }
        # Because this file imports it, the pipelines' file is copied with the model's.
        from .pipeline_macosnet import CUSTOM_PIPELINES

        before = getattr(self.config, "custom_pipelines", None)
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        try:
            if args or kwargs.get("push_to_hub") or not kwargs.get("is_main_process", True):
                super().save_pretrained(save_directory, *args, **kwargs)
            else:
                partial = os.path.join(save_directory, ".partial-model")
                shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
                try:
                    super().save_pretrained(partial, **kwargs)
                    _replace_model(partial, save_directory)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        finally:
            # Only in the file: in memory they would make `pipeline` ask for `trust_remote_code`.
            del self.config.custom_pipelines
            if before is not None:
                self.config.custom_pipelines = before


def _replace_model(partial: str, folder: str | os.PathLike[str]) -> None:
    """Moves the files of a whole model into the folder of an older one. The old weights go first and the new ones come
    last: transformers loads weights that have no configuration beside them, with the default settings."""
    for name in sorted(filter(_is_weights, os.listdir(folder)), key=_is_index, reverse=True):
        os.remove(os.path.join(folder, name))
    for name in sorted(os.listdir(partial), key=lambda name: (_is_weights(name), _is_index(name), name)):
        os.replace(os.path.join(partial, name), os.path.join(folder, name))


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def _is_index(name: str) -> bool:
    """Of weights in several files, which are no model without it."""
    return name.endswith(".index.json")
