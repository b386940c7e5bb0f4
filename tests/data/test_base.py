import logging
from itertools import chain
from math import inf, nan

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from etflight.data import ArrayImages, Digits, ImageDataModule, ImbalancedSampler, class_counts
from etflight.data.profiles import fingerprint, long_tailed_subset
from etflight.data.sources import ArraySource, ImageSplit
from etflight.utils.errors import UserError
from tests.data.refusals import assert_refused
from tests.training import new_trainer


def positions(loader):
    """What the `arrays` fixture wrote into the pixels: each image's position in its split."""
    return [int(i) for images, _ in loader for i in images[:, 0, 0, 0]]


def on_rank(data, world_size, rank):
    """Gives a data module a world size and a rank, as an attached trainer does."""
    data._world = lambda: (world_size, rank)
    return data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance_ratio": 0.01}, "imbalance_ratio is 0.01: .*not its inverse"),
        ({"imbalance_ratio": float("nan")}, "imbalance_ratio is nan"),
        ({"profile": "linear"}, "profile is 'linear': give exp, step, none"),
        ({"max_count": 0}, "max_count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"cutmix": -1.0}, "cutmix is -1.0"),
        ({"color_jitter": 1.1}, "color_jitter is 1.1"),
        ({"auto_augment": "autoaugment"}, "auto_augment 'autoaugment' is unknown"),
        ({"cutout": -1}, "cutout is -1"),
        ({"random_erasing": 1.5}, "random_erasing is 1.5"),
        ({"views": 0}, "views is 0"),
        ({"views": 2, "mixup": 1.0}, "views is 2: mixup and cutmix take one view"),
        ({"views": 10**30}, "below 2"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
        ({"eval_batch_size": 2**31}, "eval_batch_size is 2147483648"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        *(({"mixup": alpha}, f"mixup is {alpha}") for alpha in (1e-300, inf, nan)),
        *(({"mean": mean}, "mean is .* divided by 255") for mean in ([], [127.5], [0.5, nan])),
        *(({"std": std}, "std is .* divided by 255") for std in ([0.0], [0.5, inf])),
        ({"batch_size": 2**31}, "batch_size is 2147483648"),
        ({"batch_size": None}, "batch_size is null"),
        ({"sampler": "balanze"}, "give one of instance, sqrt"),
        ({"profile": [1, 2], "max_count": 3}, "explicit counts: leave out imbalance_ratio and max_count"),
    ],
)
def test_an_option_out_of_range_is_refused_before_any_file_is_read(options, message):
    with pytest.raises(UserError, match=message):
        ArrayImages("nowhere.npz", **options)


def test_construction_reads_no_file_and_setup_does():
    data = ArrayImages("nowhere.npz", imbalance_ratio=10)
    with pytest.raises(UserError, match=r"nowhere\.npz is no \.npz file \(No such file"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"test_labels": np.full(13, 3)}, {}, "label 3 of test image 0 is outside 0 … 2"),
        ({"test_labels": np.full(13, -1)}, {}, "label -1 of test image 0 is outside"),
        ({"train_labels": np.zeros(70, int)}, {}, "has 1 class: a classifier needs at least two"),
        (
            {"class_names": np.array(["cat", "dog", "cow"])},
            {"max_count": 30},
            r"class 1 \(dog\) .* has 20 .*, 30 were asked",
        ),
        (
            {"train_labels": np.repeat([0, 1, 2], [60, 9, 1])},
            {"val_fraction": 0.1, "max_count": 9},
            r"class 1 \(1\) .and 1 more. has 8 training images, 9 were asked.*val_fraction 0.1 is held out first",
        ),
    ],
)
def test_what_the_set_cannot_give_is_named_with_the_set(arrays, changes, options, message):
    with pytest.raises(UserError, match=rf"ArrayImages .*set\.npz.*{message}"):
        ArrayImages(arrays(**changes), **options).setup()


class OwnSet(ImageDataModule):
    """A set of somebody else, whose test images have this shape."""

    class_names = ("one", "other")
    num_channels = 1
    test_shape = (1, 16, 16)

    def load(self, split):
        shape = (1, 16, 16) if split == "train" else self.test_shape
        return ArraySource(torch.zeros(6, *shape, dtype=torch.uint8), torch.arange(6) % 2)


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 16, 16)], ids=["size", "channels"])
def test_splits_of_one_set_have_images_of_one_shape(shape):
    data = OwnSet()
    data.test_shape = shape
    other = " × ".join(map(str, shape))
    assert_refused(data, "fit", f"of test are {other}, but those of train are 1 × 16 × 16 .C × H × W.: give all splits")
    OwnSet().setup()


