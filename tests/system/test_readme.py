import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from etflight.cli import OTHERS
from tests.training import save_folders

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
DOCS = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "build" not in path.parts]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


# what is in text in docs/ need not be whole
TEXT = README + "".join(f"```bash\n{block}```\n" for path in DOCS for block in blocks(path.read_text(), "bash"))


def test_every_file_it_names_exists():
    named = re.findall(r"(?:configs|notebooks)/[\w./-]+\.(?:yaml|png|gif|json)", README)
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_contributings_map_names_every_file_and_folder_of_the_package():
    drawn = re.search(r"```\netflight/\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)[1]
    named = {name for line in drawn.splitlines() for name in re.findall(r"(\w+(?:/|\.py))(?=,|  | *$)", line[:60])}
    there = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "etflight").iterdir()}
    assert named == there - {"__init__.py", "_version.py", "py.typed", "__pycache__/"}


def commands(document: str = README) -> list[str]:
    """Every `etflight …` of the shell blocks and the text; not what has parts left open, nor the job script, tested elsewhere."""
    shell = "\n".join(blocks(document, "bash")).replace("\\\n", " ")
    spans = re.findall(r"`(etflight [a-z]+ [^`]+)`", re.sub(r"```.*?```", "", document, flags=re.DOTALL))
    lines = [part for text in (*shell.splitlines(), *spans) for part in " ".join(text.split()).split(" && ")]
    found = (re.search(r"(?:^|-m |srun )(etflight [a-z]+ .*)", line) for line in lines)
    whole = [line[1] for line in found if line and not re.search(r"[<…|$]", line[1].partition(" #")[0])]
    return [line for line in dict.fromkeys(whole) if line != "etflight predict --images"]


@pytest.fixture(scope="module")
def trained(etflight_command, tmp_path_factory):
    """A folder with the configurations, one short run under every name that a command asks for, and a module of one's own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "notebooks").symlink_to(ROOT / "notebooks")
    short = ["--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1, "--trainer.callbacks", "null"]
    config = ["-c", "configs/data/digits.yaml", "-c", "configs/arms/etf_dr_balanced.yaml"]
    for argv in (["fit", *config, *short], ["test", *config, "--ckpt_path", "last"]):
        etflight_command(*argv, cwd=folder).ran()
    run = folder / "runs/digits/etf_dr_balanced"
    checkpoints = set(re.findall(r"runs/[\w/]+/checkpoints/\w+\.ckpt", TEXT))
    named = {
        *(name.rpartition("/checkpoints/")[0] for name in checkpoints),
        *(word for command in commands(TEXT) for word in command.split() if re.fullmatch(r"runs/[\w/]+", word)),
    }
    for name in sorted(named):  # a run before the folders inside it
        if not (folder / name).exists():
            shutil.copytree(run, folder / name)
    for name in checkpoints:
        if not (folder / name).exists():
            shutil.copy(run / "checkpoints/last.ckpt", folder / name)
    own = [
        block
        for path in DOCS
        for block in blocks(path.read_text(), "python")
        if re.search(r"class \w+\((?:Head|Loss|ImageDataModule)\)", block)
    ]
    (folder / "mine.py").write_text("\n".join(["import torch", *own]))
    return folder


@pytest.mark.parametrize("command", commands(TEXT))
def test_every_command_is_understood(command, trained, etflight_command):
    """As written, and to its end where that is quick; else up to the point where it would begin to work."""
    argv = shlex.split(re.sub(r" >.*", "", command), comments=True)[1:]
    argv = [path for arg in argv for path in (sorted(map(str, trained.glob(arg))) if "*" in arg else [arg])]
    if argv[0] in ("study", "dashboard"):
        argv = [*argv, "--dry-run"]
    elif argv[0] not in ("report", "configs") and not any("help" in arg for arg in argv):
        argv = [*argv, "--print_config"]
    result = etflight_command(*argv, cwd=trained).ran()
    assert result.out


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_what_a_newcomer_gives_first_runs_to_its_end_one_after_another(page, etflight_command, tmp_path):
    """The first training with its test, on a batch of small images."""
    save_folders(tmp_path / "photos", train={"cat": 2, "dog": 2}, test={"cat": 1, "dog": 1})
    lines = [line for line in commands((ROOT / page).read_text()) if not line.startswith("etflight study")]
    first = next(i for i, line in enumerate(lines) if line.startswith("etflight fit"))
    short = ["--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1, "--trainer.callbacks", "null"]
    small = ["--data.image_size", 32] if "folder" in lines[first] else []
    for line in lines[: first + 2]:
        name, *argv = shlex.split(line)[1:]
        more = {"fit": [*short, *small], "test": small}.get(name, [])
        etflight_command.succeed(name, *argv, *more, cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/**/test_metrics.json"))) == 1


def test_the_commands_are_found():
    assert len(commands(TEXT)) > 50
    assert {line.split()[1] for line in commands(TEXT)} >= {"fit", "test", "predict", *OTHERS}


def test_commands_on_sets_that_torchvision_fetches_ask_for_the_download():
    fetched = r"/(?:cifar100?|fashion_mnist|svhn|stl10)_\w+|--data (?:FashionMNIST|CIFAR100?)"
    trained = [line for line in commands() if line.split()[1] in ("fit", "study", "ood") and re.search(fetched, line)]
    assert len(trained) >= 4
    assert not [line for line in trained if "--data.download true" not in line]
    (reproduced,) = re.findall(r"etflight study configs/studies/fashion.*", (ROOT / "Makefile").read_text())
    assert "--data.download true" in reproduced


def test_the_software_itself_is_what_is_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["type"] == "software"
    assert "preferred-citation" not in citation
    assert [paper["title"] in README for paper in citation["references"]] == [True]


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", README, flags=re.DOTALL), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", README)
    assert len(targets) > 15
    for target in map("".join, targets):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target


def test_every_name_of_the_package_is_reached_from_its_root():
    """In an interpreter that has imported nothing else of it."""
    code = "".join(
        re.findall(
            r"```python\n.*?```|`[^`\n]+`", "".join([README, *(path.read_text() for path in DOCS)]), flags=re.DOTALL
        )
    )
    named = sorted(set(re.findall(r"\betflight(?:\.[A-Za-z_]\w*)+", code)))
    assert {"etflight.simplex_etf", "etflight.backbones.SyncBatchNorm"} <= set(named)
    subprocess.run([sys.executable, "-c", "\n".join(["import etflight", *named])], check=True)
