"""A trained classifier as a graph that needs none of its code: torch.export and ONNX."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from etflight.classifier import Classifier
from etflight.data.preprocessing import Preprocessing
from etflight.embedder import Rotation
from etflight.utils.errors import UserError, argument, brief, let_through

TOLERANCE = 1e-4  # of logits, relative to the largest
Run = Callable[[Tensor], Tensor]


class Graph(nn.Module):
    """Normalised images `[B, C, H, W]` to the logits `[B, K]` that decide; their softmax is the calibrated probabilities.

    Args:
        classifier: The classifier, in evaluation mode, on the CPU.
    """

    factor: Tensor
    temperature: Tensor
    shift: Tensor

    @torch.no_grad()
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(classifier.backbone), copy.deepcopy(classifier.head)
        rotation = getattr(self.head.embedder, "rotation", None)
        if isinstance(rotation, Rotation):
            self.head.embedder.rotation = _constant(rotation)  # ONNX has no operator that solves equations
        zero, one = (classifier.calibrated(torch.full((1, self.head.num_classes), value).double()) for value in (0, 1))
        # without multiplicative adjustment exactly 1, so that the logits are the classifier's, bit by bit
        self.register_buffer("factor", ((one - zero) * classifier.temperature).float())
        self.register_buffer("temperature", classifier.temperature)
        self.register_buffer("shift", zero.float())

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, float32."""
        logits: Tensor = self.head(self.backbone(images))
        return logits.float() * self.factor / self.temperature + self.shift


def _constant(rotation: Rotation) -> nn.Linear:
    matrix = rotation.matrix()
    layer = nn.Linear(len(matrix), len(matrix), bias=False)
    layer.weight.copy_(matrix)
    return layer


def trace(classifier: Classifier, preprocessing: Preprocessing) -> ExportedProgram:
    """The graph of a classifier, for any number of images.

    Args:
        classifier: The classifier, in evaluation mode, on the CPU.
        preprocessing: The preprocessing of its images.

    Raises:
        UserError: torch.export cannot follow the network's code.
    """
    graph = Graph(classifier).eval().requires_grad_(False)
    with _speaking_for("torch.export", classifier):
        images = torch.zeros(2, *preprocessing.input_size)
        return torch.export.export(graph, (images,), dynamic_shapes={"images": {0: Dim("batch")}})


def save_torch_export(program: ExportedProgram, classifier: Classifier, facts: Mapping[str, str], path: Path) -> None:
    """Write a `.pt2` file, read it back and compare it with the model.

    Args:
        program: The graph that `trace` made.
        classifier: The classifier that it was made from.
        facts: Facts about the model, kept in the file as `extra_files`.
        path: The file.

    Raises:
        UserError: The file cannot be written, or does not give what the model gives.
    """
    with _speaking_for("torch.export", classifier):
        torch.export.save(program, path, extra_files=dict(facts))
        read = torch.export.load(path).module()
    _check(read, program, classifier, "torch.export")


def save_onnx(program: ExportedProgram, classifier: Classifier, facts: Mapping[str, str], path: Path) -> None:
    """Write an ONNX file and compare it with the model in onnxruntime; weights too large for one file go into a second one beside it.

    Args:
        program: The graph that `trace` made.
        classifier: The classifier that it was made from.
        facts: Facts about the model, kept in the file as its metadata.
        path: The file.

    Raises:
        UserError: Packages are missing, or the file cannot be written, or does not give what the model gives.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(
            f"format onnx needs {error.name}: install the extra (pip install 'etflight[export]'), or leave it out"
        ) from error
    with _speaking_for("ONNX", classifier):
        written = torch.onnx.export(
            program, (), input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "batch"},), verbose=False
        )
        assert written is not None
        written.model.metadata_props.update(facts)
        written.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    _check(run, program, classifier, "ONNX")


def facts(classifier: Classifier, preprocessing: Preprocessing) -> dict[str, str]:
    """Facts that the graph alone does not tell, as JSON texts by name."""
    known = {**preprocessing._asdict(), "class_names": classifier.class_names}
    return {name: json.dumps(value) for name, value in known.items()}


@contextmanager
def _speaking_for(kind: str, classifier: Classifier) -> Iterator[None]:
    """Within the block, torch's exporters do not warn, and fail with one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # errors of torch.export, the ONNX exporter and the network's own code
        let_through(error)
        if isinstance(error, OSError):
            raise UserError(
                f"{kind} cannot be written ({error.strerror or error}): give another {argument('output')}"
            ) from error
        name = classifier.hparams["backbone"]
        raise UserError(
            f"{name} cannot be written as {kind} ({brief(error, 300)}): give another {argument('format')}"
        ) from error


@torch.no_grad()
def _check(run: Run, program: ExportedProgram, classifier: Classifier, kind: str) -> None:
    """Compare the written graph with the classifier, on another number of images than it was traced with."""
    shape = program.example_inputs[0][0].shape[1:]
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = classifier.calibrated(classifier(images))
    error = float((run(images) - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        name = classifier.hparams["backbone"]
        raise UserError(
            f"{name} as {kind} gives other logits, by {error:.1e} of the largest: give another {argument('format')}"
        )
