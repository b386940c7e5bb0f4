"""Which images an epoch draws, and how ranks share them."""

import math
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data.distributed import DistributedSampler

from etflight.utils.errors import UserError
from etflight.utils.ranks import world

EXPONENTS = {"sqrt": 0.5, "balanced": 0.0}
POLICIES = ("instance", "sqrt", "balanced", "effective", "progressive", "reverse")


class _Sharded(DistributedSampler[int]):
    """Rank r of W takes positions r, r + W, r + 2W, … of `total` and repeats none, so lengths may differ by one.

    Lightning leaves a `DistributedSampler` alone and forwards `set_epoch` to it.
    """

    def __init__(self, dataset: Sized, total: int, num_replicas: int | None, rank: int | None, seed: int = 0) -> None:
        size, own_rank = world()
        size = size if num_replicas is None else num_replicas
        own_rank = own_rank if rank is None else rank
        super().__init__(cast(Any, dataset), num_replicas=size, rank=own_rank, seed=seed)
        self.total_size = total
        self.num_samples = len(range(own_rank, total, size))


class ImbalancedSampler(_Sharded):
    """Draws training images by a class-sampling policy: one draw per (seed, epoch), the same on every rank, sharded.

    `"instance"` is a permutation of the images. Every other policy draws classes independently from p, then walks a
    shuffled list of each class's images, reshuffled when it is exhausted: no image of a class comes a second time
    before all others of that class have come. With n_j the images of class j:

    - `"sqrt"`, `"balanced"`, or an exponent q: `p_j ∝ n_j^q`, q = ½ and 0 for the names.
    - `"progressive"`: `(1-t)·(q = 1) + t·(q = 0)` with `t = epoch/(num_epochs-1)` (Kang et al., ICLR 2020).
    - `"effective"`: each image has the weight `(1-β)/(1-β^n_j)` of its class, so `p_j ∝ n_j (1-β)/(1-β^n_j)`: instance
      sampling at β = 0, balanced as β -> 1 (Cui et al., CVPR 2019, as LDAM's released code samples).
    - `"reverse"`: `p_j ∝ n_max/n_j` (Zhou et al., BBN, CVPR 2020).

    Args:
        labels: `[N]` integers; classes without an image are never drawn.
        policy: A name above, or q as a number or a numeric string.
        num_epochs: T, needed by `"progressive"` alone.
        beta: β of `"effective"`, in [0, 1).
        num_samples: Images drawn per epoch over all ranks; None: N.
        seed: At least 0.
        num_replicas: W; None takes torch.distributed's world size where it is initialised, else 1.
        rank: r, which yields `draw[r::W]`; None takes torch.distributed's, or 0.

    Raises:
        UserError: The policy is unknown, there are no labels, or an argument is out of range.

    Example:
        >>> sampler = ImbalancedSampler([0, 0, 0, 1], "balanced", num_samples=1000)
        >>> sampler.probabilities().tolist()
        [0.5, 0.5]
        >>> sampler.set_epoch(3)
        >>> list(sampler) == list(sampler)
        True
    """

    def __init__(
        self,
        labels: ArrayLike,
        policy: str | float = "balanced",
        *,
        num_epochs: int | None = None,
        beta: float = 0.9999,
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        given = np.asarray(labels)
        if given.size == 0:
            raise UserError("the sampler got no labels: give one per training image")
        flat = given.reshape(len(given), -1)[:, 0]
        if flat.size != given.size or given.dtype.kind not in "iu":
            raise UserError(
                f"the sampler's labels are {given.dtype} {list(given.shape)}: give one integer per training image"
            )
        if num_samples is not None and num_samples < 1:
            raise UserError(f"num_samples is {num_samples}: draw at least one image per epoch")
        if not 0 <= beta < 1:
            raise UserError(f"beta is {beta}: it lies in [0, 1)")
        if seed < 0:
            raise UserError(f"seed is {seed}: give 0 or more")
        self.num_epochs = num_epochs
        self.set_policy(policy)
        super().__init__(flat, flat.size if num_samples is None else num_samples, num_replicas, rank, seed)
        self.skip = 0  # images of this rank that a resumed epoch has had already
        self.beta = beta
        order = np.argsort(flat, kind="stable")
        starts = np.append(0, np.flatnonzero(np.diff(flat[order])) + 1)
        self._counts = np.diff(starts, append=flat.size)
        self._by_class = np.split(order, starts[1:])

    def set_policy(self, policy: str | float) -> None:
        """Draw by another policy from the next epoch on.

        Raises:
            UserError: The policy is unknown, or is `"progressive"` without a number of epochs.
        """
        resolved = resolve_policy(policy)
        if resolved == "progressive" and (self.num_epochs is None or self.num_epochs < 1):
            raise UserError(
                f"the progressive sampler needs the number of epochs, got num_epochs={self.num_epochs}: set trainer.max_epochs"
            )
        self.policy = resolved

    def leave_out(self, last: int) -> None:
        """Leave out the `last` images of an epoch's draw, whichever ranks they belong to; the draw stays the same."""
        self.num_samples = len(range(self.rank, self.total_size - last, self.num_replicas))

    def probabilities(self) -> NDArray[np.float64]:
        """Class probabilities of the current epoch, float64, one per class that has images, in class order."""
        n = self._counts.astype(np.float64)
        match self.policy:
            case "instance":
                p = n
            case "effective":
                p = n / -np.expm1(n * math.log(self.beta)) if self.beta > 0 else n
            case "reverse":
                p = 1 / n
            case "progressive":
                t = min(self.epoch / max(cast(int, self.num_epochs) - 1, 1), 1.0)
                p = (1 - t) * n / n.sum() + t / n.size
            case str(name):
                p = n ** EXPONENTS[name]
            case exponent:
                p = (n / (n.max() if exponent > 0 else n.min())) ** exponent  # at most 1, whatever the exponent
        return cast(NDArray[np.float64], p / p.sum())

    def draw(self) -> NDArray[np.int64]:
        """The whole epoch over all ranks: `[num_samples]` int64 positions in `labels`, a function of (seed, epoch)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.policy == "instance":
            return _shuffled_rounds(rng, np.arange(self._counts.sum()), self.total_size)
        # Cumulative sums end at 1 - 1e-16 at times; `side="right"` never picks a class of probability 0.
        cumulative = np.cumsum(self.probabilities())
        classes = np.searchsorted(cumulative / cumulative[-1], rng.random(self.total_size), side="right")
        slots = np.argsort(classes, kind="stable")
        sizes = np.bincount(classes, minlength=len(self._counts))
        out = np.empty(self.total_size, dtype=np.int64)
        out[slots] = np.concatenate(
            [_shuffled_rounds(rng, images, size) for images, size in zip(self._by_class, sizes, strict=True)]
        )
        return out

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw()[self.rank :: self.num_replicas][self.skip : self.num_samples].tolist())


class Draw(NamedTuple):
    """A drawn image, with the numbers that determine its random crop.

    Attributes:
        position: Its position in the sampler's `labels`.
        seed: The sampler's seed.
        number: Its number among all draws since training began, over all ranks.
    """

    position: int
    seed: int
    number: int


class NumberedSampler(ImbalancedSampler):
    """An `ImbalancedSampler` that numbers its draws.

    What a loader process does to an image can then depend on its number, which is the same on any number of ranks and processes and
    after a resumption, and different each time an image is drawn.
    """

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        first = self.epoch * self.total_size + self.rank + self.skip * self.num_replicas
        for turn, position in enumerate(super().__iter__()):
            yield Draw(position, self.seed, first + turn * self.num_replicas)


class ShardSampler(_Sharded):
    """Every image exactly once over all ranks, in order: rank r yields r, r + W, r + 2W, … without padding.

    Args:
        dataset: Anything with a length N.
        num_replicas: W; None takes torch.distributed's world size where it is initialised, else 1.
        rank: r; None takes torch.distributed's, or 0.
        start: The number of images of this rank to leave out, because an interrupted pass has had them.

    Raises:
        UserError: There are fewer images than ranks, so that one rank would have none.
    """

    def __init__(
        self, dataset: Sized, num_replicas: int | None = None, rank: int | None = None, start: int = 0
    ) -> None:
        super().__init__(dataset, len(dataset), num_replicas, rank)
        self.start = start
        if self.total_size < self.num_replicas:
            raise UserError(
                f"{self.total_size} images cannot be shared by {self.num_replicas} ranks: use at most as many devices"
            )

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas)[self.start :])

    def __len__(self) -> int:
        return max(0, self.num_samples - self.start)


def resolve_policy(policy: str | float) -> str | float:
    """Check a policy: a known name stays, a number or numeric string becomes the exponent q.

    Raises:
        UserError: It is neither a policy nor a finite number.
    """
    if policy in POLICIES:
        return policy
    try:
        exponent = float(policy)
    except ValueError:
        raise UserError(
            f"sampler policy {policy!r} is unknown: give one of {', '.join(POLICIES)}, or an exponent"
        ) from None
    if not math.isfinite(exponent):
        raise UserError(f"sampler policy {policy!r}: the exponent must be a finite number")
    return exponent


def _shuffled_rounds(rng: np.random.Generator, images: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The first `count` of endless passes over `images`, each pass shuffled anew."""
    passes = -(-count // len(images))
    return rng.permuted(np.tile(images, (passes, 1)), axis=1).reshape(-1)[:count]
