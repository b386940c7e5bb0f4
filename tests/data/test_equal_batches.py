"""Processes wait for each other in every step, so they must have the same number of them, whatever the numbers are."""

from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etflight.data import ImageDataModule, ImbalancedSampler
from etflight.data.sampler import POLICIES
from etflight.data.sources import ArraySource

EPOCHS = 4


@dataclass(eq=False, kw_only=True)
class Numbered(ImageDataModule):
    """Images of one pixel, which holds their position."""

    size: int

    num_classes = 3
    num_channels = 1
    class_names = ("a", "b", "c")

    def load(self, split):
        numbers = torch.arange(self.size)
        return ArraySource(numbers.to(torch.uint8).view(-1, 1, 1, 1), numbers % 7 % 3)


def batches_of(data, processes, rank, epoch, served=0):
    """What one process is served, image by image, of the data module's own loader."""
    data.trainer = SimpleNamespace(
        world_size=processes,
        global_rank=rank,
        max_epochs=EPOCHS,
        num_training_batches=10**6,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    loader = data.train_dataloader()
    loader.load_state_dict({"served": served})
    loader.sampler.set_epoch(epoch)
    batches = [images.flatten().tolist() for images, _ in loader]
    assert len(loader) == served + len(batches)
    return batches


@given(data=st.data())
@settings(max_examples=150)
def test_every_process_has_as_many_batches_and_together_they_are_those_of_one_process(data):
    processes, batch_size = data.draw(st.integers(1, 5), "processes"), data.draw(st.integers(1, 20), "batch size")
    most = min(5 * processes * batch_size + 3, 256)  # a pixel tells no more apart
    size = data.draw(st.integers(max(3, processes), most), "images")
    policy, epoch = data.draw(st.sampled_from([*POLICIES, 0.3]), "policy"), data.draw(st.integers(0, EPOCHS - 1))
    images = Numbered(size=size, batch_size=batch_size, sampler=policy)
    parts = [batches_of(images, processes, rank, epoch) for rank in range(processes)]
    (steps,) = {len(part) for part in parts}

    # what one process would draw, of which only a tail too small for all may be left out
    sampler = ImbalancedSampler(images.split("train").labels, policy, num_epochs=EPOCHS)
    sampler.set_epoch(epoch)
    drawn, together = sampler.draw().tolist(), processes * batch_size
    tail = size % together
    starves = size > together and (tail < 2 * processes or 8 * tail < together)
    kept = drawn[: size - tail] if starves else drawn
    expected = [sorted(kept[start : start + together]) for start in range(0, len(kept), together)]
    assert [sorted(chain.from_iterable(part[step] for part in parts)) for step in range(steps)] == expected

    sizes = [len(batch) for part in parts for batch in part]
    assert min(sizes) >= (2 if batch_size > 1 and size >= 2 * processes else 1)

    # a resumed epoch
    served = data.draw(st.integers(0, steps), "served")
    for rank, part in enumerate(parts):
        assert batches_of(images, processes, rank, epoch, served) == part[served:]


@pytest.mark.parametrize(("size", "steps"), [(64, 1), (66, 1), (71, 1), (72, 2), (130, 2), (3, 1)])
def test_a_last_batch_of_less_than_an_eighth_is_not_trained_on(size, steps):
    assert len(Numbered(size=size, batch_size=64).train_dataloader()) == steps
