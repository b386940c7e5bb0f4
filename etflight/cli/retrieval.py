"""`etflight retrieval …`: whether models that were trained apart share their embedding space."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from rich.table import Table
from torch import Tensor

from etflight.analysis.outputs import Outputs, outputs
from etflight.classifier import Classifier
from etflight.cli.checkpoint_option import (
    add_device,
    class_vectors,
    device_of,
    folder_of,
    load_classifier,
)
from etflight.cli.data_option import data_parser, parse, parse_over_run
from etflight.cli.parser import OneLineParser, add_imports
from etflight.data import ImageDataModule
from etflight.data.facts import different_class, other_preprocessing, refuse_other_shape
from etflight.loading import prepare_as_trained
from etflight.metrics.retrieval import retrieval_scores
from etflight.runs.folder import check_writable, refuse_other_results, writing_to
from etflight.runs.record import test_facts
from etflight.utils.errors import UserError, warn
from etflight.utils.files import write_json
from etflight.utils.terminal import as_it_is, console


class Embedded(NamedTuple):
    """What one model makes of the images.

    Attributes:
        checkpoint: The checkpoint of the model.
        outputs: Its outputs over the images.
        weight: Its class vectors `[K, d]`, on the CPU.
    """

    checkpoint: Path
    outputs: Outputs
    weight: Tensor


def main(argv: Sequence[str]) -> None:
    """Print how well each model's embeddings find those of each other, and write `retrieval.json`.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: What the user gave cannot work.
        SystemExit: With status 2 for a usage error, 0 after help.
    """
    parser = _parser()
    # with a set of its own, no option of the run's data (its long tail, its files) counts
    others = any(word.partition("=")[0] in ("--data", "-c", "--config") for word in argv)
    config = parse(parser, argv) if others else parse_over_run(parser, argv)
    device = device_of(config)
    out = console()
    loaded = [load_classifier(run) for run in config.runs]
    weights = [class_vectors(classifier, checkpoint) for checkpoint, classifier in loaded]
    _refuse_other_classes(loaded, weights)
    sets = [_data_for(parser, config, *model, others=others) for model in loaded]
    facts = {
        "models": [str(checkpoint.resolve()) for checkpoint, _ in loaded],
        "data": test_facts(sets[0]),
        "preprocessing": [data.preprocessing._asdict() for data in sets],
    }
    output = Path(config.output or folder_of(loaded[0][0]) / "retrieval.json")
    check_writable(output.parent, "output")
    refuse_other_results(output, facts)

    models = [
        Embedded(checkpoint, outputs(classifier, data, "test", device, quiet=not out.is_terminal), weight)
        for (checkpoint, classifier), data, weight in zip(loaded, sets, weights, strict=True)
    ]
    record = {**facts, **compare(models)}
    with writing_to(output.parent, "output"):
        write_json(output, record)
    out.print(_table(record, str(sets[0])))
    out.print(as_it_is(output), style="dim", soft_wrap=True)


def _data_for(
    parser: OneLineParser, config: Namespace, checkpoint: Path, classifier: Classifier, *, others: bool
) -> ImageDataModule:
    """The images, prepared as in the model's own training; a line says how they differ from those nevertheless.

    Raises:
        UserError: They have other channels.
    """
    own = config.clone()
    prepare_as_trained(own.data, classifier.preprocessing)
    data: ImageDataModule = parser.instantiate(own).data
    data.prepare_data()
    data.split("test")  # so that nothing below reads the training images, which are not needed
    # other classes may be asked for, since they are only compared with each other
    refuse_other_shape(f"checkpoint {checkpoint}", data.num_classes, classifier.hparams["in_chans"], data)
    differences = [other_preprocessing(classifier.preprocessing, data)] if others else classifier.differences(data)
    for line in filter(None, differences):
        warn(line)
    return data


def compare(models: Sequence[Embedded]) -> dict[str, Any]:
    """Let each model's embeddings of the images look for those of every model; an image never finds itself.

    Args:
        models: At least one model.

    Returns:
        The largest difference between the class vectors of two models; for each space, query and gallery model (by their positions) the
        scores; for each space the scores of the mean of all models' embeddings, each of norm 1.
    """
    spaces: dict[str, Callable[[Embedded, Embedded], Tensor]] = {
        "embedding": lambda model, first: model.outputs.embedding,
        "rotated": _rotated,  # the part of the embedding that the class vectors span
        "logits": lambda model, first: model.outputs.logits - model.outputs.logits.mean(1, keepdim=True),
    }
    first, labels = models[0], models[0].outputs.labels
    pairs: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    for name, space in spaces.items():
        embedded = [torch.nn.functional.normalize(space(model, first).double(), dim=1) for model in models]
        for (i, queries), (j, gallery) in product(enumerate(embedded), repeat=2):
            scores = retrieval_scores(queries, labels, gallery, labels, same_images=True)
            pairs.append({"space": name, "query": i, "gallery": j, **scores._asdict()})
        mean = torch.stack(embedded).mean(0)
        means.append({"space": name, **retrieval_scores(mean, labels, mean, labels, same_images=True)._asdict()})
    weights = torch.stack([model.weight for model in models])
    differ = float((weights.amax(0) - weights.amin(0)).max())
    return {"class_vectors_differ": differ, "pairs": pairs, "mean_of_all": means}


def _rotated(model: Embedded, first: Embedded) -> Tensor:
    """The embedding turned so that the model's class vectors come as near as they can to those of the first model.

    Class vectors say nothing of directions that they do not span, so the embedding's part in those is left out.
    """
    left, values, right = torch.linalg.svd(model.weight.double().T @ first.weight.double(), full_matrices=False)
    spanned = values > values[0] * max(model.weight.shape) * torch.finfo(model.weight.dtype).eps
    rotation: Tensor = left[:, spanned] @ right[spanned]
    return model.outputs.embedding.double() @ rotation


def _refuse_other_classes(models: Sequence[tuple[Path, Classifier]], weights: Sequence[Tensor]) -> None:
    first, names = models[0][0], models[0][1].class_names
    for (checkpoint, classifier), weight in zip(models[1:], weights[1:], strict=True):
        if weight.shape != weights[0].shape:
            raise UserError(
                f"{checkpoint} has class vectors {list(weight.shape)}, but {first} {list(weights[0].shape)}: "
                "give models of the same classes and width"
            )
        if differ := different_class(names, classifier.class_names):
            k, own, other = differ
            raise UserError(
                f"class {k} is {own!r} in {first}, but {other!r} in {checkpoint}: give models of the same classes"
            )


def _table(record: dict[str, Any], images: str) -> Table:
    table = Table(title=as_it_is(f"Retrieval on {images}, by cosine; the image itself left out"))
    table.add_column("space", no_wrap=True)
    for title in ("within a model", "across models", "mean of all"):
        table.add_column(f"{title}: R@1", justify="right")
        table.add_column("mAP", justify="right")
    for mean in record["mean_of_all"]:
        cells: list[str] = []
        own = [pair for pair in record["pairs"] if pair["space"] == mean["space"]]
        for group in (
            [p for p in own if p["query"] == p["gallery"]],
            [p for p in own if p["query"] != p["gallery"]],
            [mean],
        ):
            for score in ("recall_at_1", "mean_average_precision"):
                cells.append(f"{100 * sum(p[score] for p in group) / len(group):.1f}" if group else "")
        table.add_row(mean["space"], *cells)
    return table


def _parser() -> OneLineParser:
    parser = data_parser(
        "retrieval",
        "Search images by the embeddings of one model among those of another, to see whether models that were trained apart share their "
        "space: on the test images of the first run, or of --data.",
    )
    parser.add_argument("runs", type=str, nargs="+", help="Run folders or checkpoints of models with the same classes.")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="JSON file for the scores. Default: retrieval.json in the first run.",
    )
    add_device(parser)
    add_imports(parser)
    return parser
