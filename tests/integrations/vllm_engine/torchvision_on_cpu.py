"""PyPI's torchvision beside a torch without CUDA. The Makefile copies it into vLLM's environment, where it is imported
when Python starts.

The wheel is made for CUDA, so its operations do not load, and importing it fails where their shapes are registered.
"""

import importlib.abc
import sys


class _DefineOperations(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            import torch

            for operation in ("nms", "qnms"):
                schema = f"torchvision::{operation}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(*schema)
        return None


sys.meta_path.insert(0, _DefineOperations())
