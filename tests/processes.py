"""Processes that torch.distributed joins by gloo, to run functions of a test's module in."""

import datetime
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any


class Processes:
    """A pool: what is called runs in the first `size` processes, and gets their group and its own rank."""

    def __init__(self, module: str, size: int, folder: Path, *, timeout_s: float = 300) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])  # imported once for all pools
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            given = (module, rank, size, folder / "store", timeout_s, theirs)
            self.processes.append(context.Process(target=_work, args=given, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
        self.timeout_s = 60 + timeout_s  # until who waits for another has its error

    def __call__(self, size: int, name: str, *args: Any) -> list[Any]:
        """What the function gives in each process. An exception in one is raised here."""
        found = self.outcomes(size, name, *args)
        for rank, outcome in enumerate(found):
            if isinstance(outcome, str):
                raise AssertionError(f"in process {rank} of {size}: {outcome}")
        return [outcome[0] for outcome in found]

    def outcomes(self, size: int, name: str, *args: Any) -> list[Any]:
        """Of each process (result,), or in words an exception, or how it ended."""
        for pipe in self.pipes[:size]:
            pipe.send((size, name, args))
        return [self._outcome(rank) for rank in range(size)]

    def _outcome(self, rank: int) -> Any:
        try:
            if self.pipes[rank].poll(self.timeout_s):
                return self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(10)
            return f"ended with {self.processes[rank].exitcode}"
        return "gave no answer"

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def _work(module: str, rank: int, size: int, store: Path, timeout_s: float, pipe: Any) -> None:
    """Serves calls until the pipe is closed."""
    os.environ["NORMKIT_NUM_THREADS"] = "1"
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=timeout_s)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    groups = {n: distributed.group.WORLD if n == size else distributed.new_group(range(n)) for n in range(1, size + 1)}
    __import__(module)
    while True:
        try:
            count, name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((getattr(sys.modules[module], name)(groups[count], rank, *args),))
        except BaseException:  # that of pytest.fail too
            pipe.send(traceback.format_exc())
