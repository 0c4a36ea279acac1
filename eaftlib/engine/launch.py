"""One call on several GPUs of this machine: a process is started for each GPU but the first, for as long as the call takes."""

import _thread
import functools
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from ..errors import ScoringError
from . import ranks

READY = "ready"
SHARED = "EAFT_SHARED"  # set in the processes that share a call
GRACE_SECONDS = 5
LOST = signal.SIGUSR2  # rank 0's word to itself that another is gone; a job of a script (&) ignores SIGINT
P, R = ParamSpec("P"), TypeVar("R")


def over_gpus(shares: Callable[..., int]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let ``work`` run once for each of the processes that its argument ``placement`` asks for, as ranks of one group.

    shares: of the same arguments, among how many processes the work can be divided: no more are started. This process is
    rank 0, on the first GPU, and returns what its own ``work`` returns. The others get the same arguments, pickled, and
    what they return is dropped. Raises ScoringError when one of them fails.
    """

    def decorate(work: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(work)
        def run(*args, **kwargs):
            call = inspect.signature(work).bind(*args, **kwargs)
            placement = call.arguments["placement"]
            if placement.processes == 1:
                return work(*args, **kwargs)
            if SHARED in os.environ:
                call.arguments["placement"] = placement.of_rank(ranks.current()[0])
                return work(*call.args, **call.kwargs)
            count = max(1, min(placement.processes, shares(**call.arguments)))
            if count == 1:
                call.arguments["placement"] = placement.of_rank(0)
                return work(*call.args, **call.kwargs)
            with _helpers(count, pickle.dumps((run, args, kwargs))):
                return run(*args, **kwargs)

        return run

    return decorate


def serve(path: str) -> None:
    """What a started process does: the call in the file ``path``, unless the process that started it ends before."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    work, args, kwargs = pickle.loads(Path(path).read_bytes())
    print(READY, flush=True)
    os.dup2(2, 1)  # whatever is printed from here on goes where errors go
    try:
        work(*args, **kwargs)
    except BaseException:  # the process ends here, and must say why before the group's threads are torn down
        traceback.print_exc()
        os._exit(1)
    dist.destroy_process_group()


class _Helper:
    """The process of one rank."""

    def __init__(self, rank: int, folder: Path, group: dict[str, str]):
        self.rank, self.closing, self.errors = rank, False, folder / f"errors-{rank}"
        self.ended = float("inf")  # when, by the monotonic clock
        program = f"from eaftlib.engine.launch import serve; serve({str(folder / 'call')!r})"
        paths = os.pathsep.join(path for path in sys.path if path)
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True,  # an interrupt from the keyboard is for this process
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        for line in self.process.stdout:
            if line.strip() == READY:
                threading.Thread(target=self._watch, daemon=True).start()
                return
        self.process.wait()
        raise self.failure()

    def _watch(self) -> None:
        """Interrupt rank 0: it would compute for hours what can no longer be put together."""
        failed = self.process.wait() != 0
        self.ended = time.monotonic()
        time.sleep(GRACE_SECONDS)  # what is wrong with the call itself, rank 0 finds too, and says it better
        if failed and not self.closing:
            _thread.interrupt_main(LOST)

    def failure(self) -> ScoringError:
        last = (self.said() or "it said nothing").splitlines()[-1]
        return ScoringError(f"the process of GPU {self.rank} ended with status {self.process.returncode}: {last}")

    def said(self) -> str:
        lines = self.errors.read_text().splitlines()  # torch 2.10's Gloo has one of its own for every rank
        return "\n".join(line for line in lines if not line.startswith("[Gloo] ")).strip()

    def close(self) -> None:
        self.closing = True
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def _helpers(count: int, call: bytes) -> Iterator[None]:
    """Ranks 1 to ``count`` - 1 do the call while the body, rank 0, does the same."""
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(_free_port()), "GLOO_SOCKET_IFNAME": "lo", SHARED: "1"}
    helpers: list[_Helper] = []
    with tempfile.TemporaryDirectory(prefix="eaft-") as folder, _environment(group | {"RANK": "0"}), _told_of_losses():
        (Path(folder) / "call").write_bytes(call)
        try:
            helpers += [_Helper(rank, Path(folder), group) for rank in range(1, count)]
            for helper in helpers:
                helper.wait_until_ready()
            yield
            _require_success(helpers, None)
            sys.stderr.write("".join(f"GPU {h.rank}: {h.said()}\n" for h in helpers if h.said()))  # warnings
        except RuntimeError:  # a connection to another rank was lost, say because that one failed
            _require_success(helpers, GRACE_SECONDS)
            raise
        except KeyboardInterrupt:  # _watch's, or a person's
            _require_success(helpers, 0)
            raise
        finally:
            for helper in helpers:
                helper.close()
            if dist.is_initialized():
                dist.destroy_process_group()


def _require_success(helpers: list[_Helper], seconds: float | None) -> None:
    """Raise what the helper that failed first has to say: it took the others with it.

    seconds: how long to wait for all to end (None: until they do).
    """
    for helper in helpers:
        helper.closing = True  # from here on it is looked after here
    end = float("inf") if seconds is None else time.monotonic() + seconds
    while any(helper.process.poll() is None for helper in helpers) and time.monotonic() < end:
        time.sleep(0.05)
    failed = [helper for helper in helpers if helper.process.poll()]
    for helper in failed:
        sys.stderr.write(f"GPU {helper.rank}: {helper.said()}\n")
    if failed:
        raise min(failed, key=lambda helper: helper.ended).failure()


@contextmanager
def _told_of_losses() -> Iterator[None]:
    before = signal.signal(LOST, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(LOST, before)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
