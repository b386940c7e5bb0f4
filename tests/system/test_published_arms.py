"""Each arm that somebody has published, as the command line resolves it, against what was read in its source."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

import etflight.optim

CONFIGS = Path(__file__).parents[2] / "configs"
# controls and variants of our own
OWN = {
    "balanced_softmax_sqrt", "ce", "ce_balanced", "ce_balanced_sampling", "ce_bn_norm", "ce_bn_norm_balanced", "ce_cosine", "ce_frozen",
    "etf_bce", "etf_ce", "etf_ce_la", "etf_ce_la_rotation", "etf_ce_la_sam", "etf_ce_la_sqrt", "etf_ce_learn_scale", "etf_ce_reserved",
    "etf_ce_unscaled", "etf_dr", "etf_dr_rotation", "etf_dr_sqrt_balanced", "etf_mislas",
}  # fmt: skip


class Source(NamedTuple):
    """Where an arm was published, what it says, and where ours differs on purpose: the value and the reason."""

    read_in: str
    says: dict[str, Any]
    ours: dict[str, tuple[Any, str]] = {}  # noqa: RUF012


def steps(*factors):
    """Factors of the learning rate by epochs, counted from 1: 5 of warm-up, then 1, and others after 160 and after 180."""
    return dict(
        zip((1, 5, 6, 160, 161, 180, 181, 200), (0.2, 1, 1, 1, *factors[:1] * 2, *factors[1:] * 2), strict=True)
    )


SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 2e-4, "batch": 128}
LONG = {**SGD, "epochs": 200, "rates": steps(0.1, 0.01), "sampler": None, "width": 1}
SHORT = {
    "epochs": 10,
    "rates": {e: (1 + math.cos(math.pi * (e - 1) / 10)) / 2 for e in (1, 4, 10)},
    "sampler": "balanced",
}

SHARED = "that of the set's protocol, Yang et al.'s, which all arms share"
STEPS = (steps(0.1, 0.01), SHARED)
MIXUP = (1.0, SHARED)

YANG = "NeuralCollapseApplications/ImbalancedLearning at 2ebb309: train.py, config/cifar{10,100}/Res_cifar*_imb001_ETF_DR.yaml"
CAO = "kaidic/LDAM-DRW at 6feb304: cifar_train.py, losses.py, models/resnet_cifar.py"
CUI = "richardaecn/class-balanced-loss at 0ab6eb7: src/cifar_main.py, cifar_im_trainval_cb.sh"
MENON = "google-research/google-research at 1d4d2f1: logit_adjustment/main.py, utils.py"
REN = "jiawei-ren/BalancedMetaSoftmax-Classification at 502ba89: config/CIFAR10_LT/balanced_softmax_imba200.yaml"
KANG = "facebookresearch/classifier-balancing at 22370c6: config/ImageNet_LT/cls_crt.yaml, cls_lws.yaml; arXiv 1910.09217, section 4"
ZHONG = (
    "dvlab-research/MiSLAS at bb5ba7e, dcdc6cf: train_stage2.py, config/cifar{10,100}/cifar*_imb001_stage2_mislas.yaml"
)
KOROMILAS = "pakoromilas/nc_by_design at 371cb2f: README.md, losses.py, configs/ce_cifar.yaml"
YANG_2023 = "NeuralCollapseApplications/FSCIL at 7aaffd6: configs/cifar/resnet12_etf_bs512_200e_cifar.py, configs/_base_, ETFHead.py"
RBL = "its released code and logs for CIFAR-10-LT at 100; in its linear layer ours has no bias"
LIN = "arXiv 1708.02002, section 5.1: gamma 2 works best; a detector, so no schedule to compare"

LDAM_DRW = {
    **LONG, "rates": steps(0.01, 1e-4), "mixup": 0.0, "head": "CosineHead", "head.scale": 30, "loss": "LDAMLoss", "loss.scale": 30,
    "loss.max_margin": 0.5, "loss.class_balance": "none", "loss.beta": 0.9999, "loss.exponent": 1, "loss.renormalize": True,
    "deferred.epoch": 160, "deferred.class_balance": "effective", "deferred.sampler": None,
}  # fmt: skip
# ImageNet-LT's; none was released for CIFAR
CRT = {
    **SHORT, "lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4, "batch": 512, "mixup": 0.0, "head": "LinearHead", "loss": "CrossEntropyLoss",
    "loss.class_balance": "none", "fine_tuning.freeze": ["backbone"], "fine_tuning.load": {"backbone": "backbone"},
    "fine_tuning.freeze_statistics": True, "post_hoc": None,
}  # fmt: skip
OF_THE_SET = {name: (SGD[name], f"released for ImageNet-LT only; {SHARED}") for name in ("lr", "weight_decay", "batch")}
MISLAS = {
    **SGD, **SHORT, "mixup": 0.0, "head": "ScaledLinearHead", "loss": "LabelAwareSmoothingLoss", "loss.shape": "concave", "width": 1,
    "loss.class_balance": "none", "fine_tuning.freeze": ["backbone"], "fine_tuning.load": {"backbone": "backbone", "head": "head.linear"},
}  # fmt: skip
SMOOTHING = {"loss.head_smoothing": 0.3, "loss.tail_smoothing": 0.0}
SOURCES = {
    "etf_dr_balanced": Source(
        YANG,
        {**LONG, "mixup": 1.0, "head": "ETFHead", "head.batch_norm": True, "head.normalize": True,
         "head.scale": 1, "loss": "DotRegressionLoss", "loss.length": 1, "loss.class_balance": "batch", "loss.exponent": 1},
    ),
    "ldam_drw_no_mixup": Source(CAO, LDAM_DRW, {"rates": STEPS}),
    "ldam_drw": Source(CAO, LDAM_DRW, {"rates": STEPS, "mixup": MIXUP}),
    "cb": Source(
        CUI,
        {**LONG, "rates": steps(0.01, 1e-4), "mixup": 0.0, "head": "LinearHead", "loss": "CrossEntropyLoss", "loss.label_smoothing": 0,
         "loss.class_balance": "effective", "loss.beta": 0.9999, "loss.exponent": 1, "loss.renormalize": False},
        {"rates": STEPS, "mixup": MIXUP},
    ),
    "etf_nonl": Source(
        KOROMILAS,
        {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4, "batch": 512, "epochs": 500, "mixup": 0.0, "head": "CosineHead", "head.scale": 1,
         "loss": "NONLLoss", "loss.temperature": 0.1, "loss.class_balance": "none"},
        {"lr": (0.1, SHARED), "weight_decay": (2e-4, SHARED), "batch": (128, SHARED), "epochs": (200, SHARED), "mixup": MIXUP,
         "head": ("ETFHead", "class vectors that are learnt there are the frame's here")},
    ),
    "focal": Source(LIN, {"loss": "FocalLoss", "loss.gamma": 2, "loss.class_balance": "none"}),
    "balanced_softmax": Source(
        REN,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "batch": 512, "mixup": 0.0, "head": "LinearHead",
         "loss": "LogitAdjustedLoss", "loss.tau": 1, "loss.class_balance": "none", "sampler": None},
        {"weight_decay": (2e-4, SHARED), "batch": (128, SHARED), "mixup": MIXUP},
    ),
    "logit_adjustment": Source(
        MENON,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "batch": 128, "epochs": 1241, "mixup": 0.0,
         "head": "LinearHead", "loss": "CrossEntropyLoss", "loss.class_balance": "none", "logit_adjustment": 1},
        {"nesterov": (False, SHARED), "epochs": (200, SHARED), "mixup": MIXUP},
    ),
    "etf_dr_reserved": Source(
        YANG_2023,
        {"lr": 0.25, "momentum": 0.9, "weight_decay": 5e-4, "batch": 512, "epochs": 200, "head": "ETFHead", "head.projection_dim": 512,
         "head.reserved_classes": 40, "head.batch_norm": False, "head.scale": 1, "loss": "DotRegressionLoss", "loss.length": 1,
         "loss.class_balance": "none"},
        {"lr": (0.1, SHARED), "weight_decay": (2e-4, SHARED), "batch": (128, SHARED),
         "head.batch_norm": (True, "our projection has BatchNorm where theirs has LayerNorm and a linear path beside it")},
    ),
    "rbl": Source(
        RBL,
        {"lr": 0.1, "nesterov": True, "weight_decay": 5e-4, "batch": 256, "epochs": 600, "mixup": 0.0, "head": "ETFHead",
         "head.projection_dim": 256, "head.linear_projection": True, "head.batch_norm": False, "head.normalize": False,
         "head.learn_rotation": True, "loss": "CrossEntropyLoss", "loss.class_balance": "none", "logit_adjustment": 1},
        {"nesterov": (False, SHARED), "weight_decay": (2e-4, SHARED), "batch": (128, SHARED), "epochs": (200, SHARED), "mixup": MIXUP},
    ),
    "crt": Source(KANG, CRT, OF_THE_SET),
    "lws": Source(
        KANG,
        {**CRT, "epochs": 5, "rates": {1: 1, 6: 0}, "head": "ScaledLinearHead", "fine_tuning.freeze": ["backbone", "head.linear"],
         "fine_tuning.load": {"backbone": "backbone", "head": "head.linear"}},
        {**OF_THE_SET, "epochs": (10, "as cRT's"), "rates": ({1: 1, 6: 0.5}, "as cRT's")},
    ),
    "tau_norm": Source(
        KANG, {"post_hoc": "TauNormalization", "post_hoc.tau": None},
        {"post_hoc.tau": (1, "chosen on held-out images from 0 to 1; an arm needs one, and 1 makes all norms alike")},
    ),
    "ncm": Source(KANG, {"post_hoc": "NearestClassMean"}),
    "mislas": Source(ZHONG, {**MISLAS, **SMOOTHING, "lr_scale": {"head.linear": 0.5}, "fine_tuning.freeze_statistics": True}),
    "mislas_cifar100": Source(
        ZHONG,
        {**MISLAS, "loss.head_smoothing": 0.4, "loss.tail_smoothing": 0.1, "lr_scale": {"head.linear": 0.2},
         "fine_tuning.freeze_statistics": False},
    ),
    "label_aware_smoothing": Source(
        ZHONG,
        {name: MISLAS[name] for name in ("epochs", "mixup", "sampler", "head", "loss", "loss.shape")}
        | SMOOTHING,
        {name: (value, "a control: the loss of the second stage from the start") for name, value in
         {"epochs": 200, "mixup": 1.0, "sampler": None, "head": "LinearHead"}.items()},
    ),
}  # fmt: skip


def name_of(spec):
    return spec["class_path"].rpartition(".")[2] if spec else None


def flat(prefix, spec):
    return {prefix: name_of(spec), **{f"{prefix}.{k}": v for k, v in (spec or {}).get("init_args", {}).items()}}


def facts(config, epochs):
    """What a resolved configuration comes to, with the learning rate's factors in these epochs."""
    data, model, trainer = config["data"]["init_args"], config["model"], config["trainer"]
    sgd, last = model["optimizer"]["init_args"], trainer["max_epochs"]
    deferred = flat("deferred", next((c for c in trainer["callbacks"] or [] if name_of(c) == "DeferredBalance"), None))
    if "deferred.epoch" in deferred:
        deferred["deferred.epoch"] = round(deferred["deferred.epoch"] * last)
    return {
        **sgd, "batch": data["batch_size"], "epochs": last, "sampler": data["sampler"], "mixup": data["mixup"],
        "width": (model["model_kwargs"] or {}).get("width", 1), "lr_scale": model["lr_scale"],
        "logit_adjustment": model["logit_adjustment"], "rates": {e: r for e, r in rates(model, last) if e in epochs},
        **flat("head", model["head"]), **flat("loss", model["loss"]), **flat("post_hoc", config["post_hoc"]),
        **{f"fine_tuning.{name}": value for name, value in config["fine_tuning"].items()}, **deferred,
    }  # fmt: skip


