"""The model card: everything that a stranger needs to know of an exported model, in Markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from etflight.classifier import Classifier
from etflight.data.preprocessing import Preprocessing
from etflight.reporting.reading import noting, read_classes
from etflight.reporting.results import Result, read_results
from etflight.runs.folder import CONFIG, PER_CLASS
from etflight.utils.errors import UserError
from etflight.utils.terminal import plain
from etflight.utils.yaml import read_yaml

_MOST_CLASSES = 20  # in the table
_OF_RESULTS = (
    "On the test images, from 0 to 1. `acc_macro`, `acc_harmonic` and `acc_worst` are mean, harmonic mean and minimum of the accuracies of "
    "classes; `many`, `medium` and `few` are classes of more than 100, 20 to 100 and fewer than 20 training images, `head`, `middle` and "
    "`tail` thirds of the classes; `ece` is the expected calibration error of the softmax, `ece_calibrated` of the probabilities."
)
_OF_COLLAPSE = (
    "At the end of training, on training and validation images. Fully collapsed, `nc1` (variability within classes over that between "
    "them) and `etf_distance` (of the class means from a simplex equiangular tight frame) are 0, `alignment` (cosine of class means and "
    "class vectors) is 1."
)
_OF_AN_EARLIER = "The weights are those of an earlier epoch than the last of this training.\n\n"
_USES = {
    "timm": """\
```python
import timm
from PIL import Image
{registration}
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()  # or hf-hub:USER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("PATH_OF_AN_IMAGE").convert("{mode}")
label = int(model(transform(image)[None]).argmax())
print(model.pretrained_cfg.get("label_names", range(label + 1))[label])
```

{of_timm}
""",
    "onnx": """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(None, {{"images": images}})  # normalised, float32 [B, {shape}]
```

The softmax of these logits is {probabilities}. `session.get_modelmeta().custom_metadata_map` has class names, mean and std.
""",
    "torch-export": """\
```python
import torch

