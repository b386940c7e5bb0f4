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
from multiprocessing.pool import AsyncResult, Pool
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from tests.waiting import DEADLINE

_CONTEXT = mp.get_context("forkserver")  # one process imports what all of them need
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "etflight"])


class WorkerError(RuntimeError):
    """Something went wrong in a process of the pool; carries that process's traceback as text."""


class ProcessPool:
    """`world_size` spawned processes with a gloo process group, kept alive between calls.

    `pool(worker, per_rank_args)` calls the module-level function `worker(rank, *per_rank_args[rank])` on every rank and
    returns the results in rank order. Arguments and results travel by pickle, so tensors arrive as copies. A worker's
    exception is raised here as `WorkerError` with the remote traceback; a pool that failed or ran into the timeout is
    torn down, since its ranks may disagree about the next collective, and starts again with the next call.
    """

    def __init__(self, world_size: int, timeout: float = DEADLINE) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._ranks: list[Pool] = []

    def __call__(self, worker: Callable[..., Any], per_rank_args: Sequence[tuple[Any, ...]]) -> list[Any]:
        if len(per_rank_args) != self.world_size:
            raise ValueError(f"{len(per_rank_args)} argument tuples for {self.world_size} ranks")
        messages = [pickle.dumps((worker, (rank, *args))) for rank, args in enumerate(per_rank_args)]
        if not self._ranks:
            self._folder = tempfile.TemporaryDirectory()
            for rank in range(self.world_size):
                start = (rank, self.world_size, f"{self._folder.name}/store", self.timeout)
                self._ranks.append(_CONTEXT.Pool(1, _join, start))
        try:
            answers = [pool.apply_async(_call, (m,)) for pool, m in zip(self._ranks, messages, strict=True)]
            return self._collect(answers)
        except BaseException:
            self.close()
            raise

    def _collect(self, answers: list[AsyncResult[bytes]]) -> list[Any]:
        deadline, found = time.monotonic() + self.timeout, {}
        while len(found) < len(answers) and time.monotonic() < deadline:
            time.sleep(0.002)
            for rank, answer in enumerate(answers):
                if rank not in found and answer.ready():
                    found[rank] = pickle.loads(answer.get())
                    if isinstance(found[rank], WorkerError):
                        # the others may wait for this rank in a collective that will not come
                        deadline = min(deadline, time.monotonic() + 2.0)
        if errors := [
            f"rank {rank}: {value}" for rank, value in sorted(found.items()) if isinstance(value, WorkerError)
        ]:
            raise WorkerError("\n".join(errors))
        if silent := sorted(set(range(self.world_size)) - found.keys()):
            raise WorkerError(f"no answer from ranks {silent} within {self.timeout:g} s")
        return [found[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for pool in self._ranks:
            pool.terminate()
            pool.join()
            self._folder.cleanup()
        self._ranks = []


def import_module(rank: int, name: str) -> None:
    """A worker that imports a module, and no more."""
    importlib.import_module(name)


def _join(rank: int, world_size: int, store: str, timeout: float) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # tells a Lightning trainer that its processes are there already
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # the host's own name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )


def _call(message: bytes) -> bytes:
    try:
        worker, args = pickle.loads(message)
        return pickle.dumps(worker(*args))
    except BaseException:  # pytest's are no Exceptions
        return pickle.dumps(WorkerError(traceback.format_exc()))
