"""`etflight collapse …`: neural collapse of a trained checkpoint, or of any timm model, without training."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from jsonargparse import Namespace
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from timm.data.config import resolve_data_config
from torch import Tensor

import etflight.backbones  # noqa: F401  registers our networks in timm
from etflight import plotting
from etflight.analysis.features import HEAD, Caught, EmbeddingSource
from etflight.analysis.sweep import PassStatistics, sweep
from etflight.checkpoint.files import misfit, read_weights
from etflight.cli.checkpoint_option import (
    add_device,
    data_as_trained,
    device_of,
    folder_of,
    load_classifier,
)
from etflight.cli.data_option import data_parser, parse_over_run
from etflight.cli.parser import OneLineParser, add_imports
from etflight.data import ImageDataModule
from etflight.data.base import Split
from etflight.data.facts import refuse_other_shape
from etflight.metrics import Moments, measures
from etflight.runs.folder import check_writable, refuse_other_results, writing_to
from etflight.runs.record import data_facts
from etflight.utils.errors import UserError, brief, let_through
from etflight.utils.files import write_json
from etflight.utils.terminal import as_it_is, console

SPLITS: tuple[Split, ...] = ("train", "test")
PICTURES = tuple(f"{split}_{name}.png" for split in SPLITS for name in ("heat_map", "variability", "spectrum"))

# rows of the table: the meaning of each measure, and its value under perfect collapse
_ROWS = {
    "acc": ("accuracy", ""),
    "nc1": ("tr(Σ_W Σ_B⁺)/K", "0"),
    "nc1_ratio": ("tr Σ_W / tr Σ_B", "0"),
    "cdnv": ("class-distance normalised variance", "0"),
    "nc2_equinorm": ("CoV of the norms of centred means", "0"),
    "nc2_equiangularity": ("mean |cos + 1/(K-1)| of centred means", "0"),
    "etf_distance": ("of the means to the nearest simplex ETF", "0"),
    "alignment": ("cos(mean, class vector)", "1"),
    "alignment_std": ("its spread over classes", "0"),
    "nc3": ("‖M/‖M‖ - W/‖W‖‖²", "0"),
    "nc4": ("decision agrees with nearest training centre", "1"),
    "nc4_centres": ("class means decided for their own class", "1"),
    "cos_means": ("between class means", "-1/(K-1)"),
    "cos_weights": ("between class vectors", "-1/(K-1)"),
    "cos_cross": ("between means and other class vectors", "-1/(K-1)"),
    "effective_rank": ("of the centred means", "K-1"),
    "effective_rank_within": ("of Σ_W", ""),
    "missing_classes": ("without samples", ""),
    "single_sample_classes": ("with one sample", ""),
}
_OWN_WEIGHTS = "give --weights FILE of a model trained on these classes"


class Model(NamedTuple):
    """The network to measure.

    Attributes:
        name: Its name for people.
        source: The network, and where its embeddings and class vectors are.
        class_names: The names of the classes it was trained on, or None.
    """

    name: str
    source: EmbeddingSource
    class_names: list[str] | None


def main(argv: Sequence[str]) -> None:
    """Print a table of measures, and write `collapse.json` and figures.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: What the user gave cannot work.
        SystemExit: With status 2 for a usage error, 0 after help.
    """
    parser = _parser()
    config = parse_over_run(parser, argv)
    if (config.run is None) == (config.timm is None):
        raise UserError(
            "collapse measures one model: give RUN (a run folder, or a checkpoint) or --timm NAME (any timm model with its own classifier)"
        )
    if config.weights is not None and config.timm is None:
        raise UserError("--weights goes with --timm NAME: a checkpoint of etflight is given alone")
    data: ImageDataModule
    if config.run is None:
        data = parser.instantiate(config).data
        data.prepare_data()
        model = _from_timm(config, data)
        folder, name = Path("runs", "collapse", re.sub(r"[^\w.-]+", "_", config.timm)), model.name
    else:
        checkpoint, classifier = load_classifier(config.run)
        data = data_as_trained(parser, config, classifier, str(checkpoint), images=True)
        model = Model(f"checkpoint {checkpoint}", EmbeddingSource(classifier, "head"), classifier.class_names)
        folder, name = folder_of(checkpoint) / "collapse", f"checkpoint {checkpoint.resolve()}"
    device = device_of(config)
    output, out = Path(config.output or folder), console()
    facts = {"model": name, "data": {**data_facts(data), "folder": data.split("test").source.folder}}
    check_writable(output, "--output")
    refuse_other_results(output / "collapse.json", facts, PICTURES)

    model.source.model.eval().requires_grad_(False).to(device)
    results: dict[str, dict[str, float]] = {}
    figures: dict[str, Figure] = {}
    centres: Moments | None = None
    for split in SPLITS:
        moments, results[split] = measure(model, data, split, device, centres, quiet=not out.is_terminal)
        centres = centres or moments
        names = model.class_names or data.class_names
        portrait = plotting.portrait(moments, model.source.weight.cpu(), counts=data.class_counts, class_names=names)
        figures |= {f"{split}_{name}": figure for name, figure in portrait.items()}

    with writing_to(output, "--output"):
        write_json(output / "collapse.json", {**facts, **results})
        for name, figure in figures.items():
            plotting.save(figure, output / f"{name}.png")
    out.print(_table(model, data, results))
    out.print(as_it_is(f"{output}: collapse.json and {len(figures)} figures"), style="dim", soft_wrap=True)


def measure(
    model: Model,
    data: ImageDataModule,
    split: Split,
    device: torch.device,
    centres: Moments | None = None,
    *,
    quiet: bool = True,
) -> tuple[Moments, dict[str, float]]:
    """Measure a model in one pass over a split, each image once and not augmented.

    Args:
        model: The model, in evaluation mode, on the device.
        data: The data module.
        split: The split to measure on.
        device: The model's device.
        centres: Class statistics whose means `nc4` takes as the nearest centres; without them it is left out.
        quiet: Whether to show no progress bar.

    Returns:
        The class statistics, on the CPU, and the scalars of `measures.summary` with `acc` and perhaps `nc4`.

    Raises:
        UserError: The model does not give logits.
    """
    source = model.source
    passed = PassStatistics(source.num_classes, device)
    passed.centres = None if centres is None else measures.Centres.of(centres.to(passed.device))
    right = torch.zeros((), dtype=torch.long, device=device)

    def count(caught: Caught, labels: Tensor) -> None:
        if caught.decision is None:
            raise UserError(f"{model.name} does not give one logit per class and image, so there is nothing to measure")
        right.add_((caught.decision == labels).sum())

    loader = track(data.eval_dataloader(split), description=f"measuring {split}", disable=quiet, transient=True)
    batches = (data.eval_transform((images.to(device), labels.to(device))) for images, labels in loader)
    sweep(batches, source, passed, count)
    moments = passed.compute()[HEAD]
    scalars = measures.summary(moments, source.weight, source.bias)
    values = {
        "acc": float(right) / float(moments.counts.sum()),
        **{name: float(value) for name, value in scalars.items()},
    }
    if centres is not None:
        values["nc4"] = float(passed.agrees[0] / passed.agrees[1])
    return moments.to("cpu"), values


# Models -----------------------------------------------------------------------------------------------------------


def _from_timm(config: Namespace, data: ImageDataModule) -> Model:
    network = _create(config.timm, config.weights, data)
    name = f"timm model {config.timm}" + (f" with {config.weights}" if config.weights else "")
    layer = _classifier_name(network)
    try:
        source = EmbeddingSource(network, layer)
    except UserError as error:
        raise UserError(
            f"{name} has no linear classifier to measure (its get_classifier() is {type(network.get_classifier()).__name__})"
        ) from error
    refuse_other_shape(name, source.num_classes, data.num_channels, data, _OWN_WEIGHTS)
    _adopt_normalisation(network, data)
    return Model(name, source, None)


def _classifier_name(network: Any) -> str:
    """The name of the module that timm calls the model's classifier; empty if it is not one module."""
    layer = network.get_classifier()
    return next((name for name, module in network.named_modules() if module is layer), "")


