"""`etflight predict` on images from anywhere: its arguments, and the data module that they stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from etflight.cli.argv import after_configs, configured, values_of
from etflight.utils.errors import UserError
from etflight.utils.terminal import readable
from etflight.utils.yaml import to_yaml


def add_prediction_arguments(parser: ArgumentParser) -> None:
    """`--images`, `--output`, `--top_k` and `--embeddings`."""
    parser.add_argument(
        "--images",
        type=str,
        nargs="+",
        default=None,
        help="Image files, folders of them, or .npz files of arrays, in place of --data; the checkpoint knows what its model takes.",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="New file, .csv, .parquet or .npz. Default: predictions.csv in the run folder, replaced.",
    )
    parser.add_argument("--top_k", type=PositiveInt, default=1, help="Classes of each image, the most probable first.")
    parser.add_argument("--embeddings", type=bool, default=False, help="Write what meets the class vectors, too.")


def over_images(argv: Sequence[str], path: Path, checkpoint: dict[str, Any]) -> tuple[list[str], list[str]]:
    """A command line with images, or with a file that names some, as one with `UnlabelledImages`; any other stays as it is.

    Args:
        argv: the command line.
        path: of the checkpoint.
        checkpoint: what `read_checkpoint` gives.

    Returns:
        The command line without the paths, and these, for the data module that comes of it: no parser takes all names of files for text.

    Raises:
        UserError: a data set as well, or a checkpoint that does not know what its model wants of images.
    """
    images = _images(argv)
    if not images:
        return list(argv), []
    if values_of(argv, "data"):
        raise UserError("give --data for a set's test images or images for others (--images), not both")
    known: dict[str, Any] = dict(checkpoint.get("preprocessing") or {})
    if not known and not values_of(argv, "data.input_size"):
        raise UserError(
            f"checkpoint {path} does not say how its images were normalised, since it was trained without a data module of etflight's, or "
            "with an earlier version: give --data.input_size '[C, H, W]', --data.mean and --data.std"
        )
    names = checkpoint.get("class_names") or list(map(str, range(checkpoint["hyper_parameters"]["num_classes"])))
    values = {"paths": [], "names": list(map(readable, names)), **known}
    # after the configuration files, whose data they replace, and before the command line's own --data.batch_size and others
    place = after_configs(argv)
    chosen = ["--data=UnlabelledImages", *(f"--data.{name}={to_yaml(value)}" for name, value in values.items())]
    return [*argv[:place], *chosen, *argv[place:]], images


def _images(argv: Sequence[str]) -> list[str]:
    """The paths given, those of the command line before those of a configuration file."""
    if "--images" in argv:
        start = argv.index("--images") + 1
        end = next((i for i in range(start, len(argv)) if argv[i].startswith("-")), len(argv))
        return list(argv[start:end])
    given = values_of(argv, "images") or configured(argv, "images", object) or []
    if not isinstance(given, list):
        raise UserError(f"images in a configuration file is {given!r:.60}: give a list, as in images: [photos/]")
    return list(map(str, given))
