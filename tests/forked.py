"""Programs in processes of their own, forked from a server that has PyTorch imported: its import takes seconds.

Of secateur the server knows nothing: a program imports it as it does where a user starts it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "torch", "torch._dynamo", "torch.export", "torch.distributed.nn", "torch.utils.flop_counter", "scipy.optimize",
    "sklearn.datasets", "accelerate", "PIL.Image", "pydantic",
])  # fmt: skip


def command(*words: str) -> None:
    """``secateur``, as it is installed."""
    sys.argv[:] = ["secateur", *words]
    from secateur.cli import main

    main()


def script(file: str, *words: str) -> None:
    """A file as Python's main program."""
    sys.argv[:] = [file, *words]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")


def start(
    program: Callable[..., None],
    words: Sequence[object],
    streams: Sequence[int],
    folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> BaseProcess:
    """Start a program.

    Args:
        program: :func:`command` or :func:`script`.
        words: its arguments.
        streams: file descriptors for what it reads, what it prints, and what it tells of errors.
        folder: the current one.
        environment: all of its variables.
    """
    process = SERVER.Process(
        target=_Begun(streams), args=(program, tuple(map(str, words)), str(folder or Path.cwd()), dict(environment))
    )
    process.start()
    return process


class _Begun:
    """What a new process does first; its file descriptors travel with it."""

    def __init__(self, streams: Sequence[int]) -> None:
        self.streams: Sequence[Any] = streams

    def __getstate__(self) -> list[Any]:
        return [DupFd(each) for each in self.streams]

    def __setstate__(self, streams: list[Any]) -> None:
        self.streams = [each.detach() for each in streams]

    def __call__(
        self, program: Callable[..., None], words: Sequence[str], folder: str, environment: Mapping[str, str]
    ) -> None:
        for number, stream in enumerate(self.streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[:] = [each for each in sys.path if each and not Path(each).is_relative_to(TESTS)]
        program(*words)


def run(program: Callable[..., None], *words: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its exit code, and what it has printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        process = start(program, words, [each.fileno() for each in (nothing, out, err)], **settings)
        process.join(300)
        process.kill()
        process.join()
        for each in (out, err):
            each.seek(0)
        return subprocess.CompletedProcess(words, process.exitcode or 0, out.read(), err.read())


def run_two(file: str, *words: object, environment: Mapping[str, str] = os.environ) -> None:
    """Run a file as two processes that know each other, as ``torchrun`` does; where one fails, the other ends too."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with tempfile.TemporaryFile("w+") as told, open(os.devnull) as nothing:
        streams = [nothing.fileno(), told.fileno(), told.fileno()]
        ranks = [
            start(script, [file, *words], streams, environment={**group, "RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"
        ]
        waiting = {rank.sentinel: rank for rank in ranks}
        while waiting and (ended := connection.wait(waiting, timeout=300)):
            if any(waiting.pop(each).exitcode for each in ended):
                break
        for rank in ranks:
            rank.kill()
            rank.join()
        told.seek(0)
        assert not any(rank.exitcode for rank in ranks), told.read()
