"""The ranks of one engine as torch.distributed sees them: NCCL between GPUs, gloo between CPUs.

The leader leads: it names a piece of work, every worker does its part of it, and the collectives
in it pair up because all do the same. What the leader decides (requests, schedule, samples) is
sent, never decided twice.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from runtime.ranks.mpi import Job, PeerError
from runtime.ranks.watch import interface_addresses

_FOREVER = timedelta(days=365)  # a worker waits for work; runtime/ranks/watch.py says who died
_FRAME_BYTES = 4096  # a message up to this size is one broadcast
_LENGTH_BYTES = 8  # a message's length, at the start of its frame
_CLOSE = "close"


@contextmanager
def _with_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"another rank is gone ({error})") from error


class ProcessGroup:
    def __init__(self, job: Job, device: torch.device) -> None:
        """Collective. Brings the ranks together by an address that rank 0 gives over MPI."""
        if not job.has_mpi:
            job.refuse(
                "several ranks with decoder 'torch' need mpi4py, which is not installed; "
                "pip install mpi4py mpich"
            )
        self.job, self.device = job, device
        self.size, self.rank = job.world.size, job.world.rank
        self._work: dict[str, Callable[[Any], object]] = {}
        self._releases: list[Callable[[], None]] = []
        self._frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
        self._lock = threading.Lock()
        self._is_broken = False
        # Every rank talks through the interface by which it reaches the leader, or is reached.
        # gloo takes its name from the environment alone, and only now is it known.
        addresses = job.gather(job.watch.leader_address)
        address = addresses[-1] if self.rank == 0 else job.watch.local_address
        names = {value: name for name, value in interface_addresses().items()}
        if address in names:  # a second address of an interface is not
            os.environ.setdefault("GLOO_SOCKET_IFNAME", names[address])
        host = job.watch.leader_address
        is_leader = self.rank == 0
        port = 0
        if is_leader:
            store = TCPStore(host, 0, self.size, True, _FOREVER, wait_for_workers=False)
            port = store.port
        port = job.broadcast(port)
        if not is_leader:
            store = TCPStore(host, port, self.size, False, _FOREVER)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        hook = sys.excepthook
        dist.init_process_group(
            backend,
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=_FOREVER,
            device_id=device if device.type == "cuda" else None,  # NCCL connects now
        )
        sys.excepthook = hook  # torch's holds back what is printed until it returns; ours does not

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, maybe in place. x: float32.

        CPUs add in the order of ranks, so that a row's bits do not depend on the rows beside it:
        gloo adds each part of a tensor in another order.
        """
        assert x.dtype == torch.float32, "sums are rounded once, after the reduction"
        if x.device.type == "cuda" or self.size == 2:
            with _with_peers():
                dist.all_reduce(x)
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _with_peers():
            dist.all_gather(parts, x)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor | None:
        """The ranks' x [n, columns] side by side, on the leader; None on the others."""
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        with _with_peers():
            dist.gather(x, parts)
        return None if parts is None else torch.cat(parts, dim=1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """The leader's x, into every rank's."""
        with _with_peers():
            dist.broadcast(x, 0)
        return x

    def send(self, x: torch.Tensor, rank: int) -> None:
        self._exchange(dist.isend, x.contiguous(), rank)

    def receive(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        self._exchange(dist.irecv, x, rank)
        return x

    def _exchange(self, operation: Callable[..., object], x: torch.Tensor, rank: int) -> None:
        """Exchanges a batch of one: torch warns of NCCL's sends and receives outside a batch."""
        with _with_peers():
            for work in dist.batch_isend_irecv([dist.P2POp(operation, x, rank)]):
                work.wait()

    def on(self, name: str, work: Callable[[Any], object]) -> None:
        """What a worker does when the leader leads `name`."""
        self._work[name] = work

    def on_close(self, release: Callable[[], None]) -> None:
        """What every rank gives back before the group ends, the last one first. NCCL's end waits
        for CUDA graphs that hold its reductions, so they must be gone by then."""
        self._releases.append(release)

    @contextmanager
    def leading(self, name: str, message: object) -> Iterator[None]:
        """Lets workers do `name` with `message` while the block does the leader's part.

        The leader calls it, from any thread; one block runs at a time."""
        with self._lock:
            if self._is_broken:
                raise PeerError("an earlier failure left the ranks at different places")
            self._is_broken = True  # until the block is through, no other work can be led
            self._send_message((name, message))
            yield
            self._is_broken = False

    def follow(self) -> None:
        """Does what the leader leads, until it closes. A worker calls it."""
        while True:
            name, message = self._receive_message()
            if name == _CLOSE:
                self._end()
                return
            self._work[name](message)

    def close(self) -> None:
        """Ends the workers' `follow`, unless a failure is ending them. The leader calls it."""
        if not self._is_broken:
            with self.leading(_CLOSE, None):
                self._end()

    def _end(self) -> None:
        while self._releases:
            self._releases.pop()()
        dist.destroy_process_group()

    def _send_message(self, message: tuple[str, object]) -> None:
        """One broadcast of a frame; a longer message follows it in a second one."""
        data = pickle.dumps(message)
        framed = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        part = torch.frombuffer(bytearray(framed[:_FRAME_BYTES]), dtype=torch.uint8)
        self._frame[: len(part)] = part
        self.broadcast(self._frame)
        if len(framed) > _FRAME_BYTES:
            self.broadcast(torch.frombuffer(bytearray(framed[_FRAME_BYTES:]), dtype=torch.uint8))

    def _receive_message(self) -> tuple[str, Any]:
        framed = self.broadcast(self._frame).numpy().tobytes()
        end = _LENGTH_BYTES + int.from_bytes(framed[:_LENGTH_BYTES], "little")
        if end > _FRAME_BYTES:
            rest = torch.empty(end - _FRAME_BYTES, dtype=torch.uint8)
            framed += self.broadcast(rest).numpy().tobytes()
        message: tuple[str, Any] = pickle.loads(framed[_LENGTH_BYTES:end])
        return message
