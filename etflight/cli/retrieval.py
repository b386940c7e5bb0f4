"""`etflight retrieval …`: whether models that were trained apart share their embedding space."""

from pathlib import Path
from typing import Any

from rich.table import Table

from etflight.analysis.retrieval import refuse_other_classes, retrieval
from etflight.analysis.store import weights_of
from etflight.classifier import Classifier
from etflight.cli.command import Asked, NoOptions, Results, command, show, show_place
from etflight.cli.decision_option import load_trained
from etflight.data import ImageDataModule
from etflight.data.facts import other_preprocessing, refuse_other_shape
from etflight.runs.record import test_facts
from etflight.utils.errors import warn
from etflight.utils.terminal import as_it_is


@command(
    "retrieval",
    "Search images by the embeddings of one model among those of another, to see whether models that were trained apart share their "
    "space: on the test images of the first run, or of --data.",
    NoOptions,
    run="Run folders or checkpoints of models with the same classes.",
    output="JSON file for the scores. Default: retrieval.json in the first run.",
    runs="several",
)
def main(asked: Asked[NoOptions]) -> None:
    """Print how well each model's embeddings find those of each other, and write `retrieval.json`."""
    device = asked.device()
    loaded = [load_trained(run) for run in asked.runs]
    refuse_other_classes([(str(each.checkpoint), each.model) for each in loaded])
    sets = [_data_for(asked, each.checkpoint, each.model) for each in loaded]
    facts: dict[str, Any] = {
        "models": [str(each.checkpoint.resolve()) for each in loaded],
        "data": test_facts(sets[0]),
        "preprocessing": [data.preprocessing._asdict() for data in sets],
    }
    if any("decides" in each.facts for each in loaded):
        facts["decides"] = [each.facts.get("decides") for each in loaded]
    results = Results(Path(asked.output or loaded[0].folder / "retrieval.json"), facts)
    models = [each.model for each in loaded]
    parts = [weights_of(model.backbone)[:12] for model in models] if asked.features else [""] * len(models)
    sets = [asked.stored(model, data, ("test",), part) for model, data, part in zip(models, sets, parts, strict=True)]
    found = retrieval(models, sets, device, quiet=asked.quiet)
    results.write({**facts, **found})
    show(_table(found, str(sets[0])))
    show_place(results.file.parent, results.file.name)


def _data_for(asked: Asked[NoOptions], checkpoint: Path, model: Classifier) -> ImageDataModule:
    """The images, prepared as in the model's own training; a line says how they differ from those nevertheless.

    Raises:
        UserError: They have other channels.
    """
    data = asked.data(model.preprocessing)
    data.split("test")  # so that nothing below reads the training images, which are not needed
    # other classes may be asked for, since they are only compared with each other
    refuse_other_shape(f"checkpoint {checkpoint}", data.num_classes, model.hparams["in_chans"], data)
    differences = [other_preprocessing(model.preprocessing, data)] if asked.has_own_data else model.differences(data)
    for line in filter(None, differences):
        warn(line)
    return data


def _table(record: dict[str, Any], images: str) -> Table:
    table = Table(title=as_it_is(f"Retrieval on {images}, by cosine; the image itself left out"))
    table.add_column("space", no_wrap=True)
    for title in ("within a model", "across models", "mean of all"):
        table.add_column(f"{title}: R@1", justify="right")
        table.add_column("mAP", justify="right")
    for mean in record["mean_of_all"]:
        own = [pair for pair in record["pairs"] if pair["space"] == mean["space"]]
        within, across = ([p for p in own if (p["query"] == p["gallery"]) is same] for same in (True, False))
        cells = [
            f"{100 * sum(p[score] for p in group) / len(group):.1f}" if group else ""
            for group in (within, across, [mean])
            for score in ("recall_at_1", "mean_average_precision")
        ]
        table.add_row(mean["space"], *cells)
    return table
