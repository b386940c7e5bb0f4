"""A device without float64, as Apple's MPS is one, for machines that have none: its tensors lie in host memory, and the CPU computes.

A view of a tensor is a copy, so what is written into one is lost.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import _pytree, backend_registration

NAME = "small"
_MEMORY: dict[int, Tensor] = {}  # flat tensors, by the address of the storage that each stands for
_CPU, _aten = torch.device("cpu"), torch.ops.aten
_libraries: list[torch.library.Library] = []  # a library that is dropped takes its operators with it


def is_possible() -> bool:
    """Whether this torch knows devices that are written in Python."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def install() -> None:
    """Add the device to this process, which cannot be undone."""

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend([every, aten])
    every.fallback(_on_cpu, "PrivateUse1")
    own = {
        "_copy_from": _copy,
        "empty.memory_format": lambda size, **options: _new(torch.empty(size, dtype=options.get("dtype"))),
        "empty_strided": _strided,
        "convolution_overrideable": lambda *args: _new(_aten.convolution(*_inside(args))),
        "convolution_backward_overrideable": _convolution_backward,
    }
    for op in _aten.constant_pad_nd, _aten.slice_backward, _aten.select_backward:  # torch's own write into views
        own[op.__name__] = lambda *args, op=op.default, **options: _on_cpu(op, *args, **options)
    for name, function in own.items():
        aten.impl(name, function, "PrivateUse1")


def strategy() -> SingleDeviceStrategy:
    """A strategy that trains on the device."""
    return SingleDeviceStrategy(f"{NAME}:0", accelerator=_Accelerator())


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


def _new(values: Tensor) -> Tensor:
    if values.dtype == torch.float64:
        raise TypeError("there is no float64 on this device")
    made: Tensor = torch._C._acc.create_empty_tensor(values.shape, values.dtype)
    _MEMORY[made.untyped_storage()._cdata] = values.contiguous().view(-1)
    return made


def _inside(tree: Any) -> Any:
    """The same arguments as the CPU takes them."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.device):
            return _CPU
        if not isinstance(value, Tensor) or value.device.type != NAME:
            return value
        flat = _MEMORY[value.untyped_storage()._cdata]
        return flat.as_strided(value.size(), value.stride(), value.storage_offset())

    return _pytree.tree_map(one, tree)


def _on_cpu(op: Any, *args: Any, **options: Any) -> Any:
    result = op(*_inside(args), **_inside(options))
    arguments = op._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    if not written:
        return _pytree.tree_map_only(Tensor, _new, result)
    given = [args[i] if i < len(args) else options[arguments[i].name] for i in written]
    for tensor, values in zip(given, [result] if isinstance(result, Tensor) else result or [], strict=False):
        if tensor.shape != values.shape:  # an empty tensor for the result
            tensor.data = _new(values)
    return None if not op._schema.returns else given[0] if len(op._schema.returns) == 1 else tuple(given)


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if target.device == _CPU and target.dtype == torch.float64:
        raise TypeError("this device cannot copy to float64")
    _inside(target).copy_(_inside(source))
    return target


def _strided(size: Sequence[int], stride: Sequence[int], **options: Any) -> Tensor:
    numbers = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
    return _new(torch.empty(numbers, dtype=options.get("dtype"))).as_strided(size, stride)


def _convolution_backward(gradient: Tensor, images: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor | None, ...]:
    given = _inside((gradient, images, weight))
    results = _aten.convolution_backward(*given, [len(weight)], *options)
    return tuple(None if values is None else _new(values) for values in results)
