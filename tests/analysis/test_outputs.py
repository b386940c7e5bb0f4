"""Outputs of a classifier over a split."""

import torch
from torch.testing import assert_close

from etflight import Classifier
from etflight.analysis.outputs import Outputs, outputs
from etflight.data import Digits
from tests.training import seen


def new_model():
    torch.manual_seed(0)
    return Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 1})


def test_outputs_are_those_of_each_image_once_in_order_and_leave_the_model_as_it_was():
    model, data = new_model().train(), Digits(eval_batch_size=77)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = outputs(model, data, "test")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    features, embedding, logits, labels = seen(
        data, "test", model.features, lambda x: model.head.embed(model.features(x)), model
    )
    for name, expected in {"features": features, "embedding": embedding, "logits": logits, "labels": labels}.items():
        assert_close(getattr(found, name), expected)


def _outputs(rank):
    return tuple(outputs(new_model(), Digits(), "test"))


def test_all_processes_get_all_outputs_in_order(two_processes):
    alone = outputs(new_model(), Digits(), "test")
    for found in two_processes(_outputs, [(), ()]):
        for values, expected in zip(Outputs(*found), alone, strict=True):
            assert_close(values, expected, rtol=1e-5, atol=1e-5)
