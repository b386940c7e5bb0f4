"""A pool of gloo processes, started once and used by every distributed test."""

import importlib
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class WorkerError(RuntimeError):
    """Something went wrong in a process of the pool; carries that process's traceback as text."""


class ProcessPool:
    """`world_size` spawned processes with a gloo process group, kept alive between calls.

    `pool(worker, per_rank_args)` calls the module-level function `worker(rank, *per_rank_args[rank])` on every rank and
    returns the results in rank order. Arguments and results travel by pickle, so tensors arrive as copies. A worker's
    exception is raised here as `WorkerError` with the remote traceback; a pool that failed or ran into the timeout is
    torn down, since its ranks may disagree about the next collective, and starts again with the next call.
    """

    def __init__(self, world_size: int, timeout: float = 60.0) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, worker: Callable[..., Any], per_rank_args: Sequence[tuple[Any, ...]]) -> list[Any]:
        if len(per_rank_args) != self.world_size:
            raise ValueError(f"{len(per_rank_args)} argument tuples for {self.world_size} ranks")
        messages = [pickle.dumps((worker, args)) for args in per_rank_args]
        if not self._processes:
            self._start()
        deadline = time.monotonic() + self.timeout
        try:
            for connection, message in zip(self._connections, messages, strict=True):
                connection.send_bytes(message)
            return self._collect(deadline)
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (rank, self.world_size, store, theirs, self.timeout)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(results) + len(errors) < self.world_size and time.monotonic() < deadline:
            for rank, connection in enumerate(self._connections):
                if rank in results or rank in errors or not connection.poll(0.005):
                    continue
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    ok, value = False, "the process died"
                if ok:
                    results[rank] = value
                else:
                    errors[rank] = value
                    # The others may wait for this rank in a collective that will not come.
                    deadline = min(deadline, time.monotonic() + 2.0)
        if errors:
            raise WorkerError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
        if len(results) < self.world_size:
            silent = sorted(set(range(self.world_size)) - set(results))
            raise WorkerError(f"no answer from ranks {silent} within {self.timeout:g} s")
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(1.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def import_module(rank: int, name: str) -> None:
    """A worker that imports a module, and no more."""
    importlib.import_module(name)


def _serve(rank: int, world_size: int, store: str, connection: Connection, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # tells a Lightning trainer that its processes are there already
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # the host's own name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            break
        try:
            worker, args = pickle.loads(message)
            reply = pickle.dumps((True, worker(rank, *args)))
        except BaseException:
            reply = pickle.dumps((False, traceback.format_exc()))
        try:
            connection.send_bytes(reply)
        except OSError:
            break
    dist.destroy_process_group()