def _create(name: str, weights: str | None, data: ImageDataModule) -> Any:
    if ":" not in name and not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=5)
        hint = f"near matches: {', '.join(near)}" if near else "`timm.list_models()` has them all"
        raise UserError(f"no timm model is called {name!r}: {hint}")
    published: Any = timm.get_pretrained_cfg(name)  # None for a name of the Hub or of a folder
    arguments: dict[str, Any] = {"in_chans": data.num_channels, "pretrained": weights is None}
    state: dict[str, Tensor] = {}
    if weights is not None:
        state = read_weights(weights)
        classifier = state.get(f"{published and published.classifier}.weight")
        arguments["num_classes"] = data.num_classes if classifier is None else len(classifier)
        refuse_other_shape(f"{weights} of {name}", arguments["num_classes"], data.num_channels, data)
    elif published:  # before a download that would be in vain
        refuse_other_shape(f"timm model {name}", published.num_classes, data.num_channels, data, _OWN_WEIGHTS)
    try:
        network: Any = timm.create_model(name, **arguments)
    except Exception as error:  # of the Hub, its transport and the files
        let_through(error)
        mend = "give --weights FILE" if weights is None else "give another --timm"  # with a file nothing is downloaded
        raise UserError(f"timm model {name!r} cannot be had ({brief(error)}): {mend}") from error
    if weights is not None:
        if problem := misfit(state, network.state_dict()):
            raise UserError(
                f"{weights} does not fit {name} for {data.num_channels} channels: {problem}: give the name that made it"
            )
        network.load_state_dict(state)
    return network