def rates(model, last):
    """Epochs, counted from 1, and what the learning rate is multiplied by."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = dict(model["lr_scheduler"]["init_args"])
    if "total_epochs" in options:
        options["total_epochs"] = last
    schedule = getattr(etflight.optim, name_of(model["lr_scheduler"]))(optimizer, **options)
    for epoch in range(1, last + 1):
        yield epoch, pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        schedule.step()


def files(arm):
    name, without, _ = arm.partition("_no_mixup")
    parts = ["data/cifar10_lt", f"arms/{name}", *(["protocols/no_mixup"] if without else [])]
    return [CONFIGS / f"{part}.yaml" for part in parts]


def resolved(etflight_command, files, cwd):
    """What the command line makes of configuration files."""
    printed = etflight_command(
        "fit", *(word for file in files for word in ("-c", file)), "--print_config", cwd=cwd
    ).ran()
    return yaml.safe_load(printed.out)


@pytest.mark.parametrize("arm", SOURCES)
def test_an_arm_is_what_its_source_says_but_for_what_stands_here_with_a_reason(arm, etflight_command, tmp_path):
    source = SOURCES[arm]
    expected = source.says | {name: value for name, (value, _) in source.ours.items()}
    found = facts(resolved(etflight_command, files(arm), tmp_path), expected.get("rates", {}))
    assert {name: found[name] for name in expected} == expected
    for name, (value, reason) in source.ours.items():
        assert reason
        assert source.says[name] != value, f"{name} is as published: no reason is needed"


def test_every_arm_has_its_source_or_is_our_own():
    published = SOURCES.keys() - {"ldam_drw_no_mixup"}
    assert {path.stem for path in (CONFIGS / "arms").iterdir()} == OWN | published
