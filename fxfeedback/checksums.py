"""A checksum of weights, by which a file and a checkpoint find each other; arrays and tensors have the same."""

import hashlib
from collections.abc import Mapping
from typing import Any


def checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 over a state_dict: names, dtypes, shapes and values, in the order of the names.

    Every file that fxfeedback exports has its model's in `metadata["weights_sha256"]`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)};".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Any) -> bytes | memoryview:
    if not hasattr(tensor, "detach"):
        return tensor.tobytes()
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
