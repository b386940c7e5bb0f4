import timm
import torch

import etflight.backbones  # noqa: F401  registers the models


def described(name, **kwargs):
    """A network with shapes but without numbers, which take seconds to draw."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def shapes(module):
    return {name: value.shape for name, value in module.state_dict().items()}


def test_it_is_timms_resnet50_but_for_the_width_of_the_last_stage():
    wide, plain = (described(name, num_classes=0) for name in ("resnet50_wide4", "resnet50"))
    assert shapes(wide).keys() == shapes(plain).keys()
    differ = {name for name, shape in shapes(wide).items() if shape != shapes(plain)[name]}
    assert {name.split(".")[0] for name in differ} == {"layer4"}
    assert wide.layer4[2].conv3.weight.shape == (4096, 1024, 1, 1)
    assert wide.num_features == wide.head_hidden_size == 4096


def test_timms_contract_comes_with_timms_class():
    model = described("resnet50_wide4", features_only=True, in_chans=1)
    features = model(torch.empty(2, 1, 64, 64, device="meta"))
    assert model.feature_info.channels() == [f.shape[1] for f in features] == [64, 256, 512, 1024, 4096]
    with_classifier = described("resnet50_wide4")
    assert with_classifier.get_classifier().weight.shape == (1000, 4096)
    assert with_classifier.pretrained_cfg["input_size"] == (3, 224, 224)
