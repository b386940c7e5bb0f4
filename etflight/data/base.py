"""What all data modules share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Self, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from etflight.data.auto_augment import AutoAugment
from etflight.data.division import divide
from etflight.data.facts import refuse_equal_class_names
from etflight.data.loaders import EvalLoader, TrainLoader, loader_options
from etflight.data.notices import tell_of_training_images
from etflight.data.options import RULES, names_of
from etflight.data.preprocessing import Preprocessing
from etflight.data.profiles import (
    NoiseKind,
    Profile,
    fingerprint,
)
from etflight.data.sampler import ImbalancedSampler, ShardSampler, resolve_policy
from etflight.data.sources import Batch, FeatureSplit, ImageSource, ImageSplit, Split
from etflight.data.transforms import TrainTransform, normalize
from etflight.utils.errors import UserError
from etflight.utils.ranks import world
from etflight.utils.terminal import readable

RECIPE = (
    "crop_padding", "flip", "auto_augment", "color_jitter", "cutout", "random_erasing", "views", "mixup", "cutmix"
)  # fmt: skip
_LEAST_PART = 8  # a smaller part of a batch than an eighth is not trained on


@dataclass(eq=False, kw_only=True)
class ImageDataModule(LightningDataModule, ABC):
    """Images with a long-tailed profile, a sampling policy, and augmentation of whole batches on the device.

    Batches are `(images, labels)`, uint8 `[B, C, H, W]` and int64 `[B]`, until `on_after_batch_transfer` makes them
    float32 and, with mixup or CutMix, probabilities `[B, K]`.

    A new set defines `num_channels`, `class_names` and `load`, its recipe as the class variables, and `has_val_split` if it
    has one.

    Args:
        imbalance_ratio: Largest over smallest class count, at least 1; 1 is balanced.
        profile: How counts fall from class to class, or the counts themselves, one per class.
        max_count: Images of the largest class; None: the largest that every class can satisfy, and at ratio 1 the set
            as it is.
        seed: Chooses the subset. Order and augmentation of the images follow the run's own seed (`seed_everything`), so
            that runs with several seeds share their images; without one they follow this seed.
        sampler: Class-sampling policy (instance, sqrt, balanced, effective, progressive, reverse) or an exponent q
            of p ∝ n^q; None: instance, every image once.
        val_fraction: Part of each class's training images held out for validation, before the profile: at least one, but never the
            last; 0: the set's own validation split, or else the test set, watched.
        label_noise: Part of each class's training images that get a wrong label, after the profile, chosen by `seed`. Validation and test
            labels stay right; the class counts are those of the labels that are trained on.
        noise_kind: Which wrong labels: "symmetric", any other class alike (Patrini et al., CVPR 2017, arXiv 1609.03683), or "pair", the
            next class, after the last the first (Han et al., NeurIPS 2018, arXiv 1804.06872).
        batch_size: Images per step and device.
        eval_batch_size: Images per batch and device where nothing is trained; None: four times `batch_size` on a GPU, which
            evaluation does not fill otherwise, and `batch_size` on a CPU, whose cache holds no more. Results do not depend on it.
        num_workers: Loader processes; 0 is quickest for sets in memory.
        crop_padding: Zeros around the image before a random crop; None: the set's standard recipe.
        flip: Mirror half of the training images; None: the set's standard recipe.
        auto_augment: Change each training image by operations of its own: autoaugment_cifar10, autoaugment_imagenet, randaugment (or
            randaugment-n2-m9, two operations at level 9 of 30) or trivialaugment; None: off.
        color_jitter: Brightness, contrast and saturation (of RGB) of each training image change by factors drawn from 1 ± this, at
            most 1; 0: off.
        cutout: Side in pixels of a square of each training image that becomes the mean; 0: off.
        random_erasing: Probability that a rectangle of a training image becomes the mean.
        views: How often each image is in its training batch, augmented anew each time; a square that a file's image is cut to is the same.
        mixup: α of mixup; 0: off.
        cutmix: α of CutMix; 0: off.
        mean: Per channel, of pixels in [0, 1]; None: the set's own.
        std: Per channel; None: the set's own.

    Raises:
        UserError: An option is out of range (at once), or the files cannot give what was asked (in `setup`).
    """

    standard_mean: ClassVar[tuple[float, ...]] = (0.5,)
    standard_std: ClassVar[tuple[float, ...]] = (0.5,)
    standard_crop_padding: ClassVar[int] = 0
    standard_flip: ClassVar[bool] = False
    sampler_class: ClassVar[type[ImbalancedSampler]] = ImbalancedSampler
    named_after: ClassVar[str | None] = None  # the option whose file or folder names a set of one's own
    option = "data"  # what the command line calls this module, for errors; not annotated, hence no argument

    imbalance_ratio: float = 1.0
    profile: Profile | list[int] = "exp"
    max_count: int | None = None
    seed: int = 0
    sampler: str | float | None = None
    val_fraction: float = 0.0
    label_noise: float = 0.0
    noise_kind: NoiseKind = "symmetric"
    batch_size: int = 128
    eval_batch_size: int | None = None
    num_workers: int = 0
    crop_padding: int | None = None
    flip: bool | None = None
    auto_augment: str | None = None
    color_jitter: float = 0.0
    cutout: int = 0
    random_erasing: float = 0.0
    views: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mean: list[float] | None = None
    std: list[float] | None = None

    _splits: dict[Split, ImageSplit] = field(default_factory=dict, init=False, repr=False)
    _announced: bool = field(default=False, init=False, repr=False)
    _thinned: int = field(default=0, init=False, repr=False)  # classes that lose far more to validation than was asked

    def __post_init__(self) -> None:
        """Check the options that need no file."""
        LightningDataModule.__init__(self)
        for option in fields(self):
            if option.init and option.default is not None and getattr(self, option.name) is None:
                raise UserError(f"{type(self).__name__}: {option.name} is null: give a value, or leave it out")
        for name, (holds, rule) in RULES.items():
            value = getattr(self, name)
            self._refuse_unless(value is None or holds(value), name, rule)
        mixes = bool(self.mixup or self.cutmix)
        self._refuse_unless(self.views == 1 or not mixes, "views", "mixup and cutmix take one view: leave one out")
        if not isinstance(self.profile, str) and (self.imbalance_ratio != 1 or self.max_count is not None):
            raise UserError(
                f"{type(self).__name__}: profile gives explicit counts: leave out imbalance_ratio and max_count"
            )
        if self.sampler is not None:
            resolve_policy(self.sampler)
        if self.auto_augment is not None:
            AutoAugment.parse(self.auto_augment)

    def _refuse_unless(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise UserError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}: {rule}")

    def _or_standard(self, name: str) -> Any:
        """An option; where it is left out, that of the set's standard recipe, if it has one."""
        own = getattr(self, name)
        return getattr(self, f"standard_{name}", None) if own is None else own

    @property
    def _recipe(self) -> dict[str, Any]:
        """How training images are changed: arguments of `TrainTransform`."""
        return {name: self._or_standard(name) for name in RECIPE}

    # What a set defines.

    @property
    @abstractmethod
    def num_channels(self) -> int:
        """C of the images."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """K names, in label order."""

    @property
    def num_classes(self) -> int:
        """K; a set with fixed classes needs no download for it."""
        return len(self.class_names)

    @abstractmethod
    def load(self, split: Split) -> ImageSource:
        """Read one split of the set as published; `"val"` is asked for only where `has_val_split`.

        Returns:
            N images, uint8 `[C, H, W]` each, with labels int64 `[N]` in 0 … K-1.

        Raises:
            UserError: Files are missing or malformed.
        """

    @property
    def has_val_split(self) -> bool:
        """Whether the set comes with a validation split."""
        return False

    # Which images.

    @property
    def val_is_held_out(self) -> bool:
        """Whether validation images are neither trained on nor tested on; else the test set is watched."""
        return self.val_fraction > 0 or self.has_val_split

    @property
    def validation(self) -> str:
        """Which images the validation images are, in words for records."""
        return "held out" if self.val_is_held_out else "the test set, watched only"

    @property
    def cost_of_validation(self) -> str | None:
        """A line about the classes of which `val_fraction`, being less, takes a third or more; None if there are none."""
        self.split("train")
        if not self._thinned:
            return None
        return (
            f"val_fraction {self.val_fraction:g} takes a third or more of the training images of {self._thinned} of {self.num_classes} "
            "classes, since it takes at least one of each"
        )

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """`[K]` int64: training images per class, after validation split and profile."""
        return np.bincount(self.split("train").labels.numpy(), minlength=self.num_classes).astype(np.int64)

    @property
    def subset_indices(self) -> NDArray[np.int64]:
        """`[N]` int64: the training images' positions in the published training set, in training-subset order."""
        return self.split("train").indices.numpy()

    @cached_property
    def content(self) -> str:
        """Twelve hexadecimal digits that identify the training images of this set, before any are chosen.

        For images in memory they cover labels and pixels; for files, labels and names below the folder, but not what the files hold.
        """
        return self.split("train").source.content

    @property
    def fingerprint(self) -> str:
        """`content`, a dash, and twelve more digits that identify the choice of training images within the set, and labels of its own."""
        chosen = self.subset_indices
        if self._labels_are_free:
            chosen = np.concatenate([chosen, self.split("train").labels.numpy()])
        return f"{self.content}-{fingerprint(chosen)}"

    @property
    def training_options(self) -> dict[str, Any]:
        """How training images are drawn and changed: the options that a resumed run must have alike."""
        return {"sampler": resolve_policy("instance" if self.sampler is None else self.sampler), **self._recipe}

    @property
    def changing(self) -> dict[str, Any]:
        """The options by which a training image is not the same in every epoch, with the values that leave it as it is."""
        neutral = {option.name: option.default for option in fields(TrainTransform)}
        return {
            f"{self.option}.{name}": neutral[name] for name, value in self._recipe.items() if value != neutral[name]
        }

    @property
    def _labels_are_free(self) -> bool:
        """Whether the labels do not follow from the choice of images."""
        return bool(self.label_noise)

    @classmethod
    def name_with(cls, options: Mapping[str, Any]) -> str:
        """The `dataset_name` that the set would have with these options."""
        path = options.get(cls.named_after) if cls.named_after else None
        return readable(os.path.basename(os.path.abspath(path)).removesuffix(".npz") if path else "") or cls.__name__

    @property
    def dataset_name(self) -> str:
        """The set's name in tables: its class name, or the file or folder of a set of one's own."""
        return self.name_with(vars(self))

    @property
    def preprocessing(self) -> Preprocessing:
        """Shape and normalisation of the images, which a checkpoint keeps; taken from another split if `train` has not been read."""
        first = next(iter(self._splits.values()), None)
        images = self._splits.get("train") or first or self.split("train")
        shape = images.image_shape
        mean, std = (values * (shape[0] // len(values)) for values in self._statistics)
        return Preprocessing(shape, mean, std, images.source.crop_pct)

    @classmethod
    def options_for(cls, preprocessing: Preprocessing) -> dict[str, Any]:
        """The options of this set that prepare its images as for a trained model."""
        return {"mean": list(preprocessing.mean), "std": list(preprocessing.std)}

    def split(self, name: Split) -> ImageSplit:
        """The images of `train`, `val` or `test`, read on first use.

        Raises:
            UserError: Files are missing or malformed, or a class cannot satisfy the profile.
        """
        if name not in get_args(Split):
            raise UserError(f"split {name!r} is unknown: give one of {names_of(Split)}")
        if name == "val" and name not in self._splits and not self.val_is_held_out:
            name = "test"
        if name not in self._splits:
            if name == "train" or (name == "val" and self.val_fraction > 0):
                read = self._divide(self._checked("train"))
            else:
                source = self._checked(name)
                read = {name: self.make_split(name, source, np.arange(len(source.labels)))}
            self._refuse_other_shape(read[name], name)
            self._splits.update(read)
        return self._splits[name]

    def _refuse_other_shape(self, images: ImageSplit, name: Split) -> None:
        """Refuse a split whose images have another shape than those that have been read: a network takes both without a word."""
        for known, split in self._splits.items():
            if (own := images.image_shape) != (other := split.image_shape):
                shape, known_shape = (" × ".join(map(str, one)) for one in (own, other))
                raise UserError(
                    f"{self}: images of {name} are {shape}, but those of {known} are {known_shape} (C × H × W): "
                    "give all splits images of one shape"
                )

    def with_test_images(self, images: ImageSplit) -> Self:
        """A copy of this module that tests on other images, normalised and loaded as its own."""
        twin = copy(self)
        twin._splits = {**self._splits, "test": images}
        return twin

    def with_features(self, features: Mapping[Split, Tensor]) -> Self:
        """A copy of this module that gives, in place of the images of some splits, the features that a backbone has computed of them.

        `Network.features` returns such batches as they are, so whatever runs the model over the module needs no backbone.

        Args:
            features: For each of these splits the pooled features `[N, d]` of all its images, in the order of `eval_dataloader`.
        """
        twin = copy(self)
        known = {name: self.split(name) for name in features}  # validation may be the test set, watched
        twin._splits = {**self._splits, **{name: FeatureSplit(known[name], rows) for name, rows in features.items()}}
        return twin

    def use_features(self, features: Mapping[Split, Tensor]) -> None:
        """Give features as a copy by `with_features` does, until `use_images`."""
        self._splits = self.with_features(features)._splits

    def use_images(self) -> None:
        """Give images again wherever `use_features` has put features in their place."""
        self._splits = {
            name: split.images if isinstance(split, FeatureSplit) else split for name, split in self._splits.items()
        }

    def make_split(self, name: Split, source: ImageSource, indices: NDArray[np.int64]) -> ImageSplit:
        """The data set that loaders read, made of the chosen images."""
        return ImageSplit(source, indices)

    def _checked(self, name: Split) -> ImageSource:
        source = self.load(name)
        if len(source.labels) == 0:
            raise UserError(f"{self}: {name} holds no image: add some")
        wrong = torch.nonzero((source.labels < 0) | (source.labels >= self.num_classes)).flatten()
        if len(wrong):
            raise UserError(
                f"{self.label_file(name)}: label {int(source.labels[wrong[0]])} of {name} image {source.name(int(wrong[0]))} "
                f"is outside 0 … {self.num_classes - 1}: correct it, or the number of classes"
            )
        return source

    def _divide(self, source: ImageSource) -> dict[Split, ImageSplit]:
        """Hold out validation images, and apply the profile to the rest."""
        if self.num_classes < 2:
            raise UserError(f"{self} has {self.num_classes} class: a classifier needs at least two")
        refuse_equal_class_names(self.class_names, self)
        try:
            division = divide(source.labels.numpy(), self.class_names, self)
        except UserError as error:
            after = f" (val_fraction {self.val_fraction} is held out first)" if self.val_fraction > 0 else ""
            raise UserError(f"{self}: {error}{after}") from None
        self._thinned = division.thinned
        splits: dict[Split, ImageSplit] = {"train": self.make_split("train", source, division.train)}
        splits["train"].labels = torch.from_numpy(division.labels)
        if division.val is not None:
            splits["val"] = self.make_split("val", source, division.val)
        return splits

    @property
    def ratios(self) -> dict[str, float | None]:
        """Two ratios of the training images, under the names that records have for them.

        `imbalance_ratio`, as the option, is the one that was asked for, None if none was. `count_ratio` is the largest class count over the
        smallest, to four digits, None if a class has no image; whole counts only come near the one asked for.
        """
        asked = float(self.imbalance_ratio) if self.imbalance_ratio > 1 and self.profile != "none" else None
        largest, smallest = int(self.class_counts.max()), int(self.class_counts.min())
        count_ratio = float(f"{largest / smallest:.4g}") if smallest > 0 else None
        return {"imbalance_ratio": asked, "count_ratio": count_ratio}

    def describe_ratio(self) -> str:
        """The imbalance ratio of the training images, with the one that was asked for where whole counts cannot have it."""
        asked, own = (value and f"{value:.4g}" for value in self.ratios.values())
        if asked is None or asked == own:
            return own or "inf"
        return f"{own or 'inf'} ({asked} asked; {'labels are noisy' if self.label_noise else 'counts are whole'})"

    def untested(self) -> set[int]:
        """The classes without a test image, as far as they are known before test images are read."""
        test = self._splits.get("test")
        return set() if test is None else set(range(self.num_classes)).difference(test.labels.tolist())

    def label_file(self, split: Split) -> str:
        """The file that holds a split's labels, or else the set; messages about wrong labels name it."""
        return str(self)

    def sample_name(self, split: Split, index: int) -> str:
        """The name for people of image `index` in `eval_dataloader(split)`: its file, or its position in the published split."""
        return self.split(split).name(index)

    def __str__(self) -> str:
        return type(self).__name__

    # Lightning's hooks.

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that `fit`, `validate`, `test` or `predict` needs; None reads them all."""
        needed: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            None: get_args(Split),
        }
        for name in needed.get(stage, ("test",)):
            self.split(name)
        if "train" in self._splits and not self._announced:
            self._announced = True
            tell_of_training_images(self, self.trainer, self._world()[1])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images in the order of the sampling policy, shared by the ranks, which all have the same number of batches.

        An epoch's last images are left out if they fill less than an eighth of a batch, or if some rank would get none of them, or a batch
        of one: BatchNorm would normalise so few by their own statistics, and their gradient would count as much as that of a whole batch.

        Raises:
            UserError: There are fewer images than ranks.
        """
        data = self.split("train")
        world_size, rank = self._world()
        if len(data) < world_size:
            raise UserError(f"{self}: {len(data)} training images for {world_size} ranks: use fewer devices")
        sampler = self.sampler_class(
            data.labels.numpy(),
            "instance" if self.sampler is None else self.sampler,
            num_epochs=self.trainer.max_epochs if self.trainer is not None else None,
            seed=self._run_seed,
            num_replicas=world_size,
            rank=rank,
        )
        full = self.batch_size * world_size
        if len(data) > full and len(data) % full < max(2 * world_size, full / _LEAST_PART):
            sampler.leave_out(len(data) % full)
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # Lightning sets it
        if overfits:
            # Lightning puts its own sampler here, which takes the images in their order
            order = sampler.draw()
            labels = data.labels[order]  # the split's own, which need not be its source's
            data = self.make_split("train", data.source, data.indices.numpy()[order])
            data.labels = labels
        loader = TrainLoader(data, sampler=sampler, batch_size=self.batch_size, **self._loading(data))
        loader.trainer = self.trainer
        return loader

    def eval_dataloader(self, split: Split, start: int = 0) -> DataLoader[Batch]:
        """Every image of a split exactly once over all ranks, in order; `eval_transform` prepares the batches.

        Args:
            split: The split.
            start: The number of images of this rank to leave out, because an interrupted pass has had them.

        Raises:
            UserError: There are fewer images than ranks.
        """
        data = self.split(split)
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        batch_size = self.eval_batch_size or self.batch_size * (1 if on_cpu else 4)
        return EvalLoader(
            data,
            sampler=ShardSampler(data, *self._world(), start),
            batch_size=batch_size,
            **self._loading(data),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation images, or the watched test set."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images, with their labels."""
        return self.eval_dataloader("test")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment and normalise on the device while training, else normalise only."""
        if self.trainer is not None and self.trainer.training:
            # Lightning counts the batch only after this hook: + 1 makes the first step 0.
            return self.train_transform(batch, self.trainer.fit_loop.total_batch_idx + 1, self.trainer.global_rank)
        return self.eval_transform(batch)

    def train_transform(self, batch: Batch, step: int, rank: int = 0) -> Batch:
        """Augment and normalise a training batch, repeatably from (seed, step, rank).

        Returns:
            Images float32 `[views·B, C, H, W]`, one view of all after the other, and labels int64 `[views·B]` or, with mixup or CutMix,
            float32 `[B, K]`. Features `[B, d]` stay as they are.
        """
        return batch if batch[0].ndim == 2 else self._augment(*batch, step, rank)

    def eval_transform(self, batch: Batch) -> Batch:
        """Normalise: uint8 to float32 `[B, C, H, W]`, labels untouched; features `[B, d]` stay as they are."""
        images, labels = batch
        return (images if images.ndim == 2 else normalize(images, *self._statistics)), labels

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean, std = tuple(self._or_standard("mean")), tuple(self._or_standard("std"))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self.num_channels):
                raise UserError(f"{self}: {name} has {len(values)} numbers for {self.num_channels} channels")
        return mean, std

    @cached_property
    def _augment(self) -> TrainTransform:
        mean, std = self._statistics
        return TrainTransform(num_classes=self.num_classes, mean=mean, std=std, seed=self._run_seed, **self._recipe)

    @property
    def _run_seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", self.seed))  # where Lightning's seed_everything puts it

    def _loading(self, data: ImageSplit) -> dict[str, Any]:
        # features need no decoding
        return loader_options(0 if isinstance(data, FeatureSplit) else self.num_workers, self.trainer)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else world()