def test_what_cannot_be_asked_of_a_set_is_refused(arrays):
    with pytest.raises(UserError, match="split 'valid' is unknown: give one of train, val, test"):
        ArrayImages(arrays()).eval_dataloader("valid")
    with pytest.raises(UserError, match="mean has 2 numbers for 3 channels"):
        ArrayImages(arrays(), mean=[0.1, 0.2]).eval_transform((torch.zeros(1, 3, 2, 2), torch.zeros(1)))
    with pytest.raises(UserError, match="3 training images for 4 ranks"):
        on_rank(ArrayImages(arrays(), profile=[1, 1, 1]), 4, 0).train_dataloader()


@pytest.mark.parametrize("seed", [0, 5])
def test_the_profile_chooses_by_the_fields_rule(arrays, seed):
    path = arrays()
    labels = np.load(path)["train_labels"]
    data = ArrayImages(path, imbalance_ratio=8, seed=seed)
    data.setup("fit")
    assert data.class_counts.tolist() == [40, 14, 5] == class_counts(3, 40, 8).tolist()
    chosen = long_tailed_subset(labels, [40, 14, 5], seed)
    assert data.subset_indices.tolist() == chosen.tolist()
    assert data.fingerprint == f"{data.content}-{fingerprint(chosen)}"
    assert positions(data.eval_dataloader("train")) == chosen.tolist()
    assert ArrayImages(path).subset_indices.tolist() == list(range(70))  # at ratio 1 the set as it is


def test_setup_for_fit_says_once_what_is_trained_on(arrays, caplog, monkeypatch):
    # Whether Lightning's logger propagates depends on when it was imported, and older pytest listens to the root only.
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    data = ArrayImages(path := arrays(), imbalance_ratio=8)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        first = data.split("train")
        data.setup()
    assert data.split("train") is first
    lines = [record.message for record in caplog.records if path in record.message]
    assert lines == [f"ArrayImages {path}: 59 training images, 3 classes, imbalance ratio 8, subset {data.fingerprint}"]


@pytest.mark.parametrize(("ratio", "text"), [(8, "8"), (9, "10 (9 asked; counts are whole)")])
def test_the_ratio_that_whole_counts_have_is_told_beside_the_one_asked_for(arrays, ratio, text):
    assert ArrayImages(arrays(), imbalance_ratio=ratio).describe_ratio() == text


def test_validation_is_held_out_per_class_before_the_profile(arrays):
    data = ArrayImages(path := arrays(), val_fraction=0.04, imbalance_ratio=4)
    data.setup("fit")
    assert data.val_is_held_out
    val = data.split("val")
    assert val.labels.bincount().tolist() == [2, 1, 1]  # rounded, at least one
    assert not set(val.indices.tolist()) & set(data.subset_indices.tolist())
    assert data.class_counts.tolist() == class_counts(3, 38, 4).tolist()
    again, other = (ArrayImages(path, val_fraction=0.04, seed=seed).split("val").indices for seed in (0, 1))
    assert torch.equal(val.indices, again)
    assert not torch.equal(val.indices, other)


@pytest.mark.parametrize("fraction", [0.01, 0.4, 0.9])
def test_no_class_loses_its_last_training_image_to_validation(arrays, fraction):
    data = ArrayImages(arrays(train_labels=np.repeat([0, 1, 2], [67, 2, 1])), val_fraction=fraction)
    data.setup("fit")
    held_out = data.split("val").labels.bincount(minlength=3).tolist()
    assert held_out == [round(67 * fraction), 1, 0]
    assert data.class_counts.tolist() == [67 - held_out[0], 1, 1]


def test_training_says_once_how_many_classes_lose_a_third_or_more_of_their_images_to_validation(arrays, capsys):
    path = arrays(train=(61, 6, 3))
    line = "val_fraction 0.05 takes a third or more of the training images of 1 of 3 classes, since it takes at least one of each"
    data = ArrayImages(path, val_fraction=0.05)
    for _ in range(2):
        data.setup("fit")
    assert capsys.readouterr().err == f"etflight: warning: ArrayImages {path}: {line}\n"
    for fraction in (0.0, 0.34):  # the second is what was asked for
        assert ArrayImages(path, val_fraction=fraction).cost_of_validation is None
    ArrayImages(arrays(train=(60, 6, 4)), val_fraction=0.05).setup("fit")
    assert capsys.readouterr().err == ""


def test_without_a_validation_split_the_test_set_is_watched(arrays):
    data = ArrayImages(arrays())
    assert not data.val_is_held_out
    assert positions(data.val_dataloader()) == positions(data.test_dataloader()) == list(range(13))


