"""`etflight collapse …`: neural collapse of a trained checkpoint, or of any timm model, without training."""

import re
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from etflight.analysis.collapse import SPLITS, neural_collapse, portraits
from etflight.analysis.timm_model import timm_model
from etflight.cli.checkpoint_option import compare_with_training
from etflight.cli.command import Asked, Results, command, show, show_place
from etflight.cli.decision_option import load_trained
from etflight.network import Network
from etflight.runs.folder import ROOT
from etflight.runs.record import data_facts
from etflight.utils.errors import UserError
from etflight.utils.terminal import as_it_is

RECORD = "collapse.json"
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


@dataclass
class Options:
    """A model without a checkpoint.

    Attributes:
        timm: Name of a timm model to measure with its own classifier; its published weights, unless --weights is given. Images are
            normalised as it was trained, unless --data.mean and --data.std are given.
        weights: State dict for --timm: .safetensors, or of torch.save (no code in it is run).
    """

    timm: str | None = None
    weights: str | None = None


@command(
    "collapse",
    "Measure neural collapse of a trained model on the training and the test images, without training.",
    Options,
    run="Run folder or checkpoint to measure; on the data of the run, unless --data or -c say otherwise.",
    output="Folder for collapse.json and the figures. Default: collapse in the checkpoint's run folder, or runs/collapse/NAME.",
    runs="at most one",
)
def main(asked: Asked[Options]) -> None:
    """Print a table of measures, and write `collapse.json` and figures."""
    options = asked.options
    if bool(asked.runs) == (options.timm is not None):
        raise UserError(
            "collapse measures one model: give RUN (a run folder, or a checkpoint) or --timm NAME (any timm model with its own classifier)"
        )
    if options.weights is not None and options.timm is None:
        raise UserError("--weights goes with --timm NAME: a checkpoint of etflight is given alone")
    if options.timm is not None:
        if asked.features is not None:
            raise UserError(
                "--features goes with a run: leave it out with --timm, or train the model's head first (etflight fit)"
            )
        data = asked.data()
        title, model, head = timm_model(options.timm, data, options.weights)
        what, class_names, folder = (
            {"model": title},
            None,
            Path(ROOT, "collapse", re.sub(r"[^\w.-]+", "_", options.timm)),
        )
    else:
        checkpoint, model, folder, what = load_trained(asked.run)
        data = compare_with_training(asked.data(model.preprocessing), model, checkpoint, images=True)
        title, head, class_names, folder = f"checkpoint {checkpoint}", "head", model.class_names, folder / "collapse"
    device, folder = asked.device(), Path(asked.output or folder)
    facts = {**what, "data": {**data_facts(data), "folder": data.split("test").source.folder}}
    results = Results(folder / RECORD, facts, PICTURES)

    if isinstance(model, Network):
        data = asked.stored(model, data, SPLITS)
    found = neural_collapse(model, data, head=head, device=device, quiet=asked.quiet)
    figures = {f"{own}.png": figure for own, figure in portraits(found, data, class_names).items()}
    results.write({**facts, **found.measures}, figures)
    show(_table(f"Neural collapse of {title} on {data}", found.measures))
    show_place(folder, f"{RECORD} and {len(figures)} figures")


def _table(title: str, results: dict[str, dict[str, float]]) -> Table:
    table = Table(title=as_it_is(title))
    table.add_column("measure", no_wrap=True)
    for column in (*results, "collapsed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what")
    for name, (meaning, goal) in _ROWS.items():
        if any(name in values for values in results.values()):
            cells = [f"{values[name]:.4g}" if name in values else "" for values in results.values()]
            table.add_row(name, *cells, goal, meaning)
    return table
