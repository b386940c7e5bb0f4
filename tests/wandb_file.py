"""Reads an offline W&B run file back: LevelDB log blocks of `Record` messages."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    position, pending = _HEADER, b""  # the file starts with a header of seven bytes
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # padding at the end of a block
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        position += _HEADER
        part = data[position : position + length]
        position += length
        pending = part if kind in (_FULL, _FIRST) else pending + part
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(pending)
            yield record


def _plain(items: Iterable[Any]) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(path: Path) -> list[dict[str, Any]]:
    return [_plain(record.history.item) for record in records(path) if record.HasField("history")]


def config_updates(path: Path) -> list[dict[str, Any]]:
    found = []
    for record in records(path):
        found += [_plain(record.config.update)] if record.HasField("config") else []
        found += [_plain(record.run.config.update)] if record.HasField("run") else []
    return found


def step_metrics(path: Path) -> dict[str, str]:
    return {
        (r.metric.name or r.metric.glob_name): r.metric.step_metric
        for r in records(path)
        if r.HasField("metric") and r.metric.step_metric
    }


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(path):
        if record.HasField("summary"):
            found |= _plain(record.summary.update)
    return found


def run_record(path: Path) -> Any:
    return next(record.run for record in records(path) if record.HasField("run"))


def artifacts(path: Path) -> list[Any]:
    """Artifacts that wait for the server."""
    return [r.request.log_artifact.artifact for r in records(path) if r.request.HasField("log_artifact")] + [
        r.artifact for r in records(path) if r.HasField("artifact")
    ]