def test_the_sets_own_validation_split_is_used(arrays):
    images, labels = np.full((4, 2, 4, 3), 9, np.uint8), np.array([0, 1, 2, 0])
    data = ArrayImages(arrays(val_images=images, val_labels=labels))
    assert data.val_is_held_out
    assert positions(data.val_dataloader()) == [9, 9, 9, 9]
    assert ArrayImages(data.path, val_fraction=0.1).split("val").labels.bincount().tolist() == [4, 2, 1]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_eval_dataloader_has_every_sample_once_over_all_ranks(arrays, split, world_size):
    path = arrays()
    parts = []
    for rank in range(world_size):
        data = on_rank(ArrayImages(path, imbalance_ratio=4, val_fraction=0.2, batch_size=4), world_size, rank)
        parts.append(positions(data.eval_dataloader(split)))
    assert sorted(chain(*parts)) == sorted(data.split(split).indices.tolist())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_a_batch_is_fetched_whole_and_reaches_the_step_uncopied(loader, arrays, monkeypatch):
    data = ArrayImages(arrays(), batch_size=7, val_fraction=0.1)
    fetched, fetch = [], ImageSplit.__getitems__

    def count(split, positions):
        fetched.append(fetch(split, positions))
        return fetched[-1]

    monkeypatch.setattr(ImageSplit, "__getitems__", count)
    monkeypatch.setattr(ImageSplit, "__getitem__", None)  # calling it is an error
    batches = list(getattr(data, loader)())
    assert len(batches) == len(fetched) > 0
    assert (batches[0][0].shape, batches[0][0].dtype, batches[0][1].dtype) == ((7, 3, 2, 4), torch.uint8, torch.int64)
    assert batches[0][0].is_contiguous()
    for (images, labels), (pixels, targets) in zip(batches, fetched, strict=True):
        assert images is pixels
        assert labels is targets


def test_images_keep_their_labels_and_layout(arrays):
    path = arrays(train_images=np.random.default_rng(1).integers(0, 256, (70, 2, 4, 3), dtype=np.uint8))
    stored = np.load(path)
    data = ArrayImages(path, imbalance_ratio=4)
    images, labels = data.split("train")[3]
    index = data.subset_indices[3]
    assert (data.sample_name("train", 3), data.sample_name("test", 3)) == (str(index), "3")
    assert np.array_equal(images.permute(1, 2, 0), stored["train_images"][index])
    assert labels == stored["train_labels"][index]


def test_the_sampling_policy_reaches_the_loader(arrays):
    loader = ArrayImages(arrays(), sampler="0.5", seed=3, batch_size=8).train_dataloader()
    assert isinstance(loader.sampler, ImbalancedSampler)
    assert (loader.sampler.policy, loader.sampler.seed) == (0.5, 3)
    assert positions(loader) == list(loader.sampler)


def test_eval_transform_only_normalises(arrays):
    data = ArrayImages(arrays(), mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 2.0], mixup=1.0, crop_padding=2)
    images, labels = data.eval_transform((torch.full((2, 3, 2, 4), 255, dtype=torch.uint8), torch.tensor([0, 2])))
    torch.testing.assert_close(images[1, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))
    assert labels.tolist() == [0, 2]


def test_options_override_the_standard_recipe():
    batch = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.zeros(64).long()
    standard, own = Digits(), Digits(crop_padding=1, flip=True, mean=[0.0], std=[1.0])
    assert torch.equal(standard.train_transform(batch, 0)[0], standard.eval_transform(batch)[0])
    augmented = own.train_transform(batch, 0)[0] * 255
    uncut = [i for i, image in enumerate(augmented) if not (image == 0).any()]
    assert not any(torch.equal(augmented[i], batch[0][i]) for i in uncut)


def test_options_reach_the_module_from_the_command_line(arrays):
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    path = arrays()
    arguments = ["--data", "ArrayImages", "--data.path", path, "--data.imbalance_ratio", "4", "--data.sampler", "0.5"]
    data = parser.instantiate(parser.parse_string(parser.dump(parser.parse_args(arguments)))).data
    assert (data.path, data.imbalance_ratio, data.sampler) == (path, 4.0, "0.5")
    explicit = parser.parse_args(["--data", "ArrayImages", "--data.path", path, "--data.profile", "[5, 4, 3]"])
    assert parser.instantiate(explicit).data.class_counts.tolist() == [5, 4, 3]
    with pytest.raises(SystemExit):
        parser.parse_args(["--data", "ArrayImages", "--data.path", path, "--data.profile", "linear"])


