import numpy as np
import torch
from sklearn.datasets import load_digits

from etflight.data import Digits


def test_the_test_images_are_fifty_per_class_for_every_seed():
    test = [Digits(seed=seed, imbalance_ratio=10).split("test") for seed in (0, 1)]
    assert test[0].labels.bincount().tolist() == [50] * 10
    assert torch.equal(test[0].source.pixels, test[1].source.pixels)


def test_training_and_test_images_are_the_1797_of_scikit_learn():
    data = Digits()
    data.setup()
    train, test = data.split("train"), data.split("test")
    assert (len(train), len(test)) == (1297, 500)
    pixels = torch.cat([train.source.pixels, test.source.pixels]).squeeze(1).numpy()
    labels = torch.cat([train.labels, test.labels]).numpy()
    assert (pixels.min(), pixels.max(), pixels.shape) == (0, 255, (1797, 8, 8))
    published = load_digits()
    ours = sorted((*np.rint(image / (255 / 16)).ravel(), label) for image, label in zip(pixels, labels, strict=True))
    assert ours == sorted(
        (*image.ravel(), label) for image, label in zip(published.images, published.target, strict=True)
    )


def test_normalised_digits_have_zero_mean_and_unit_deviation():
    data = Digits(batch_size=2000)
    images, _ = data.eval_transform(next(iter(data.eval_dataloader("train"))))
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


def test_a_long_tail_starts_at_what_every_class_can_give():
    data = Digits(imbalance_ratio=20)
    data.setup("fit")
    assert data.class_counts.tolist() == [128, 91, 65, 47, 33, 24, 17, 12, 8, 6]
