"""What the monitor looks at: a model's embeddings, class vectors and decisions, caught while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from etflight.errors import UserError
from etflight.heads import Head
from etflight.precision import at_least_float32

Space = Literal["embedding", "backbone"]
HEAD = ""  # the name of the head's own features beside those of further layers


class Caught(NamedTuple):
    """What one forward of B samples showed.

    Attributes:
        features: `[B, d]` of the head (under `HEAD`) and of each layer, without gradient.
        decision: `[B]` int64, the head's largest logit; None if its output is not `[B, K]`.
    """

    features: dict[str, Tensor]
    decision: Tensor | None


class EmbeddingSource:
    """Catches features by hooks that are there only between `attach` and `detach`.

    For an `etflight` head the embedding is what its `embed` returns within the forward itself; for any other module it is its first input.

    Args:
        model: that runs.
        head: name of the submodule with the class vectors, `weight` `[K, d]` and perhaps `bias` `[K]`.
        space: "embedding", or "backbone" for the head's input.
        layers: further submodules (of the model or of its `backbone`), or indices for timm's `forward_intermediates`.

    Raises:
        UserError: a name that the model does not have, or a head without class vectors.
    """

    def __init__(self, model: nn.Module, head: str, space: Space, layers: Sequence[str | int]) -> None:
        self.head = find_submodule(model, head, "head")
        self.name = head
        self.space = space
        self._modules = {name: find_submodule(model, name, "layers") for name in layers if isinstance(name, str)}
        self._indices = [index for index in layers if isinstance(index, int)]
        self._backbone: Any = getattr(model, "backbone", model)
        if self._indices and not hasattr(self._backbone, "forward_intermediates"):
            raise UserError(
                f"layers {self._indices}: {type(self._backbone).__name__} has no forward_intermediates: name modules instead"
            )
        if not isinstance(getattr(self.head, "weight", None), Tensor) or self.head.weight.ndim != 2:
            raise UserError(f"head={head!r} is a {type(self.head).__name__} without class vectors weight [K, d]")
        self._handles: list[RemovableHandle] = []
        self._features: dict[str, Tensor] = {}
        self._input: Tensor | None = None
        self._embedding: Tensor | None = None
        self._decision: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """Class vectors `[K, d]`."""
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        return weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """`[K]`, or None."""
        bias = getattr(self.head, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def meets_weight(self) -> bool:
        """Whether the features are what meets the class vectors."""
        return self.space == "embedding" or not isinstance(self.head, Head)

    def attach(self) -> None:
        """Start to catch."""
        self.detach()
        self._handles = [
            self.head.register_forward_pre_hook(self._before_head, with_kwargs=True),
            self.head.register_forward_hook(self._after_head),
        ]
        if self._modules:
            torch.compiler.set_stance("force_eager")  # compiled code does not see new hooks
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._after_layer(name)))
        if isinstance(self.head, Head) and self.space == "embedding":
            self.head.__dict__["embed"] = self._watched(self.head.embed)

    def detach(self) -> None:
        """Leave the model as it was, and forget what was caught."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self._modules:
            torch.compiler.set_stance("default")
        self._handles = []
        self.head.__dict__.pop("embed", None)
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
        """What the last forward showed.

        Raises:
            UserError: the head or a layer did not run, or not on `batch_size` samples as vectors.
        """
        caught = Caught(dict(sorted(self._features.items())), self._decision)
        self._forget()
        for name in (HEAD, *self._modules):
            features = caught.features.get(name)
            if features is None or features.ndim != 2 or len(features) != batch_size:
                where = f"layer {name!r}" if name else f"head {self.name!r}"
                what = "did not run" if features is None else f"saw features {list(features.shape)}"
                raise UserError(f"{where} {what} in a forward of {batch_size} labels: name a module that sees [B, d]")
        return caught

    def intermediates(self, images: Tensor) -> dict[str, Tensor]:
        """Pooled features `[B, d]` of the layers given as indices: one more forward, if there are any."""
        if not self._indices:
            return {}
        outputs = self._backbone.forward_intermediates(images, indices=self._indices, intermediates_only=True)
        # timm answers in the order of depth
        order = sorted(self._indices, key=lambda i: i % len(self._backbone.feature_info))
        return {str(index): pool(output) for index, output in zip(order, outputs, strict=True)}

    def _forget(self) -> None:
        self._features = {}
        self._input = self._embedding = self._decision = None

    def _before_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        self._input, self._embedding = first.detach(), None

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        features = self._input
        if isinstance(module, Head) and self.space == "embedding":
            # a head of the user's own may not go through `embed`
            features = self._embedding if self._embedding is not None else _embed_aside(module, self._input)
        if features is not None:
            self._features[HEAD] = features
        if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] == self.num_classes:
            self._decision = output.detach().argmax(1)

    def _after_layer(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._features[name] = pool(output[0] if isinstance(output, tuple | list) else output)

        return keep

    def _watched(self, embed: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def watched(features: Tensor) -> Tensor:
            embedding = embed(features)
            self._embedding = embedding.detach()
            return embedding

        return watched


@torch.no_grad()
def pool(features: Tensor) -> Tensor:
    """Mean over places: `[B, C, H, W]` and `[B, tokens, C]` to `[B, C]`, in float32 at least."""
    features = at_least_float32(features.detach())
    if features.ndim == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.ndim > 3 else features


@torch.no_grad()
def _embed_aside(head: Head, features: Tensor | None) -> Tensor | None:
    """The embedding with running statistics, which are not touched."""
    if features is None:
        return None
    with frozen_modes(head):
        return head.__class__.embed(head, features)


@contextmanager
def frozen_modes(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; then each submodule's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def find_submodule(model: nn.Module, name: str, argument: str) -> nn.Module:
    """A submodule of a model, or of its `backbone`, by name.

    Raises:
        UserError: there is none, said of `argument`, with near matches.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    backbone = getattr(model, "backbone", None)
    inner: dict[str, nn.Module] = dict(backbone.named_modules()) if isinstance(backbone, nn.Module) else {}
    found = modules.get(name, inner.get(name))
    if found is None or not name:
        near = get_close_matches(name, [*modules, *inner], n=3, cutoff=0.4)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else f"give one of {', '.join(n for n, _ in model.named_children())}"
        )
        raise UserError(f"{argument} {name!r} is no module of {type(model).__name__}: {hint}")
    return found
