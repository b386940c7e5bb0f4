"""The promises of the process pool that the distributed tests rest on."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import ProcessPool, WorkerError


def rank_sum(rank: int, value: float) -> tuple[int, torch.Tensor]:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return rank, total


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("told to fail")
    dist.barrier()


def sleep(rank: int, seconds: float) -> None:
    time.sleep(seconds)


def test_workers_share_a_process_group_answer_in_rank_order_and_recover_from_an_exception(two_processes):
    with pytest.raises(WorkerError, match=r"rank 1.*(?s:.)*told to fail"):
        two_processes(fail_on_rank_one, [(), ()])
    results = two_processes(rank_sum, [(1.0,), (2.0,)])
    assert [(rank, total.item()) for rank, total in results] == [(0, 3.0), (1, 3.0)]


def test_a_worker_that_does_not_return_is_stopped_at_the_timeout():
    pool = ProcessPool(1, timeout=20.0)
    pool(rank_sum, [(1.0,)])
    pool.timeout = 0.2
    with pytest.raises(WorkerError, match=r"no answer from ranks \[0\]"):
        pool(sleep, [(60.0,)])
