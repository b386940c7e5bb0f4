"""Features of a model, caught while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from etflight.heads import Head
from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32

Space = Literal["embedding", "backbone"]
HEAD = ""  # the name of the head's own features, beside the names of further layers


class Caught(NamedTuple):
    """What was caught of one forward of B samples.

    Attributes:
        features: The features `[B, d]` of the head (under `HEAD`) and of each layer, without gradient.
        decision: The class of the head's largest logit, `[B]` int64, -1 if that is not finite; None if its output is not `[B, K]`.
    """

    features: dict[str, Tensor]
    decision: Tensor | None


class EmbeddingSource:
    """Catches features by hooks that exist only between `attach` and `stop` or `detach`.

    The embedding of an `etflight` head is what its `embedder` returns within the forward itself; that of any other module is its first
    input. A 1 x 1 convolution counts as a linear layer.

    Args:
        model: The model that runs.
        head: The name of the submodule with the class vectors, `weight` `[K, d]` and perhaps `bias` `[K]`.
        space: "embedding", or "backbone" for the head's input.
        layers: The names of further submodules, of the model or of its `backbone`.

    Raises:
        UserError: The model has no such submodule, or the head has no class vectors.
    """

    def __init__(self, model: nn.Module, head: str, space: Space = "embedding", layers: Sequence[str] = ()) -> None:
        self.model = model
        self.head = find_submodule(model, head, "head")
        self.name = head
        self.space = space
        self._modules = {name: find_submodule(model, name, "layers") for name in layers}
        weight = getattr(self.head, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2 or weight.numel() != weight.shape[0] * weight.shape[1]:
            raise UserError(f"head={head!r} is a {type(self.head).__name__} without class vectors weight [K, d]")
        self._handles: list[RemovableHandle] = []
        self._features: dict[str, Tensor] = {}
        self._embedding: Tensor | None = None
        self._output: Any = None

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return int(self.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """The class vectors `[K, d]`, as the head compares them with features."""
        weight: Tensor = self.head.class_vectors if isinstance(self.head, Head) else self.head.weight  # type: ignore[assignment]
        return weight.detach().flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """The biases `[K]`, or None."""
        bias = getattr(self.head, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def meets_weight(self) -> bool:
        """Whether the features are compared with the class vectors directly."""
        return self.space == "embedding" or not isinstance(self.head, Head)

    def attach(self) -> None:
        """Start catching."""
        self.detach()
        if isinstance(self.head, Head):
            self._handles.append(self.head.embedder.register_forward_hook(self._after_embedder))
        else:
            self._handles.append(self.head.register_forward_hook(self._after_foreign_head, with_kwargs=True))
        if self._modules:
            torch.compiler.set_stance("force_eager")  # compiled code does not see new hooks
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._after_layer(name)))

    def stop(self) -> None:
        """Remove the hooks, but keep what was caught for `take`."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self._modules:
            torch.compiler.set_stance("default")
        self._handles = []

    def detach(self) -> None:
        """Remove the hooks, and forget what was caught."""
        self.stop()
        self._forget()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Catch within the block."""
        self.attach()
        try:
            yield
        finally:
            self.detach()

    def take(self, batch_size: int) -> Caught:
        """Return what was caught of the last forward, and forget it.

        Raises:
            UserError: The head or a layer did not run, or did not give `batch_size` vectors.
        """
        caught = Caught(dict(sorted(self._features.items())), self._decision())
        self._forget()
        for name in (HEAD, *self._modules):
            features = caught.features.get(name)
            if features is None or features.ndim != 2 or len(features) != batch_size:
                where = f"layer {name!r}" if name else f"head {self.name!r}"
                what = "did not run" if features is None else f"saw features {list(features.shape)}"
                raise UserError(f"{where} {what} in a forward of {batch_size} labels: name a module that sees [B, d]")
        return caught

    @torch.no_grad()
    def _decision(self) -> Tensor | None:
        # dot regression trains without the logits of all classes, so they are computed here
        output = self._output if self._embedding is None else cast(Head, self.head).logits(self._embedding)
        logits = _as_vectors(output.detach()) if isinstance(output, Tensor) else None
        if logits is None or logits.ndim != 2 or logits.shape[1] != self.num_classes:
            return None
        largest, decision = logits.max(1)
        return torch.where(largest.isfinite(), decision, -1)

    def _forget(self) -> None:
        self._features = {}
        self._embedding = self._output = None

    def _after_embedder(self, module: nn.Module, args: tuple[Any, ...], embedding: Tensor) -> None:
        self._embedding = embedding.detach()
        self._features[HEAD] = self._embedding if self.space == "embedding" else args[0].detach()

    def _after_foreign_head(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        self._features[HEAD], self._output = _as_vectors(first.detach()), output

    def _after_layer(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._features[name] = pool(output[0] if isinstance(output, tuple | list) else output)

        return keep


def _as_vectors(values: Tensor) -> Tensor:
    """Return `[B, C, 1, 1]` as `[B, C]`, and anything else unchanged."""
    return values.flatten(1) if values.shape[2:] == (1, 1) else values


@torch.no_grad()
def pool(features: Tensor) -> Tensor:
    """Average over places: `[B, C, H, W]` or `[B, tokens, C]` to `[B, C]`, in float32 at least."""
    features = at_least_float32(features.detach())
    if features.ndim == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.ndim > 3 else features


def find_submodule(model: nn.Module, name: str, argument: str) -> nn.Module:
    """Find a submodule of a model, or of its `backbone`, by name.

    Raises:
        UserError: There is no such submodule; the message names the `argument` and near matches.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    backbone = getattr(model, "backbone", None)
    inner: dict[str, nn.Module] = dict(backbone.named_modules()) if isinstance(backbone, nn.Module) else {}
    found = modules.get(name, inner.get(name))
    if found is None or not name:
        near = get_close_matches(name, [*modules, *inner], n=3, cutoff=0.4) or dict(model.named_children())
        raise UserError(
            f"{argument} {name!r} is not a module of {type(model).__name__}: did you mean {', '.join(near)}?"
        )
    return found
