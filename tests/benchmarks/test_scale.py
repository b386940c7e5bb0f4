"""What sets of iNaturalist's size cost beside their pictures: lists and classes are real, the pictures small files on disk."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision.transforms.v2.functional import center_crop, resize

from etflight import Classifier, LinearHead
from etflight.data import ImageNetLT, INaturalist2018, files
from etflight.losses import CrossEntropyLoss
from etflight.metrics import ClassStatistics, measures
from tests.large_sets import INATURALIST, imagenet_lt, inaturalist

pytestmark = pytest.mark.benchmark

K = INATURALIST["num_classes"]
LISTS = ("iNaturalist18_train.txt", "iNaturalist18_val.txt")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The folders of the two sets, each made when it is first asked for."""
    large = tmp_path_factory.mktemp("large")

    @cache
    def made(lay_out):
        lay_out(folder := large / lay_out.__name__)
        return folder

    yield made
    shutil.rmtree(large)


@pytest.fixture(scope="module")
def root(roots):
    return roots(inaturalist)


@pytest.mark.parametrize("check", [False, True], ids=["lists alone", "and a look for each file"])
@pytest.mark.parametrize(("set_class", "lay_out"), [(INaturalist2018, inaturalist), (ImageNetLT, imagenet_lt)])
def test_training_starts_in_twice_the_time_that_the_usual_loop_over_its_lists_takes(
    set_class, lay_out, check, roots, median_ratio, record_ratio
):
    root, published = roots(lay_out), set_class.published_counts
    lists = [set_class.list_files[split] for split in ("train", "val" if "val" in published else "test")]

    def start():
        data = set_class(str(root), str(root), check_files=check)
        data.setup("fit")
        assert len(data.class_names) == len(data.class_counts) == data.num_classes
        data.train_dataloader()
        data.val_dataloader()

    def usual():
        """As released code of long-tailed learning has it."""
        for name in lists:
            paths, labels = [], []
            with (root / name).open() as file:
                for line in file:
                    paths.append(os.path.join(root, line.split()[0]))
                    labels.append(int(line.split()[1]))
            if check:
                for path in paths:
                    os.stat(path)

    ratio = median_ratio(start, usual, repeats=5, clock=time.process_time)
    what = "os.stat of each file" if check else "nothing else"
    record_ratio(f"start on {published['train']:,} images / a loop over the lines of the lists and {what}", ratio, 2)


MEMORY_OF_A_WORKER = """
import json, multiprocessing, sys, torch
from etflight.data import ListImages, files
picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
files.decode_file = lambda path, side: picture if path.endswith("jpg") else None
data = ListImages(sys.argv[1], sys.argv[2], image_size=16, num_workers=2, batch_size=512)
loader = data.train_dataloader()
for _ in range(-(-437_513 // len(data.split("train")))):
    for batch in loader:
        pass
sizes = []
for worker in multiprocessing.active_children():
    with open(f"/proc/{worker.pid}/smaps_rollup") as file:
        fields = dict(line.split()[:2] for line in file if line.endswith("kB\\n"))
    sizes.append(int(fields["Private_Clean:"]) + int(fields["Private_Dirty:"]))
print(json.dumps(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells a process's own memory")
def test_a_loader_process_needs_no_more_memory_for_more_images(root, record_ratio):
    """What it adds to the machine's memory; the list itself exists once, shared by all.

    As many draws in either, so that what a process copies because it was touched is counted.
    """
    lists = {}
    for name in ("few", "many"):
        lists[name] = root / name
        lists[name].mkdir(exist_ok=True)
        shutil.copy(root / LISTS[1], lists[name] / "test.txt")
    shutil.copy(root / LISTS[0], lists["many"] / "train.txt")
    first = {line.split()[1]: line for line in (root / LISTS[0]).read_text().splitlines(keepends=True)}
    (lists["few"] / "train.txt").write_text("".join(first.values()))  # one image of each class

    def memory(name):
        command = [sys.executable, "-c", MEMORY_OF_A_WORKER, str(root), str(lists[name])]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        workers = json.loads(output.splitlines()[-1])
        return sum(workers) / len(workers)

    few, many = memory("few"), memory("many")
    print(f"kB of a loader process: {K:,} images {few:.0f}, {INATURALIST['train']:,} images {many:.0f}")
    record_ratio(f"loader process of {INATURALIST['train']:,} images / of {K:,}, memory of its own", many / few, 1.1)


class Usual(Dataset):
    """A list of pairs, as the field writes it; the picture is there already."""

    def __init__(self, root, picture):
        words = (root / LISTS[0]).read_text().split()
        self.pairs = [(f"{root}/{path}", int(label)) for path, label in zip(words[::2], words[1::2], strict=True)]
        self.picture = picture

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, label = self.pairs[index]
        picture = self.picture if path.endswith("jpg") else None
        return center_crop(resize(picture, [224], antialias=True), [224, 224]), label


def test_an_epochs_plumbing_costs_little_more_than_the_usual_one(root, monkeypatch, median_ratio, record_ratio):
    """The draw of a whole epoch of balanced classes, and 200 of its batches, without decoding."""
    picture = torch.zeros(3, 224, 224, dtype=torch.uint8)
    monkeypatch.setattr(files, "decode_file", lambda path, side: picture if path.endswith("jpg") else None)
    options = {"check_files": False, "min_crop_scale": 1, "crop_pct": 1, "sampler": "balanced", "batch_size": 64}
    data = INaturalist2018(str(root), str(root), **options)
    pairs = Usual(root, picture)
    weights = (1 / torch.from_numpy(data.class_counts))[data.split("train").labels]
    usual = DataLoader(pairs, batch_size=64, sampler=WeightedRandomSampler(weights, len(pairs)))
    ours = data.train_dataloader()
    ratio = median_ratio(
        lambda: deque(itertools.islice(ours, 200), maxlen=0),
        lambda: deque(itertools.islice(usual, 200), maxlen=0),
        repeats=5,
        clock=time.process_time,
    )
    name = f"draw of {len(pairs):,} images and 200 batches, not decoded / of a list of pairs with WeightedRandomSampler"
    record_ratio(name, ratio, 2)


def test_validation_metrics_of_many_classes_cost_less_than_the_head(median_ratio, record_ratio):
    model = Classifier(K, "resnet50", head=LinearHead, loss=CrossEntropyLoss).eval()
    features, target = torch.randn(256, model.head.in_features), torch.randint(K, (256,))
    model.features = lambda images: images
    with torch.no_grad():
        ratio = median_ratio(
            lambda: model._evaluate((features, target), "val"),
            lambda: torch.nn.functional.cross_entropy(model.head(features), target),
            repeats=15,
        )
    record_ratio(f"head, loss and metrics of a batch / head and loss, K {K:,}, d 2048", ratio, 1.5)


def test_collapse_measures_of_many_classes_cost_a_few_products_of_their_means(median_ratio, record_ratio):
    d = 256
    generator = torch.Generator().manual_seed(0)
    metric, weight = ClassStatistics(K, d), torch.randn(K, d, generator=generator)
    for labels in torch.arange(2 * K).remainder(K).split(2048):
        metric.update(torch.randn(len(labels), d, generator=generator), labels)
    moments = metric.compute()
    means = moments.means.double()
    ratio = median_ratio(
        lambda: measures.summary(moments, weight, torch.zeros(K), spectra=False),
        lambda: means @ means.T,
        repeats=3,
        warm_up=0,
    )
    record_ratio(f"all measures but spectra / one product of the means (float64), K {K:,}, d {d}", ratio, 10)
