"""Several processes as one program, through `jax.distributed`.

Every process runs the same command and takes part in every compiled step over the whole mesh. Process 0 alone has the sampler,
the gateway, the agents, the store and the metrics. What only it knows, the rollouts above all, it tells the others (`from_first`),
so that all pack the same batch. OUT is a folder that all of them share: each writes its shards of a checkpoint there.

One that fails stops all, each with one sentence: the reason is left at the coordinator, where every process looks for one twice
a second, whatever its main thread waits for. A process that is killed leaves none: jax.distributed misses its heartbeat then and
ends the others.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lightningrl.errors import UserError
from lightningrl.rollout_bytes import decode, encode
from lightningrl.types import Rollout

AUTO = "auto"  # the coordinator of a cluster that JAX knows by itself
JOINING_SECONDS = 300  # how long processes wait for each other at the start
HEARTBEAT_SECONDS = 60  # without one, a process counts as dead
LOOKING_SECONDS = 0.5  # between looks for a reason to stop
SMALLEST_MESSAGE = 1 << 12  # bytes; messages are padded to powers of two, so that few sizes are compiled
REASON = "lightningrl/reason_to_stop"


def is_first() -> bool:
    """Whether this process is the one with the agents. True for a run of one process."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int, process: int) -> Iterator[None]:
    """Makes this process one of several for the block; an error in the block stops all of them. Nothing for one process.

    Args:
      coordinator: HOST:PORT of process 0; "auto" where JAX finds coordinator, number and index by itself (Slurm, Open MPI,
        Kubernetes, TPU pods); None for a run of one process.
      processes, process: how many there are, and which one this is; not read with "auto".

    Raises:
      UserError: settings that don't fit together, or processes that do not find each other.
    """
    if coordinator is None and processes == 1:
        yield
    elif jax.distributed.is_initialized():  # a run within a run
        yield
    else:
        check_settings(coordinator, processes, process)
        _join(coordinator, processes, process)
        watch = _Watch()
        try:
            yield
        except BaseException as error:
            watch.tell(_reason(error))
            raise


def check_settings(coordinator: str | None, processes: int, process: int) -> None:
    """Refuses settings that don't fit together."""
    if coordinator is None:
        raise UserError(f"processes={processes} need --coordinator=HOST:PORT, the address of process 0, or --coordinator=auto")
    if coordinator == AUTO:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"coordinator={coordinator} must be HOST:PORT, the address of process 0, or auto")
    if not 0 <= process < processes:
        raise UserError(f"process={process} must be from 0 to {processes - 1}, as processes={processes}")


def _join(coordinator: str | None, processes: int, process: int) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    given: dict[str, Any] = {}
    if coordinator != AUTO:
        given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        if process > 0:
            _wait_for(str(coordinator), process)
    try:
        jax.distributed.initialize(**given, initialization_timeout=JOINING_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        jax.devices()  # the processes tell each other of their devices here
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"process {process} of {processes} could not join the others at {coordinator}: {first}") from error


def _wait_for(coordinator: str, process: int) -> None:
    """Returns when process 0 listens. JAX would end the process, with a long log, where none does."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + JOINING_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {process} found no process 0 at {coordinator} within {JOINING_SECONDS} s ({error}): "
                    "start it with --process=0, and give all the same --coordinator"
                ) from error
        time.sleep(LOOKING_SECONDS)


class _Watch:
    """A thread that ends this process when another one has left a reason to stop."""

    def __init__(self) -> None:
        # The coordinator's key-value store has no public name; orbax reaches it in the same way.
        from jax._src import distributed

        self._store: Any = distributed.global_state.client
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # runs before JAX leaves the coordinator, which was registered earlier

    def tell(self, reason: str) -> None:
        """Leaves this process' reason to stop, unless another one was first."""
        self._stop()
        with contextlib.suppress(Exception):
            self._store.key_value_set(REASON, f"process {jax.process_index()} stopped: {reason}")

    def _look(self) -> None:
        while not self._over.wait(LOOKING_SECONDS):
            try:
                reason = self._store.key_value_try_get(REASON)
            except Exception:  # there is none, or no coordinator any more, which JAX's own heartbeat sees to
                continue
            # The main thread may wait for the others within a compiled program, where no exception reaches it.
            print(f"error: {reason}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                jax.distributed.shutdown()  # all meet there: without it the one that failed would wait
            os._exit(1)

    def _stop(self) -> None:
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def share(data: bytes | None) -> bytes:
    """Process 0's bytes, on every process; all call it, the others with None."""
    if jax.process_count() == 1:
        assert data is not None
        return data
    length = int(multihost_utils.broadcast_one_to_all(np.array([len(data or b"")], np.int32))[0])
    padded = np.zeros(max(SMALLEST_MESSAGE, 1 << (length - 1).bit_length()), np.uint8)
    if data is not None:
        padded[:length] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:length].tobytes()


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0, where alone it is called: a JSON value, equal on every process."""
    if jax.process_count() == 1:
        return make()
    return json.loads(share(json.dumps(make()).encode() if is_first() else None))


def wait_for_all(where: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def check_same(what: str, value: str) -> None:
    """Refuses a value that is not process 0's, on the process that has another one.

    Raises:
      UserError: it has another one; the sentence names `what`.
    """
    first = from_first(lambda: value)
    if value != first:
        raise UserError(f"process {jax.process_index()} has other {what} than process 0: give every process the same flags and files")


def check_shared(folder: pathlib.Path) -> None:
    """Refuses a folder that is not one and the same for all processes.

    Raises:
      UserError: this process does not see what process 0 wrote there.
    """
    if jax.process_count() == 1:
        return
    name = from_first(lambda: f".seen-by-all-{uuid.uuid4().hex}")
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    wait_for_all("written")
    seen = (folder / name).exists()
    wait_for_all("seen")
    if is_first():
        (folder / name).unlink()
    if not seen:
        raise UserError(
            f"{folder} is not the same folder for every process: process {jax.process_index()} does not see what process 0 wrote"
        )


class SharedRunner:
    """A runner whose rollouts every process gets. All call `run` with equal requests; the agents run at process 0."""

    def __init__(self, runner: Any | None) -> None:
        self._runner = runner  # None elsewhere than at process 0

    def run(self, requests: Sequence[Any], **settings: Any) -> list[Rollout]:
        if self._runner is None:
            return decode(share(None))
        rollouts = self._runner.run(requests, **settings)
        share(encode(rollouts))
        return rollouts


class SamplerElsewhere:
    """Stands for the sampler of process 0 at the others."""

    busy_seconds = 0.0

    def set_params(self, params: Any, policy_version: int) -> None:
        pass