def _adopt_normalisation(network: Any, data: ImageDataModule) -> None:
    """Normalise images as for the model's training, unless the user said how."""
    settings = resolve_data_config(model=network)  # type: ignore[no-untyped-call]
    for name in ("mean", "std"):
        values = [float(value) for value in settings[name]]
        if getattr(data, name) is None and len(values) in (1, data.num_channels):
            setattr(data, name, values)


# Results ----------------------------------------------------------------------------------------------------------


def _table(model: Model, data: ImageDataModule, results: dict[str, dict[str, float]]) -> Table:
    table = Table(title=as_it_is(f"Neural collapse of {model.name} on {data}"))
    table.add_column("measure", no_wrap=True)
    for split in results:
        table.add_column(split, justify="right", no_wrap=True)
    table.add_column("collapsed", justify="right", no_wrap=True)
    table.add_column("what")
    for name, (meaning, goal) in _ROWS.items():
        if any(name in values for values in results.values()):
            cells = [f"{values[name]:.4g}" if name in values else "" for values in results.values()]
            table.add_row(name, *cells, goal, meaning)
    return table


# The command line ---------------------------------------------------------------------------------------------------


def _parser() -> OneLineParser:
    parser = data_parser(
        "collapse", "Measure neural collapse of a trained model on the training and the test images, without training."
    )
    parser.add_argument(
        "run",
        type=str | None,
        nargs="?",
        default=None,
        help="Run folder or checkpoint to measure; on the data of the run, unless --data or -c say otherwise.",
    )
    parser.add_argument(
        "--timm",
        type=str | None,
        default=None,
        help="Name of a timm model to measure with its own classifier; its published weights, unless --weights is given. "
        "Images are normalised as it was trained, unless --data.mean and --data.std are given.",
    )
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="State dict for --timm: .safetensors, or of torch.save (no code in it is run).",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder for collapse.json and the figures. Default: collapse in the checkpoint's run folder, or runs/collapse/NAME.",
    )
    add_device(parser)
    add_imports(parser)
    return parser
