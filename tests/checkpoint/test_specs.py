import math
from functools import partial

import pytest
import torch

from etflight import ETFHead, Head
from etflight.checkpoint.specs import from_spec, is_plain, to_spec
from etflight.utils.errors import UserError


def test_a_class_and_a_partial_become_plain_data_and_come_back():
    spec = to_spec(partial(ETFHead, scale=4.0), "head")
    assert spec == {"class_path": "etflight.heads.ETFHead", "init_args": {"scale": 4.0}}
    head = from_spec(spec, Head, "head")(16, 10)
    assert isinstance(head, ETFHead)
    assert head.scale == 4.0
    assert to_spec(ETFHead, "head")["init_args"] == {}


@pytest.mark.parametrize(
    "path", ["os.system", "etflight.heads.nothing", "ETFHead", "heads.ETFHead", "etflight.DotRegressionLoss"]
)
def test_a_path_that_leads_to_no_head_is_refused(path):
    with pytest.raises(UserError, match="head"):
        from_spec({"class_path": path, "init_args": {}}, Head, "head")


def test_arguments_are_checked_by_name_and_must_be_plain():
    with pytest.raises(UserError, match=r"head: ETFHead\(sale=1\) cannot work: .* unexpected keyword argument 'sale'"):
        from_spec({"class_path": "etflight.ETFHead", "init_args": {"sale": 1}}, Head, "head")(8, 3)
    nested = {"scale": {"class_path": "os.system", "init_args": {}}}
    with pytest.raises(UserError, match="not plain"):
        from_spec({"class_path": "etflight.ETFHead", "init_args": nested}, Head, "head")


def test_what_no_file_could_name_is_refused():
    class Local(ETFHead):
        pass

    for bad in (lambda i, k: None, partial(ETFHead, 16), print, partial(lambda: None), 3, Local):
        with pytest.raises(UserError, match="head="):
            to_spec(bad, "head")


def test_plain_means_no_objects_and_no_class_paths_at_any_depth():
    assert is_plain({"a": [1, 2.0, None, {"b": "c"}]})
    assert not is_plain({"a": [torch.ones(1)]})
    assert not is_plain({"a": [{"class_path": "x.Y"}]})
    assert not is_plain({1: 2})


@pytest.mark.parametrize(
    ("name", "init_args", "reason"),
    [
        ("SGD", {"lr": -1.0}, r"optimizer: SGD\(lr=-1.0\) cannot work: Invalid learning rate"),
        ("SGD", {"lr": 0.1, "nesterov": True}, "Nesterov momentum requires"),
        ("SGD", {"lr": math.nan}, "lr of SGD is nan"),
        ("AdamW", {"betas": (0.9, math.inf)}, "betas of AdamW"),
        ("AdamW", {"lr": 1e38}, r"lr of AdamW is 1e\+38"),
        ("SGD", {"momentum": None}, "momentum of SGD is null"),
    ],
)
def test_what_torch_has_against_an_argument_becomes_one_line(name, init_args, reason):
    spec = {"class_path": f"torch.optim.{name}", "init_args": init_args}
    with pytest.raises(UserError, match=reason):
        from_spec(spec, torch.optim.Optimizer, "optimizer")([torch.nn.Parameter(torch.ones(1))])