model = torch.export.load("model.pt2").module()
logits = model(images)  # normalised, float32 [B, {shape}]
```

The softmax of these logits is {probabilities}.
""",
}
_CALIBRATED = "The softmax of its logits is {probabilities}."
_DECISIONS_ONLY = (
    "Its decisions are those of the trained model; the softmax of its logits is **not** its probabilities: the head divides each "
    "embedding by its norm, which no linear layer can. The formats `onnx` and `torch-export` have them."
)


def model_card(
    name: str,
    classifier: Classifier,
    preprocessing: Preprocessing,
    formats: Mapping[str, bool],
    run: Path | None,
    licence: str | None = None,
    *,
    at_its_end: bool = True,
    tested_in: Path | None = None,
    decides: str = "",
) -> tuple[str, list[str]]:
    """Write a card in Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        name: The model's name.
        classifier: The exported classifier.
        preprocessing: The preprocessing of its images.
        formats: The formats written, and whether the softmax of each is the calibrated probabilities.
        run: The folder of the run that trained it, or None.
        licence: The licence of the weights, by its name on the Hub, or None.
        at_its_end: Whether it is the run's last checkpoint.
        tested_in: The run folder with the results of this very model, or None.
        decides: What decides in place of the trained head's logits, in a sentence; empty for these.

    Returns:
        The card, and problems with files that had to be left out.
    """
    trained, problems = read_results([] if run is None else [run])
    tested, others = (trained, []) if tested_in == run else read_results([] if tested_in is None else [tested_in])
    problems += others
    recipe = classes = ""
    if run is not None:
        with noting(problems):
            recipe = ("" if at_its_end else _OF_AN_EARLIER) + _recipe(run)
    if tested_in is not None:
        with noting(problems):
            classes = _classes(tested_in)
    head = type(classifier.head).__name__
    sections = {
        f"# {plain(name)}": f"A classifier of images into {classifier.head.num_classes} classes: a "
        f"`{classifier.hparams['backbone']}` with etflight's `{head}`"
        f"{', whose class vectors are fixed' if head == 'ETFHead' else ''}: {classifier.cost(preprocessing.input_size)}.",
        "## Decision": decides,
        "## Use": "\n".join(_use(kind, exact, classifier, preprocessing) for kind, exact in formats.items()),
        "## Images": _images(preprocessing, classifier.class_names),
        "## Data": _data(trained[0], at_its_end=at_its_end) if trained else "",
        "## Recipe": recipe,
        "## Results": _numbers(tested[0], "test/", _OF_RESULTS) if tested else "",
        "## Neural collapse": _numbers(tested[0], "nc", _OF_COLLAPSE) if tested else "",
        "## Classes": classes,
    }
    text = "\n".join(f"{title}\n\n{content.strip()}\n" for title, content in sections.items() if content)
    return f"{_front_matter(name, list(formats), licence)}\n{text}", problems


def _front_matter(name: str, formats: Sequence[str], licence: str | None) -> str:
    """The metadata that the Hub reads, in YAML."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=licence,
        library_name="timm" if "timm" in formats else None,
        pipeline_tag="image-classification",
        tags=["image-classification", "neural-collapse", *formats],
        model_name=plain(name),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _use(kind: str, exact: bool, classifier: Classifier, preprocessing: Preprocessing) -> str:
    module = type(classifier.backbone).__module__
    probabilities = f"its probabilities ({classifier.describe_temperature()})"
    return _USES[kind].format(
        registration="" if module.startswith("timm.") else f"import {module}  # registers the architecture in timm\n",
        shape=", ".join(map(str, preprocessing.input_size)),
        of_timm=_CALIBRATED.format(probabilities=probabilities) if exact else _DECISIONS_ONLY,
        mode="L" if preprocessing.input_size[0] == 1 else "RGB",
        probabilities=probabilities,
    )


def _images(preprocessing: Preprocessing, class_names: Sequence[str] | None) -> str:
    channels, height, width = preprocessing.input_size
    mean, std = ([round(number, 4) for number in numbers] for numbers in (preprocessing.mean, preprocessing.std))
    larger = "" if preprocessing.crop_pct == 1 else f" over {preprocessing.crop_pct:g}"
    lines = [
        f"{channels} channel{'s' * (channels > 1)}, {height} × {width} pixels: resized (bilinear) to cover it{larger}, "
        "cropped at the centre, "
        f"divided by 255, normalised by mean {mean} and standard deviation {std}."
    ]
    if class_names is None:
        lines.append("The names of the classes are not known.")
    elif len(class_names) <= _MOST_CLASSES:
        lines.append(f"Classes: {', '.join(map(_cell, class_names))}.")
    return "\n\n".join(lines)


def _data(result: Result, *, at_its_end: bool) -> str:
    return _table(
        ("", ""),
        (
            ("data set", result.dataset),
            ("imbalance ratio (the one asked for, if one was)", None if result.ratio is None else f"{result.ratio:g}"),
            ("subset of the training images", result.fingerprint),
            ("validation", result.validation),
            ("epochs", result.epochs if at_its_end else None),
            ("commit of the code", result.commit),
        ),
    )


def _recipe(run: Path) -> str:
    content: Any = read_yaml(run / CONFIG)
    if not isinstance(content, dict) or not isinstance(content.get("trainer", {}), dict):
        raise UserError(f"{run / CONFIG} is not whole (it holds no configuration)")
    trainer = content.get("trainer", {})
    of_trainer = ("max_epochs", "precision", "accumulate_grad_batches", "gradient_clip_val", "callbacks")
    kept = {name: content.get(name) for name in ("seed_everything", "data", "model")}
    tuning = content.get("fine_tuning")
    if isinstance(tuning, dict) and any(tuning.get(name) for name in ("checkpoint", "weights", "freeze")):
        kept["fine_tuning"] = tuning
    kept["trainer"] = {name: trainer[name] for name in of_trainer if name in trainer}
    text = yaml.safe_dump(_known(kept), sort_keys=False, allow_unicode=True)
    return f"```yaml\n{text.replace('```', '')}```"


def _known(value: Any) -> Any:
    """The content of nested dicts without the values that are None."""
    return {k: _known(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _numbers(result: Result, prefix: str, meaning: str) -> str:
    """A table of metrics, without the accuracies under other class frequencies."""
    found = [
        (name, f"{value:.4g}")
        for name, value in result.metrics.items()
        if name.startswith(prefix) and not name.startswith(("test/acc_forward", "test/acc_backward"))
    ]
    return f"{meaning}\n\n{_table(('measure', 'value'), found)}" if found else ""


def _classes(run: Path) -> str:
    path = run / PER_CLASS
    if not path.is_file():
        return ""
    rows = read_classes(path)
    if len(rows) > _MOST_CLASSES:  # a class without test images has no accuracy
        rows = sorted((row for row in rows if not math.isnan(row.acc)), key=lambda row: row.acc)
    cells = [(row.name, row.train_images, f"{row.acc:.3f}") for row in rows[:_MOST_CLASSES]]
    table = _table(("class", "training images", "test accuracy"), cells)
    lowest = f"The {_MOST_CLASSES} of {len(rows)} classes with the lowest accuracy:\n\n"
    return (lowest if len(rows) > _MOST_CLASSES else "") + table


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *(row for row in rows if None not in row)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    return plain(value).replace("|", "\\|").replace("<", "&lt;")
