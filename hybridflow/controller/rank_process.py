"""The process of one rank: it hosts the workers of every role on its pool and runs the calls of the controller."""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import pickle
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import ray

from hybridflow import registry
from hybridflow.batch import Batch, LocalShard, ShardColumn, Source
from hybridflow.config.schema import Config
from hybridflow.controller.stacks import DUMP_SIGNAL, RankIdentity
from hybridflow.errors import HybridflowError, WorkerError
from hybridflow.guardian import end_with_parent
from hybridflow.metrics import Metrics
from hybridflow.parallel.addresses import own_host
from hybridflow.parallel.layout import Layout
from hybridflow.user_file import import_file
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.hardware import HardwareInfo
from hybridflow.workers.remote import RemoteMethod, checked

# Role, method, positional and keyword arguments. One argument of the Ray call, since each costs 0.1 ms.
Invocation = tuple[str, str, tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class StoredShard:
    """A shard in the object store. Fetching it on the node that holds it copies nothing.

    It is fetched once, however many columns are read, and however often: a batch that was collected prompt by prompt has a
    shard for each, and a call on the object store takes half a millisecond.
    """

    reference: ray.ObjectRef[dict[str, ShardColumn]]
    num_rows: int

    def fetch(self) -> dict[str, ShardColumn]:
        return self._columns

    @cached_property
    def _columns(self) -> dict[str, ShardColumn]:
        return ray.get(self.reference)

    def __reduce__(self) -> tuple[type[StoredShard], tuple[object, int]]:
        return StoredShard, (self.reference, self.num_rows)  # what was fetched stays where it was


@dataclass(frozen=True)
class Memory:
    """The most that torch has held on a GPU since the last weight sync within the process began, or since the process did."""

    allocated_gib: float
    reserved_gib: float


@dataclass(frozen=True)
class RankAnswer:
    """What a rank sends to the controller: everything but token-level data, which stays in the object store."""

    value: object
    """The result; of a batch its per-row columns, as a batch."""
    shard_names: tuple[str, ...] = ()
    """Columns that the second return value of the call holds."""
    num_rows: int = 0
    seconds: float = 0.0
    began: float = 0.0
    """Seconds since the epoch, by the clock of this node."""
    num_bytes: int = 0
    """Pickled size of `value`."""
    memory: Memory | None = None
    """Of this rank's GPU, where it has one."""
    reported: Metrics = field(default_factory=Metrics)
    """What the method has reported beside its result."""

    def with_shard(self, reference: ray.ObjectRef[dict[str, ShardColumn]]) -> object:
        """The result, as the controller sees it."""
        if not isinstance(self.value, Batch) or not self.shard_names:
            return self.value
        source = Source(self.shard_names, (StoredShard(reference, self.num_rows),), range(self.num_rows))
        return Batch(self.value.per_row, (source,))


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Which rank of which pool a process is."""

    pool: str
    rank: int
    num_ranks: int
    ranks_per_node: int
    device_type: str
    """`cuda` or `cpu`."""
    environment: dict[str, str]
    """Variables to set before anything is imported."""
    folder: str
    """Where the controller works: relative paths mean the same to the ranks, wherever this folder is on their machine too."""
    user_files: tuple[str, ...] = ()
    """Python files to import before anything else: arguments of calls may be of their classes."""
    imports: tuple[str, ...] = ()
    """Modules that the workers of this process will need."""


class RankProcess:
    """The body of the Ray actor."""

    def __init__(self, place: RankPlace):
        # Ray's own check waits for process 1 as the parent, which it never is under systemd's user sessions and the like.
        end_with_parent()
        os.environ.update(place.environment)
        _keep_what_is_compiled()
        prepare_console(logging.INFO if place.rank == 0 else logging.WARNING)
        if os.path.isdir(place.folder):
            os.chdir(place.folder)
        for file in place.user_files:
            import_file(file)
        self.place, self.dump_file = place, _heed_dump_signal()
        self.importing = threading.Thread(target=_import_all, args=(place.imports,), daemon=True, name="imports")
        self.importing.start()
        self.workers: dict[str, Worker] = {}
        self.listening: socket.socket | None = None
        self.has_process_group = False

    def __repr__(self) -> str:
        """What Ray puts before each line that this process writes, in place of the name of the class."""
        return f"{self.place.pool} rank {self.place.rank}"

    def set_environment(self, variables: Mapping[str, str]) -> None:
        """What is known only when all ranks have places. Libraries read it when they connect, also those imported by then."""
        os.environ.update(variables)

    def rendezvous_address(self) -> str:
        """`host:port` of this rank, for the ranks of the pool to meet at. The port is this rank's from here on; where all ranks
        are on one machine it is open to that machine alone."""
        self.listening = socket.create_server((own_host(), 0))
        return f"{own_host()}:{self.listening.getsockname()[1]}"

    def node(self) -> str:
        """Name and address of the machine."""
        return f"{socket.gethostname()} {ray.util.get_node_ip_address()}"

    def identity(self) -> RankIdentity:
        """Which process this is, and how its stack is read while it is busy."""
        return RankIdentity(self.node(), ray.get_runtime_context().get_node_id(), os.getpid(), self.dump_file)

    def connect(self, rendezvous_address: str, timeout_s: float) -> None:
        """Join torch.distributed's group of the pool; returns when all ranks have. Collectives may take `timeout_s`."""
        try:
            self._connect(rendezvous_address, timeout_s)
        except BaseException as error:
            raise self._named(f"pool '{self.place.pool}'", "connect", error) from None

    def _connect(self, rendezvous_address: str, timeout_s: float) -> None:
        self.importing.join()  # two threads that import the same packages in another order would see them half done
        import torch

        from hybridflow.parallel.mesh import init_process_group, rendezvous_store

        if self.place.device_type == "cpu":
            # Ray sets OMP_NUM_THREADS in every worker, so only what the run was started with counts.
            num_threads = max(1, (os.cpu_count() or 1) // self.place.ranks_per_node)
            torch.set_num_threads(int(self.place.environment.get("OMP_NUM_THREADS", num_threads)))
        os.environ["LOCAL_RANK"] = str(self.place.rank % self.place.ranks_per_node)
        init_process_group(
            rank=self.place.rank,
            world_size=self.place.num_ranks,
            rendezvous=rendezvous_store(rendezvous_address, listening=self.listening, timeout_s=timeout_s),
            device=torch.device(self.place.device_type),
            timeout_s=timeout_s,
        )
        self.has_process_group = True

    def hardware_info(self, config: Config, roles: frozenset[str]) -> HardwareInfo:
        """What the plan needs to know: this rank's GPU, and the sizes of the models of `roles`, none of which is loaded."""
        from hybridflow.workers.hardware import hardware_info

        self.importing.join()
        try:
            return hardware_info(config, roles)
        except BaseException as error:
            raise self._named(" and ".join(sorted(roles)), "hardware_info", error) from None

    def create(self, role: str, class_name: str, config: Config, layout: Layout) -> None:
        """Build this rank's worker of a role."""
        self.importing.join()
        import torch
        import torch.distributed as dist

        worker_class = registry.load(class_name, registry.ROLES, key=f"placement.workers.{role}")
        assert isinstance(worker_class, type) and issubclass(worker_class, Worker), f"{class_name} is not a Worker"
        context = RankContext(
            role=role,
            rank=self.place.rank,
            layout=layout,
            device=torch.device(self.place.device_type, 0) if self.place.device_type == "cuda" else torch.device("cpu"),
            group=dist.group.WORLD if self.has_process_group else None,
            peers=self.workers,
        )
        torch.manual_seed(config.run.seed)  # torch's own start value differs from process to process
        try:
            self.workers[role] = worker_class(config, context)
        except BaseException as error:
            raise self._named(role, "__init__", error) from None

    def call(self, invocation: Invocation) -> tuple[RankAnswer, dict[str, ShardColumn]]:
        """Run a marked method of a role; the second value goes to the object store."""
        role, method, args, kwargs = invocation
        began, started = time.time(), time.perf_counter()
        worker = self.workers[role]
        marked = _marked_method(type(worker), method)
        worker.context.take_reported()  # outside of calls, as where a sync probes the actor, nobody asked for it
        try:
            result = checked(marked.function(worker, *args, **kwargs), type(worker), method)
            answer, shard = _answer(result, time.perf_counter() - started, self._memory())
        except BaseException as error:  # also SystemExit, which would end the process without a word
            raise self._named(role, method, error) from None
        reported = worker.context.take_reported()
        return replace(answer, began=began, reported=reported), shard

    def _memory(self) -> Memory | None:
        if self.place.device_type != "cuda":
            return None
        import torch

        return Memory(torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30)

    def _named(self, role: str, method: str, error: BaseException) -> WorkerError:
        cause = str(error) if isinstance(error, HybridflowError) else "".join(traceback.format_exception(error)[1:])
        named = f"{type(error).__name__}: {cause}" if isinstance(error, HybridflowError) else cause
        told = WorkerError(role=role, rank=self.place.rank, node=self.node(), method=method, cause=named)
        told.since_step = error.since_step if isinstance(error, HybridflowError) else None
        return told


def _keep_what_is_compiled() -> None:
    """Have torch.compile keep its kernels in the user's cache folder, by version of torch: its own choice is the folder of
    temporary files. Which GPU and which code they are for it knows itself; vLLM's are in the same folder by vLLM's choice."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hybridflow", f"torch-{version('torch')}")
    with suppress(OSError):  # as of a home that cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _import_all(modules: Sequence[str]) -> None:
    """Import them; what cannot be imported is told by whoever needs it."""
    for module in modules:
        with suppress(Exception):
            importlib.import_module(module)


def prepare_console(level: int) -> None:
    """Write this package's log to stderr, which Ray takes to the console. Lines begin with the time, as the command's do."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log = logging.getLogger("hybridflow")
    log.setLevel(level)
    log.handlers = [handler]
    log.propagate = False  # libraries that a role imports may have given the root logger a handler
    warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled", category=UserWarning)  # torch's compiler


def _heed_dump_signal() -> str | None:
    """Have all stacks written to a file in memory at `DUMP_SIGNAL`, from C, whatever Python is busy with; returns its name."""
    if not hasattr(os, "memfd_create"):
        return None
    file = os.fdopen(os.memfd_create("hybridflow-stacks"), "w")
    faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True)
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _marked_method(worker_class: type[Worker], name: str) -> RemoteMethod[Worker, ..., object]:
    for base in worker_class.__mro__:
        if name in vars(base):
            marked = vars(base)[name]
            assert isinstance(marked, RemoteMethod), f"{worker_class.__name__}.{name} is not marked @remote"
            return marked
    raise AssertionError(f"{worker_class.__name__} has no method {name}")


def _answer(result: object, seconds: float, memory: Memory | None) -> tuple[RankAnswer, dict[str, ShardColumn]]:
    if not isinstance(result, Batch):
        return RankAnswer(result, seconds=seconds, num_bytes=_pickled_size(result), memory=memory), {}
    shard: dict[str, ShardColumn] = {}
    for source in result.sources:
        whole = [shard for shard in source.shards if isinstance(shard, LocalShard)]
        assert len(whole) == len(source.shards), "a worker returns new columns, not those it was given"
        shard |= {name: source.read(name) for name in source.names}
    numbers = Batch(result.per_row)
    answer = RankAnswer(
        numbers,
        shard_names=tuple(shard),
        num_rows=len(result),
        seconds=seconds,
        num_bytes=_pickled_size(numbers),
        memory=memory,
    )
    return answer, shard


def _pickled_size(value: object) -> int:
    return 0 if value is None else len(pickle.dumps(value))
