"""Losses on logits; each has class balance as a named option."""

from etflight.losses.base import ClassBalance as ClassBalance
from etflight.losses.base import Loss
from etflight.losses.base import check_class_balance as check_class_balance
from etflight.losses.class_weights import class_weights_of as class_weights_of
from etflight.losses.contrastive import NONLLoss, NTCELoss
from etflight.losses.cross_entropy import CrossEntropyLoss, FocalLoss
from etflight.losses.frame import SURE as SURE
from etflight.losses.frame import DotRegressionLoss
from etflight.losses.frame import temperature_of_cosines as temperature_of_cosines
from etflight.losses.frequency import BinaryCrossEntropyLoss, LabelAwareSmoothingLoss, LDAMLoss, LogitAdjustedLoss
from etflight.losses.terms import log_prior as log_prior

__all__ = [
    "BinaryCrossEntropyLoss",
    "CrossEntropyLoss",
    "DotRegressionLoss",
    "FocalLoss",
    "LDAMLoss",
    "LabelAwareSmoothingLoss",
    "LogitAdjustedLoss",
    "Loss",
    "NONLLoss",
    "NTCELoss",
]

# checkpoints and configurations name a loss by this path, whichever file holds it
for _name in __all__:
    if isinstance(_public := globals()[_name], type):
        _public.__module__ = __name__
