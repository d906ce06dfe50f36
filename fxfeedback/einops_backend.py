"""einops on proxies: its functions come down to reshape, permute and reductions, and are traced as these."""

import functools
import sys
from typing import Any

from torch import fx


def register(kind: type[fx.Proxy]) -> None:
    """Let einops, where a model has imported it, take proxies of this kind, which know their shapes, for tensors."""
    if "einops" in sys.modules:
        _register(kind)  # type: ignore[arg-type]


@functools.cache
def _register(kind: Any) -> None:
    from einops._backends import TorchBackend

    class ProxyBackend(TorchBackend):
        """Found by einops as it finds its own: among the subclasses, by the type of the tensor."""

        framework_name = "fxfeedback"

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, kind)

        def is_float_type(self, x: Any) -> bool:
            return x.small.is_floating_point()

    kind.einops_backend = ProxyBackend  # einops keeps no reference to a class