class Recorder(LightningModule):
    """Records the batches it is given; optionally stops in the middle of an epoch."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_at = stop_at
        self.steps, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        self.steps.append((self.global_step, [tensor.clone() for tensor in batch]))
        if self.global_step + 1 == self.stop_at:
            self.trainer.should_stop = True
        return self.weight

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == self.stop_at:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/middle.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, root, model=None, ckpt_path=None, **options):
    model = model or Recorder()
    runs = new_trainer(default_root_dir=root, **{"max_epochs": 3, "num_sanity_val_steps": 0, **options})
    runs.fit(model, data, ckpt_path=ckpt_path)
    return model


class Scheduled(Recorder):
    """Says its schedule as the classifier does."""

    def __init__(self, lr_scheduler):
        super().__init__()
        self.save_hyperparameters()


PLATEAU = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau", "init_args": {}}
STOPS = [EarlyStopping("val/acc", mode="max"), EarlyStopping("train/loss"), ModelCheckpoint(monitor="nc/val/nc4")]


@pytest.mark.parametrize(
    ("options", "callbacks", "schedule", "choosing"),
    [
        ({}, STOPS, None, "EarlyStopping and ModelCheckpoint will choose"),
        ({}, [], PLATEAU, "ReduceLROnPlateau will choose"),
        ({}, [], PLATEAU | {"init_args": {"monitor": "train/loss"}}, None),
        ({}, [EarlyStopping("train/loss"), ModelCheckpoint()], None, None),
        ({"val_fraction": 0.2}, STOPS, PLATEAU, None),
    ],
)
def test_a_training_says_what_will_choose_by_a_test_set_that_it_watches(
    options, callbacks, schedule, choosing, arrays, tmp_path, capsys
):
    data = ArrayImages(arrays(), batch_size=32, **options)
    runs = new_trainer(*callbacks, default_root_dir=tmp_path, max_epochs=0, enable_checkpointing=True)
    runs.fit(Scheduled(schedule), data)
    lines = [line for line in capsys.readouterr().err.splitlines() if "choose by" in line]
    assert len(lines) == (choosing is not None)
    assert choosing is None or f"the validation images are the test set, but {choosing} by them" in lines[0]


def test_training_batches_are_augmented_by_step_and_validation_only_normalised(arrays, tmp_path):
    data = ArrayImages(path := arrays(), batch_size=32, crop_padding=2, flip=True, mixup=1.0, sampler="balanced")
    model = fit(data, tmp_path)
    fresh = ArrayImages(path, batch_size=32, crop_padding=2, flip=True, mixup=1.0, sampler="balanced")
    loader = fresh.train_dataloader()
    expected = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        expected += list(loader)
    assert [step for step, _ in model.steps] == list(range(9))
    for (step, seen), batch in zip(model.steps, expected, strict=True):
        for one, other in zip(seen, fresh.train_transform(batch, step, 0), strict=True):
            assert torch.equal(one, other)
    for seen, batch in zip(model.evaluated[:1], fresh.val_dataloader(), strict=True):
        assert torch.equal(seen[0], fresh.eval_transform(batch)[0])


@pytest.mark.parametrize(("num_workers", "stop_at", "limit"), [(0, 2, 1.0), (0, 4, 2), (0, 5, 1.0), (1, 5, 2)])
def test_a_run_resumed_within_an_epoch_sees_the_batches_it_would_have_seen(
    arrays, tmp_path, num_workers, stop_at, limit
):
    path = arrays()

    def data():
        return ArrayImages(path, batch_size=24, mixup=1.0, sampler="sqrt", num_workers=num_workers)

    options = {"limit_train_batches": limit, "limit_val_batches": 0, "max_epochs": 4}
    whole = fit(data(), tmp_path, **options)
    fit(data(), tmp_path, Recorder(stop_at), **options)
    resumed = fit(data(), tmp_path, ckpt_path=tmp_path / "middle.ckpt", **options)
    assert [step for step, _ in resumed.steps] == list(range(stop_at, len(whole.steps)))
    for (_, seen), (_, expected) in zip(resumed.steps, whole.steps[stop_at:], strict=True):
        assert torch.equal(seen[0], expected[0])
        assert torch.equal(seen[1], expected[1])


def test_an_epoch_of_a_few_images_alone_goes_on_where_it_stopped(arrays, tmp_path):
    options = {"overfit_batches": 4, "limit_val_batches": 0, "max_epochs": 2}
    whole = fit(ArrayImages(arrays(), batch_size=16), tmp_path, **options)
    fit(ArrayImages(arrays(), batch_size=16), tmp_path, Recorder(3), **options)
    resumed = fit(ArrayImages(arrays(), batch_size=16), tmp_path, ckpt_path=tmp_path / "middle.ckpt", **options)
    assert [step for step, _ in resumed.steps] == list(range(3, 8))
    for (_, seen), (_, expected) in zip(resumed.steps, whole.steps[3:], strict=True):
        assert torch.equal(seen[0], expected[0])


def test_progressive_sampling_takes_its_epochs_from_the_trainer(arrays, tmp_path):
    data = ArrayImages(arrays(), sampler="progressive")
    with pytest.raises(UserError, match="number of epochs"):
        data.train_dataloader()
    fit(data, tmp_path, max_epochs=2)
    assert data.trainer.train_dataloader.sampler.num_epochs == 2
