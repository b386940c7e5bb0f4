"""Data modules, long-tailed profiles and the sampler."""

from etflight.data.arrays import ArrayImages
from etflight.data.base import ImageDataModule
from etflight.data.folders import CUB200, FolderImages, TinyImageNet
from etflight.data.lists import ImageNetLT, INaturalist2018, ListImages, PlacesLT
from etflight.data.profiles import class_counts
from etflight.data.sampler import ImbalancedSampler
from etflight.data.sets import CIFAR10, CIFAR100, GTSRB, STL10, SVHN, Digits, FashionMNIST
from etflight.data.subset import ClassSubset
from etflight.data.unlabelled import UnlabelledImages

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CUB200",
    "GTSRB",
    "STL10",
    "SVHN",
    "ArrayImages",
    "ClassSubset",
    "Digits",
    "FashionMNIST",
    "FolderImages",
    "INaturalist2018",
    "ImageDataModule",
    "ImageNetLT",
    "ImbalancedSampler",
    "ListImages",
    "PlacesLT",
    "TinyImageNet",
    "UnlabelledImages",
    "class_counts",
]
