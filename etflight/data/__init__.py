"""Data modules, long-tailed profiles and the sampler."""

from etflight.data.arrays import ArrayImages
from etflight.data.base import ImageDataModule
from etflight.data.cub import CUB200
from etflight.data.digits import Digits
from etflight.data.folder import FolderImages
from etflight.data.gtsrb import GTSRB
from etflight.data.lists import ImageNetLT, INaturalist2018, ListImages, PlacesLT
from etflight.data.profiles import class_counts
from etflight.data.sampler import ImbalancedSampler
from etflight.data.tiny_imagenet import TinyImageNet
from etflight.data.torchvision_sets import CIFAR10, CIFAR100, STL10, SVHN, FashionMNIST
from etflight.data.unlabelled import UnlabelledImages

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CUB200",
    "GTSRB",
    "STL10",
    "SVHN",
    "ArrayImages",
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
