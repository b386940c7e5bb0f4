"""How many images each class keeps, which of them an epoch draws, and how ranks share them."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence, Sized
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data.distributed import DistributedSampler

from etflight.utils.errors import UserError
from etflight.utils.ranks import world

Profile = Literal["exp", "step", "none"]
NoiseKind = Literal["symmetric", "pair"]
Indices = NDArray[np.int64]
_MOST = 2**53  # beyond it, float64 skips integers; profiles are computed in float64


def class_counts(
    num_classes: int, max_count: int, imbalance_ratio: float = 1.0, profile: Profile = "exp"
) -> NDArray[np.int64]:
    """Training images per class of a long-tailed profile, largest class first.

    Args:
        num_classes: K, at least 2.
        max_count: n_max, the images of class 0, at least 1.
        imbalance_ratio: n_max / n_min, at least 1; 1 is balanced.
        profile: `"exp"`: `int(n_max · ratio^(-k/(K-1)))`; `"step"`: the first K//2 classes full, the others
            `int(n_max / ratio)`; `"none"`: every class full, whatever the ratio.

    Returns:
        `[K]` int64, truncated as the field does. A class may come out at 0 where `ratio > n_max`.

    Raises:
        UserError: An argument is out of range, or the profile is unknown.

    Example:
        >>> class_counts(10, 5000, 100).tolist()
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        >>> class_counts(4, 500, 10, "step").tolist()
        [500, 500, 50, 50]
    """
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}: a profile needs at least two classes")
    if not 1 <= max_count <= _MOST:
        raise UserError(f"max_count is {max_count}: the largest class needs at least one image, and at most 2**53")
    if not imbalance_ratio >= 1:
        raise UserError(
            f"imbalance_ratio is {imbalance_ratio}: it is n_max / n_min, so give 1 (balanced) or more, not its inverse"
        )
    if profile == "exp":
        counts = [int(max_count * imbalance_ratio ** (-k / (num_classes - 1))) for k in range(num_classes)]
    elif profile == "step":
        full = num_classes // 2
        counts = [max_count] * full + [int(max_count / imbalance_ratio)] * (num_classes - full)
    elif profile == "none":
        counts = [max_count] * num_classes
    else:
        raise UserError(
            f"profile {profile!r} is unknown: give one of {', '.join(get_args(Profile))}, or explicit counts"
        )
    return np.array(counts, dtype=np.int64)


def training_counts(
    available: ArrayLike,
    imbalance_ratio: float = 1.0,
    profile: Profile | Sequence[int] = "exp",
    max_count: int | None = None,
    class_names: Sequence[str] | None = None,
) -> NDArray[np.int64]:
    """Images that each class of a real set keeps.

    Args:
        available: `[K]`, the images each class has, each at least 1.
        imbalance_ratio: n_max / n_min, at least 1.
        profile: A profile of `class_counts`, or the K counts themselves.
        max_count: n_max. None takes the largest that every class can satisfy, and keeps the set as it is where there
            is nothing to shape (ratio 1, or profile `"none"`, which only caps each class at `max_count`).
        class_names: `[K]`, for the error messages.

    Returns:
        `[K]` int64, each between 1 and `available`.

    Raises:
        UserError: A class has fewer images than are asked for, or would be left with none.
    """
    has = np.asarray(available, dtype=np.int64)
    names = list(class_names) if class_names is not None else [str(k) for k in range(len(has))]

    def refuse(classes: Indices, problem: str) -> UserError:
        k = int(classes[0])
        others = f" (and {len(classes) - 1} more)" if len(classes) > 1 else ""
        return UserError(f"class {k} ({names[k]}){others} {problem}")

    if (empty := np.flatnonzero(has == 0)).size:
        raise refuse(empty, "has no training image: every class needs at least one, so leave it out or add some")

    mend = "lower its count in the profile"
    if not isinstance(profile, str):
        asked = np.asarray(profile, dtype=np.int64)
        if asked.shape != has.shape:
            raise UserError(f"profile gives {asked.size} counts for {has.size} classes: give one count per class")
    elif profile == "none":
        asked = has if max_count is None else np.minimum(has, max_count)
    elif max_count is None and imbalance_ratio == 1:
        asked = has
    else:

        def counts(n_max: int) -> NDArray[np.int64]:
            return class_counts(len(has), n_max, imbalance_ratio, profile)

        # Counts grow with n_max, so the first n_max that asks too much ends the search.
        candidates = range(1, int(has.max()) + 1)
        largest = bisect_right(candidates, False, key=lambda n_max: bool((counts(n_max) > has).any()))
        asked = counts(largest if max_count is None else max_count)
        mend = f"lower max_count to {largest} or less"

    if (short := np.flatnonzero(asked > has)).size:
        k = short[0]
        raise refuse(short, f"has {has[k]} training images, {asked[k]} were asked for: {mend}")
    if (none_left := np.flatnonzero(asked < 1)).size:
        mend = "lower imbalance_ratio, or raise max_count or its count in the profile"
        raise refuse(none_left, f"is left with {asked[none_left[0]]} images: {mend}")
    return asked


def long_tailed_subset(labels: ArrayLike, counts: ArrayLike, seed: int = 0) -> Indices:
    """Choose `counts[k]` images of each class k by the field's rule.

    With `numpy.random.RandomState(seed)`, in class order, shuffle the class's indices and keep the first n_k.

    Args:
        labels: `[N]`, integers in 0 … K-1.
        counts: `[K]`, images to keep; a class that has fewer keeps all of them.
        seed: 0 … 2³² - 1; 0 is what published subsets use.

    Returns:
        `[Σ n_k]` int64 positions in `labels`, in class order.
    """
    rng = np.random.RandomState(seed)
    # One stable sort instead of K scans; each group is in ascending order, as `np.where(labels == k)` gives it.
    by_class = np.argsort(labels, kind="stable")
    wanted = np.asarray(counts)
    sizes = np.bincount(labels, minlength=len(wanted))
    chosen = []
    for indices, count in zip(np.split(by_class, np.cumsum(sizes)[:-1]), wanted, strict=True):
        rng.shuffle(indices)
        chosen.append(indices[:count])
    return np.concatenate(chosen)


def noisy_labels(labels: Indices, num_classes: int, part: float, kind: NoiseKind, seed: int) -> Indices:
    """Give a part of each class's images a wrong label.

    Args:
        labels: `[N]`, in 0 … K-1.
        num_classes: K.
        part: The part of each class, from 0 to 1; its number of images is rounded.
        kind: "symmetric": each of the other classes alike; "pair": the next class, after the last the first.
        seed: Chooses the images, and for "symmetric" their labels.

    Returns:
        A copy of the labels, `[N]`, of which `rint(part · n_k)` of each class are wrong.
    """
    rng = np.random.default_rng(seed)
    noisy = labels.copy()
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])
    for k, own in enumerate(by_class):
        wrong = rng.permutation(own)[: int(np.rint(part * len(own)))]
        steps = rng.integers(1, num_classes, len(wrong)) if kind == "symmetric" else 1
        noisy[wrong] = (k + steps) % num_classes
    return noisy


def fingerprint(indices: ArrayLike) -> str:
    """Twelve hexadecimal digits (SHA-256 of the little-endian int64 bytes) that identify a choice of images."""
    return hashlib.sha256(np.asarray(indices).astype("<i8").tobytes()).hexdigest()[:12]


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
        flat = np.asarray(labels).reshape(-1)
        if flat.size == 0:
            raise UserError("the sampler got no labels: give one per training image")
        if num_samples is not None and num_samples < 1:
            raise UserError(f"num_samples is {num_samples}: draw at least one image per epoch")
        if not 0 <= beta < 1:
            raise UserError(f"beta is {beta}: it lies in [0, 1)")
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
            return _walk(rng, np.arange(self._counts.sum()), self.total_size)
        # Cumulative sums end at 1 - 1e-16 at times; `side="right"` never picks a class of probability 0.
        cumulative = np.cumsum(self.probabilities())
        classes = np.searchsorted(cumulative / cumulative[-1], rng.random(self.total_size), side="right")
        slots = np.argsort(classes, kind="stable")
        sizes = np.bincount(classes, minlength=len(self._counts))
        out = np.empty(self.total_size, dtype=np.int64)
        out[slots] = np.concatenate(
            [_walk(rng, images, size) for images, size in zip(self._by_class, sizes, strict=True)]
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

    Raises:
        UserError: There are fewer images than ranks, so that one rank would have none.
    """

    def __init__(self, dataset: Sized, num_replicas: int | None = None, rank: int | None = None) -> None:
        super().__init__(dataset, len(dataset), num_replicas, rank)
        if self.total_size < self.num_replicas:
            raise UserError(
                f"{self.total_size} images cannot be shared by {self.num_replicas} ranks: use at most as many devices"
            )

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


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


def _walk(rng: np.random.Generator, images: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The first `count` of endless passes over `images`, each pass shuffled anew."""
    passes = -(-count // len(images))
    return rng.permuted(np.tile(images, (passes, 1)), axis=1).reshape(-1)[:count]
