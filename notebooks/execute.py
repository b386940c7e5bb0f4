"""Runs the notebooks and keeps of their outputs what a reader needs: all of them as `make notebooks`, or `execute.py NAME…`."""

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

FOLDER = Path(__file__).parent
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a new kernel; their outputs go into the notebook.

    Args:
        notebook: to be run.
        folder: the kernel's current folder.

    Raises:
        CellExecutionError: of nbclient, when a cell fails.
    """
    environment = dict(os.environ)
    for name, first in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", FOLDER.parent)):
        environment[name] = os.pathsep.join(filter(None, [str(first), environment.get(name)]))
    with tempfile.TemporaryDirectory() as own:
        environment["IPYTHONDIR"] = own
        # sockets in a folder that only this user can enter, where over TCP anybody on the machine could listen
        local = Config({"KernelManager": {"transport": "ipc", "ip": f"{own}/kernel"}})
        place = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, timeout=None, startup_timeout=600, resources=place, config=local)
        client.execute(env=environment)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave out what changes from run to run or from machine to machine, and make the pictures small."""
    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _small(output.data["image/png"])
                output.data.pop("image/jpeg", None)  # Pillow's images come as both
                output.metadata = nbformat.from_dict({})


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """With what was printed in one piece, however it came."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _small(png: str) -> str:
    """A PNG, in base64, with a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    picture = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Run them where they lie and write them back."""
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        print(f"{name} …", flush=True)
        notebook = nbformat.read(path, nbformat.NO_CONVERT)
        execute(notebook, FOLDER)
        tidy(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
