"""`etflight predict` on images from anywhere: its arguments, and the data module that it builds."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from etflight.cli.argv import EarlyOptions
from etflight.data.preprocessing import Preprocessing
from etflight.utils.errors import UserError
from etflight.utils.terminal import readable
from etflight.utils.yaml import to_yaml


def add_prediction_arguments(parser: ArgumentParser) -> None:
    """Add `--images`, `--output`, `--top_k` and `--embeddings`."""
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
        help="New file, .csv, .parquet or .npz. Default: predictions.csv in the run folder.",
    )
    parser.add_argument("--top_k", type=PositiveInt, default=1, help="Classes of each image, the most probable first.")
    parser.add_argument("--embeddings", type=bool, default=False, help="Write the embeddings, too.")


def images_of(options: EarlyOptions) -> list[str]:
    """The paths of `--images`, or else of a configuration file.

    Raises:
        UserError: A configuration file gives something other than a list.
    """
    given = options.value("images", object) or []
    if not isinstance(given, list):
        raise UserError(f"images in a configuration file is {given!r:.60}: give a list, as in images: [photos/]")
    return list(map(str, given))


def as_data(options: EarlyOptions, path: Path, checkpoint: dict[str, Any]) -> list[str]:
    """The options of a data module of images without labels, prepared as the model wants them, in place of a configuration file's data.

    The paths are left out, because no parser takes every file name as text: the caller gives them to the data module.

    Args:
        options: The options of the command line.
        path: The checkpoint's file.
        checkpoint: Its content, as `read_checkpoint` returns it.

    Raises:
        UserError: A data set is given as well, or the checkpoint does not know how its model wants images.
    """
    if options.given["data"]:
        raise UserError("give --data for a set's test images or images for others (--images), not both")
    known = Preprocessing.in_checkpoint(checkpoint)
    if known is None and options.given["data.input_size"] is None:
        raise UserError(
            f"checkpoint {path} does not say how its images were normalised, since it was trained without a data module of etflight's: "
            "give --data.input_size '[C, H, W]', --data.mean and --data.std"
        )
    names = checkpoint.get("class_names") or list(map(str, range(checkpoint["hyper_parameters"]["num_classes"])))
    values = {"paths": [], "names": list(map(readable, names)), **(known._asdict() if known else {})}
    return ["--data=UnlabelledImages", *(f"--data.{name}={to_yaml(value)}" for name, value in values.items())]
