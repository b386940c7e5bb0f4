"""`etflight retrieval …`: whether models that were trained apart share their embedding space."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from etflight.callbacks.collect import Outputs, outputs
from etflight.cli.checkpoint_option import (
    add_device,
    add_imports,
    device_of,
    folder_of,
    import_modules,
    load_classifier,
    prepare_as_trained,
)
from etflight.cli.data_option import data_parser, parse, parse_over_run
from etflight.cli.parser import OneLineParser
from etflight.data import ImageDataModule
from etflight.metrics.retrieval import retrieval_scores
from etflight.utils.errors import UserError
from etflight.utils.files import write_json
from etflight.utils.terminal import console
from etflight.utils.training_data import refuse_other_shape


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
    import_modules(config.imports)
    device = device_of(config)
    out = console()
    models: list[Embedded] = []
    for run in config.runs:
        checkpoint, classifier = load_classifier(run)
        own = config.clone()  # each model has its images prepared as in its own training
        prepare_as_trained(own.data, classifier.preprocessing)
        data: ImageDataModule = parser.instantiate(own).data
        # other classes may be asked for, since they are only compared with each other
        refuse_other_shape(f"checkpoint {checkpoint}", data.num_classes, classifier.hparams["in_chans"], data)
        found = outputs(classifier.to(device), data, "test", quiet=not out.is_terminal)
        models.append(Embedded(checkpoint, found, classifier.head.weight.detach().cpu()))
    _refuse_other_widths(models)

    images = {"dataset": data.dataset_name, "test_images": len(models[0].outputs.labels)}
    record = {"models": [str(model.checkpoint) for model in models], "data": images, **compare(models)}
    folder = folder_of(models[0].checkpoint)
    output = Path(config.output or folder / "retrieval.json")
    write_json(output, record)
    out.print(_table(record, str(data)))
    out.print(f"{output}", style="dim", highlight=False, soft_wrap=True)


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
        "rotated": _rotated,
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
    differ = max(float((model.weight - first.weight).abs().max()) for model in models)
    return {"class_vectors_differ": differ, "pairs": pairs, "mean_of_all": means}


def _rotated(model: Embedded, first: Embedded) -> Tensor:
    """The embedding turned so that the model's class vectors come as near as they can to those of the first model."""
    rotation, _ = orthogonal_procrustes(model.weight.double().numpy(), first.weight.double().numpy())
    return model.outputs.embedding.double() @ torch.from_numpy(rotation)


def _refuse_other_widths(models: Sequence[Embedded]) -> None:
    for model in models[1:]:
        if model.weight.shape != models[0].weight.shape:
            raise UserError(
                f"{model.checkpoint} has class vectors {list(model.weight.shape)}, but {models[0].checkpoint} "
                f"{list(models[0].weight.shape)}: give models of the same classes and width"
            )


def _table(record: dict[str, Any], images: str) -> Table:
    table = Table(title=f"Retrieval on {images}, by cosine; the image itself left out")
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
