"""What tensors a computation makes, and which of them it looks into."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes, those of the backward included."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return result


class HostReads(TorchDispatchMode):
    """Notes the operations that need values on the host: scalars, and shapes that depend on values."""

    READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "bincount")

    def __init__(self, seen: list[str] | None = None) -> None:
        super().__init__()
        self.seen = [] if seen is None else seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else []
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if masked or name in self.READS or name.startswith(("nonzero", "_unique", "unique")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
