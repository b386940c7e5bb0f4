import pytest
from torch import nn

from etflight import Classifier, CrossEntropyLoss, DotRegressionLoss, ETFHead
from etflight.callbacks.progress import describe_step, has_unsynced_batch_norm


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (
            {
                "processes": 2,
                "batch_size": 64,
                "accumulated": 2,
                "lr": 0.1,
                "loss": DotRegressionLoss(class_balance="batch"),
            },
            "global batch 256 = 2 processes x 64 images x 2 accumulated; learning rate 0.1 as given (not scaled with the batch); "
            "class balance 'batch' (exponent 1): counts over all processes of a step, not over accumulated micro-batches",
        ),
        (
            {
                "processes": 1,
                "batch_size": 32,
                "accumulated": 1,
                "lr": 0.003,
                "loss": CrossEntropyLoss(class_balance="global", exponent=0.5),
            },
            "global batch 32 = 1 process x 32 images; learning rate 0.003 as given (not scaled with the batch); "
            "class balance 'global' (exponent 0.5): the training set's counts",
        ),
        (
            {
                "processes": 1,
                "batch_size": 32,
                "accumulated": 1,
                "lr": None,
                "loss": CrossEntropyLoss(class_balance="effective", beta=0.99, renormalize=True),
            },
            "global batch 32 = 1 process x 32 images; class balance 'effective' (exponent 1, beta 0.99): the training set's counts, "
            "weights divided by their mean over a step",
        ),
        (
            {"processes": 3, "batch_size": 8, "accumulated": 1, "lr": None, "loss": CrossEntropyLoss()},
            "global batch 24 = 3 processes x 8 images; class balance 'none'",
        ),
    ],
)
def test_the_line_says_what_one_step_is_made_of(facts, line):
    assert describe_step(**facts) == line


def test_batch_norm_counts_as_unsynced_until_it_is_converted():
    model = Classifier(10, "test_vit", in_chans=1, model_kwargs={"img_size": 8, "patch_size": 4}, head=ETFHead)
    assert has_unsynced_batch_norm(model)  # the head's own
    assert not has_unsynced_batch_norm(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    assert not has_unsynced_batch_norm(model.backbone)
