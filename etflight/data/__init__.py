"""Data modules, long-tailed profiles and the sampler."""

from etflight.data.arrays import ArrayImages
from etflight.data.base import ImageDataModule
from etflight.data.digits import Digits
from etflight.data.folder import FolderImages
from etflight.data.profiles import class_counts
from etflight.data.sampler import ImbalancedSampler
from etflight.data.torchvision_sets import CIFAR10, CIFAR100, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "ArrayImages",
    "Digits",
    "FashionMNIST",
    "FolderImages",
    "ImageDataModule",
    "ImbalancedSampler",
    "class_counts",
]
