"""Run a function in several processes that form a gloo group, and return what each of them returns."""

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A rank that fails leaves the others waiting; they give up after this.
TIMEOUT = datetime.timedelta(seconds=60)


def run(size: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Return `work(rank, *args)` of every rank. `work` is a module's function; `folder` is empty and stays behind."""
    # One server imports torch, the ranks are forked from it: a few seconds in all instead of a few seconds each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kimi_linear.ops", "pytest"])
    ranks = [context.Process(target=_rank, args=(rank, size, work, folder, args)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * size, "a rank failed; its traceback is above"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, work: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()
