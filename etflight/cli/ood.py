"""`etflight ood …`: how well a trained model tells images of unknown classes from those of its own classes."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from rich.table import Table
from torch import Tensor

from etflight import plotting
from etflight.analysis.outputs import Outputs, outputs
from etflight.classifier import Classifier
from etflight.cli.checkpoint_option import (
    add_device,
    class_vectors,
    data_as_trained,
    device_of,
    folder_of,
    load_classifier,
)
from etflight.cli.data_option import data_parser, parse
from etflight.cli.parser import OneLineParser, add_imports
from etflight.data import ImageDataModule
from etflight.data.adapted import AdaptedSplit
from etflight.data.preprocessing import Preprocessing
from etflight.data.sources import ImageSplit
from etflight.loading import prepare_as_trained
from etflight.metrics import ClassStatistics, Moments, measures, ood
from etflight.runs.folder import CONFIG, check_writable, read_record, refuse_other_results, run_of, writing_to
from etflight.runs.record import data_facts, test_facts
from etflight.utils.errors import UserError, first_few, warn
from etflight.utils.files import write_json
from etflight.utils.terminal import as_it_is, console

RECORD, PICTURE = "ood.json", "histograms.png"
_USUAL_K = 50  # of the paper for CIFAR-10
RAW = "_raw"  # ends the names of what is computed from pooled features instead of embeddings

Score = Callable[[Outputs], Tensor]


class Scores(NamedTuple):
    """What tells known from unknown images.

    Attributes:
        functions: The scores by name.
        left_out: Why others do not apply, by name.
    """

    functions: dict[str, Score]
    left_out: dict[str, str]


def main(argv: Sequence[str]) -> None:
    """Print a table of scores, and write `ood.json` and histograms.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: What the user gave cannot work.
        SystemExit: With status 2 for a usage error, 0 after help.
    """
    parser = _parser()
    config = parse(parser, argv)
    known_config = _config_of_run(Path(config.run))
    checkpoint, model = load_classifier(config.run)
    weight = class_vectors(model, checkpoint)
    known = _known_data(known_config, model, checkpoint)
    prepare_as_trained(config.data, known.preprocessing)
    unknown: ImageDataModule = parser.instantiate(config).data
    unknown.prepare_data()
    shared = _shared_classes(model.class_names or known.class_names, unknown)
    adapted, images = _adapted(unknown, known.preprocessing, config.adapt)
    _refuse_known_images(known, unknown)
    k = _neighbour(config.k, known.class_counts.tolist())
    if (config.components or 0) >= (width := weight.shape[1]):
        raise UserError(
            f"--components {config.components} leave none of {width} dimensions out: give less than {width}"
        )
    facts = {
        "model": f"checkpoint {checkpoint.resolve()}",
        "k": k,
        "components": config.components or len(weight) - 1,
        "unknown": {
            "class": type(unknown).__name__,
            **test_facts(unknown),
            "image_shape": list(unknown.split("test").source.image_shape),
            "crop_pct": unknown.split("test").source.crop_pct,
            "adapted": adapted,
            "shared_classes": shared,
        },
    }
    folder = Path(config.output or folder_of(checkpoint) / "ood" / _folder_name(unknown))
    check_writable(folder, "output")
    refuse_other_results(folder / RECORD, facts, (PICTURE,))

    out, temperature = console(), model.decision.temperature_of_bare_logits()
    device = device_of(config)
    quiet = not out.is_terminal
    train, test = (outputs(model, known, split, device, quiet=quiet) for split in ("train", "test"))
    others = outputs(model, known.with_test_images(images), "test", device, quiet=quiet)
    spaces = {"": train.embedding} | ({} if _same(train) else {RAW: train.features})
    stats = {end: _statistics(features, train.labels, len(weight)) for end, features in spaces.items()}
    scores = scores_of(train, stats, weight, temperature, k, config.components)
    values = {name: (score(test), score(others)) for name, score in scores.functions.items()}
    results = {name: ood.separation(*both) for name, both in values.items()}
    record = {
        **facts,
        "seed": read_record(folder_of(checkpoint)).get("seed"),
        "temperature": temperature,
        "known": {**data_facts(known), "train_images": len(train.labels), "test_images": len(test.labels)},
        "scores": {name: result._asdict() for name, result in results.items()},
        "left_out": scores.left_out,
        **{f"nc5{end}": float(measures.nc5(stats[end], _in(others, end).double().mean(0))) for end in spaces},
    }
    panels = {f"{name}: AUROC {100 * results[name].auroc:.1f} %": both for name, both in values.items()}
    known_name, unknown_name = f"known: {known.dataset_name}", f"unknown: {unknown.dataset_name}"
    with writing_to(folder, "output"):
        write_json(folder / RECORD, record)
        plotting.save(plotting.score_histograms(panels, known_name, unknown_name), folder / PICTURE)
    out.print(_table(f"{known.dataset_name} (known) and {unknown.dataset_name} (unknown)", results))
    settings = f"temperature {temperature:.3g} of msp and energy, k = {k} of knn"
    if any(name.startswith("neco") for name in results):
        settings += f", {facts['components']} components of neco"
    out.print(as_it_is(f"checkpoint {checkpoint}: {settings}"), soft_wrap=True)
    for name, reason in scores.left_out.items():
        out.print(as_it_is(f"{name} is left out: {reason}"), soft_wrap=True)
    nc5 = ", ".join(f"{name} {record[name]:.4g}" for name in ("nc5", f"nc5{RAW}") if name in record)
    out.print(as_it_is(f"{nc5}: mean |cos| of class means and the mean of the unknown images"), soft_wrap=True)
    out.print(as_it_is(f"{folder}: {RECORD}, {PICTURE}"), style="dim", soft_wrap=True)


# Scores -------------------------------------------------------------------------------------------------------------


def scores_of(
    train: Outputs, stats: dict[str, Moments], weight: Tensor, temperature: float, k: int, components: int | None
) -> Scores:
    """Fit all scores to a model's outputs on its training images.

    Args:
        train: The outputs on the training images.
        stats: The class statistics of the embeddings under "" and, if they differ, of the pooled features under `RAW`.
        weight: The class vectors `[K, d]`.
        temperature: The temperature of `msp` and `energy`.
        k: The neighbour of `knn`.
        components: The number of principal components of `neco`; None: K - 1.
    """
    functions: dict[str, Score] = {
        "msp": lambda out: ood.msp(out.logits, temperature),
        "max_logit": lambda out: ood.max_logit(out.logits),
        "energy": lambda out: ood.energy(out.logits, temperature),
        "largest_cosine": lambda out: ood.largest_cosine(out.embedding, weight),
        "span_norm": lambda out: ood.span_norm(out.embedding, weight),
    }
    left_out: dict[str, str] = {}
    if len(ood.span_of(weight).basis) == weight.shape[1]:
        del functions["span_norm"]
        left_out["span_norm"] = f"{len(weight)} class vectors span all {weight.shape[1]} dimensions"
    for end in stats:
        features = _in(train, end)
        width, number = features.shape[1], components or len(weight) - 1
        functions[f"mahalanobis{end}"] = _of_features(end, partial(ood.mahalanobis, stats=stats[end]))
        functions[f"knn{end}"] = _of_features(end, partial(ood.knn, train_features=features, k=k))
        if number < width:
            subspace = ood.principal_subspace(features, number)
            functions[f"neco{end}"] = _of_features(end, partial(ood.neco, subspace=subspace))
            functions[f"neco_max_logit{end}"] = _neco_max_logit(end, subspace)
        else:
            reason = f"{number} components leave none of {width} dimensions out: give fewer (--components)"
            left_out |= {f"neco{end}": reason, f"neco_max_logit{end}": reason}
    return Scores(functions, left_out)


def _of_features(end: str, score: Callable[[Tensor], Tensor]) -> Score:
    return lambda out: score(_in(out, end))


def _neco_max_logit(end: str, subspace: ood.Subspace) -> Score:
    return lambda out: ood.neco_max_logit(_in(out, end), out.logits, subspace)


def _in(out: Outputs, end: str) -> Tensor:
    return out.features if end == RAW else out.embedding


def _same(out: Outputs) -> bool:
    """Whether the head takes the pooled features as its embedding."""
    return out.features.shape == out.embedding.shape and bool(torch.equal(out.features, out.embedding))


def _statistics(features: Tensor, labels: Tensor, num_classes: int) -> Moments:
    statistics = ClassStatistics(num_classes, features.shape[1])
    statistics.update(features, labels)
    return statistics.compute()


def _neighbour(given: int | None, class_counts: Sequence[int]) -> int:
    """The k of `knn`: what was given, or else 50, at most the images of the smallest class that has some.

    Raises:
        UserError: There are not so many training images.
    """
    if given is None:
        return min(_USUAL_K, *(count for count in class_counts if count))
    if given > (size := sum(class_counts)):
        raise UserError(f"--k {given} is more than the {size} training images of the run: give {size} or less")
    return given


# What is compared ---------------------------------------------------------------------------------------------------


def _known_data(config: Namespace, model: Classifier, checkpoint: Path) -> ImageDataModule:
    """The run's own images.

    Raises:
        UserError: They cannot be read.
    """
    try:
        return data_as_trained(_known_parser(), config, model, str(checkpoint), images=True)
    except UserError as error:
        place = folder_of(checkpoint) / CONFIG
        raise UserError(
            f"the run's own images, which are the known ones: {error} (their place is that of {place}: try with "
            f"etflight describe -c {place})"
        ) from error


def _config_of_run(run: Path) -> Namespace:
    """The run's own data, as an option of `_known_parser`.

    Raises:
        UserError: There is no run, or no configuration of its data.
    """
    if not run.exists():
        raise UserError(f"{run} does not exist: give a run folder, such as runs/digits/ce, or a checkpoint in one")
    folder = run_of(run)
    if folder is None or not (folder / CONFIG).is_file():
        raise UserError(
            f"{run} is not in a run folder, whose config.yaml says which images are known: give one, such as runs/digits/ce"
        )
    return parse(_known_parser(), [], str(run))


def _adapted(unknown: ImageDataModule, takes: Preprocessing, adapt: bool) -> tuple[bool, ImageSplit]:
    """The unknown images as the model takes them, and whether they had to be changed.

    Raises:
        UserError: They have another size or other channels, and are not to be changed.
    """
    images = unknown.split("test")
    shape = tuple(images.source.image_shape)
    if shape == takes.input_size:
        return False, images
    own, other = ("×".join(map(str, size)) for size in (shape, takes.input_size))
    if not adapt:
        raise UserError(
            f"{unknown} has images of {own} (channels × height × width), but the model takes {other}: "
            "give --adapt true to resize them and convert their colours, or another set"
        )
    return True, AdaptedSplit(images, takes, str(unknown))


def _shared_classes(known: Sequence[str], unknown: ImageDataModule) -> list[str]:
    """The names of unknown classes that are known, of which a warning tells; mere numbers are no names."""
    names = {name.casefold() for name in known if not name.isdecimal()}
    shared = [name for name in unknown.class_names if name.casefold() in names]
    if shared:
        warn(
            f"{unknown} is taken as unknown, but the model knows classes of these names: {first_few(shared, len(shared))}"
        )
    return shared


def _refuse_known_images(known: ImageDataModule, unknown: ImageDataModule) -> None:
    own, others = known.split("test"), unknown.split("test")
    same = (own.source.content, own.source.folder) == (others.source.content, others.source.folder)
    if same and len(np.intersect1d(own.indices, others.indices)):
        raise UserError(
            f"--data {unknown} holds test images of the run itself, which are known: give images of other classes"
        )


def _folder_name(unknown: ImageDataModule) -> str:
    return re.sub(r"[^\w.-]+", "_", unknown.dataset_name).strip(".") or type(unknown).__name__


def _table(title: str, results: dict[str, ood.Separation]) -> Table:
    table = Table(title=as_it_is(title))
    table.add_column("score", no_wrap=True)
    for column in ("AUROC", "AUPR known", "AUPR unknown", "FPR95"):
        table.add_column(f"{column} %", justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(name, *(f"{100 * value:.1f}" for value in result))
    return table


# The command line ---------------------------------------------------------------------------------------------------


def _known_parser() -> OneLineParser:
    return data_parser("ood", "The images of a run.")


def _parser() -> OneLineParser:
    parser = data_parser(
        "ood",
        "Measure how well a trained model tells images of unknown classes (the test images of --data) from the test images of its run, by "
        "scores that need no further training. Labels of the unknown images are not used, and they are normalised as the run's.",
    )
    parser.add_argument("run", type=str, help="Run folder, or a checkpoint in one; its own images are the known ones.")
    parser.add_argument(
        "--adapt",
        type=bool,
        default=False,
        help="Resize unknown images of another size (bilinearly), and turn grey into RGB or RGB into grey.",
    )
    parser.add_argument(
        "--k",
        type=PositiveInt | None,
        default=None,
        help="The score knn is the distance to the k-th nearest training image. Default: 50, at most the images of the smallest class.",
    )
    parser.add_argument(
        "--components",
        type=PositiveInt | None,
        default=None,
        help="Principal components of the training features for neco. Default: one less than classes.",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder for ood.json and the picture. Default: ood/NAME in the run folder, NAME being the unknown set's.",
    )
    add_device(parser)
    add_imports(parser)
    return parser
