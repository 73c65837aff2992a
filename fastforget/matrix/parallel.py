"""Tensor parallelism: the processes that torchrun has started hold a part of every model each, and go through a run in step.

All compute the same scores. The first process writes; the others read what it has written, and do nothing else with the folder.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from fastforget.matrix.checkpoints import Checkpoint, load_config, tensor_shapes
from fastforget.matrix.folders import Folder, Result
from fastforget.matrix.models import ResidentModel, from_pretrained
from fastforget.matrix.scoring import free_memory
from fastforget.matrix.shares import Share

Value = TypeVar("Value")
STARTED, MISSING, EXISTS, FAILED = range(4)  # how the first process's turn ended


def begin(device: str | torch.device | None) -> str:
    """Join the processes that torchrun has started, on the GPU that is this one's.

    Args:
        device: `cpu`, `cuda`, or None for the GPU if there is one.

    Returns:
        The device.

    Raises:
        ValueError: if torchrun has not started this process.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        raise ValueError(
            "tensor_parallel: expected a process of torchrun, got none of its variables; start it with torchrun "
            "--nproc-per-node N --no-python fastforget matrix ..."
        )
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if on == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on == "cuda" else "gloo")
    return on


class FolderInStep(Folder):
    """A folder that the first process uses, and the others after it.

    Args:
        folder: the same for all processes, on a file system or an object store that all of them see.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self.first = dist.get_rank() == 0
        self.group: Any = dist.new_group(backend="gloo")

    def __str__(self) -> str:
        return str(self.folder)

    def _read(self, call: Callable[[], Value]) -> Value:
        result = self._turn(call)
        result = result if self.first else call()
        dist.barrier(self.group)  # nothing is written before all have read
        return result  # type: ignore[return-value]

    def _turn(self, call: Callable[[], Value]) -> Value | None:
        """The first process's turn; an error of it is one of all."""
        result, error, ended = None, None, STARTED
        if self.first:
            try:
                result = call()
            except Exception as raised:
                kinds = {FileNotFoundError: MISSING, FileExistsError: EXISTS}
                error, ended = raised, kinds.get(type(raised), FAILED)
        flag = torch.tensor(ended)
        dist.broadcast(flag, 0, group=self.group)
        if error is not None:
            raise error
        if int(flag) == FAILED:
            raise SystemExit(2)  # the first process says why
        if int(flag) != STARTED:
            raise {MISSING: FileNotFoundError, EXISTS: FileExistsError}[int(flag)](str(self))
        return result

    @override
    def exists(self, name: str) -> bool:
        return self._read(lambda: self.folder.exists(name))

    @override
    def names(self, below: str = "") -> list[str]:
        return self._read(lambda: self.folder.names(below))

    @override
    def read(self, name: str) -> bytes:
        return self._read(lambda: self.folder.read(name))

    @override
    def read_table(self, name: str) -> pa.Table:
        return self._read(lambda: self.folder.read_table(name))

    @override
    def map(self, read: Callable[[str], Result], names: list[str]) -> list[Result]:
        return [read(name) for name in names]  # one after the other: they are in step

    @override
    def lines(self, name: str) -> list[str]:
        return self._read(lambda: self.folder.lines(name))

    @override
    def check_writable(self) -> bool:
        return self._read(self.folder.check_writable)

    @override
    def write(self, name: str, content: bytes) -> None:
        self._turn(lambda: self.folder.write(name, content))

    @override
    def create(self, name: str, content: bytes) -> None:
        self._turn(lambda: self.folder.create(name, content))

    @override
    def delete(self, name: str) -> None:
        self._turn(lambda: self.folder.delete(name))

    @override
    def write_table(self, name: str, table: pa.Table) -> None:
        self._turn(lambda: self.folder.write_table(name, table))

    @override
    def append(self, name: str, line: str) -> None:
        self._turn(lambda: self.folder.append(name, line))

    @override
    def clear(self, names: set[str] | None) -> None:
        self._turn(lambda: self.folder.clear(names))

    @override
    @contextlib.contextmanager
    def claimed(self, share: Share, *, create: bool = True) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            yield self._turn(lambda: stack.enter_context(self.folder.claimed(share, create=create)))


class ParallelModel(ResidentModel):
    """Models of which every process holds a part, each loaded by itself.

    Args:
        base: the base's checkpoint.
        device: of this process.
        dtype: the parameters' dtype.
    """

    def __init__(self, base: Checkpoint, device: str, dtype: torch.dtype):
        self.base, self.device, self.dtype = base, device, dtype
        self.config = load_config(base)
        tensor_shapes(base)
        self._holds = ""
        self._take(base)
        if not any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            raise ValueError(
                f"tensor_parallel: expected a model with a parallel plan in transformers, got {type(self.model).__name__} "
                'without one; use device="auto"'
            )

    @override
    def environment(self) -> dict[str, str]:
        """How many processes hold a model."""
        return {"tensor_parallel": f"{dist.get_world_size()} processes"}

    @override
    def check(self, task: Checkpoint, *, check_adapter_base: bool = True) -> None:
        """Refuse a task that is not of the base's form, and adapters.

        Args:
            task: the checkpoint.
            check_adapter_base: of no consequence.

        Raises:
            ValueError: if it does not fit.
        """
        if task.kind == "adapter":
            raise ValueError(
                f"{task.label}: expected a full checkpoint with tensor_parallel, got an adapter; merge it into the base "
                "with PEFT's merge_and_unload"
            )
        super().check(task)

    @override
    @contextlib.contextmanager
    def holding(self, task: Checkpoint) -> Iterator[nn.Module]:
        """The model of a task, for as long as the context lasts.

        Args:
            task: the base or a checkpoint.

        Yields:
            The model, in eval mode.
        """
        self._take(task)
        yield self.model

    def _take(self, checkpoint: Checkpoint) -> None:
        if self._holds == checkpoint.path:
            return
        self.model = nn.Module()  # the one before is freed first
        free_memory()
        self.model = from_pretrained(checkpoint, self.dtype, **_by_plan()).eval()
        self._holds = checkpoint.path


def _by_plan() -> dict[str, Any]:
    """The argument by which transformers divides a model; older versions take the plan itself."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):
        return {"tp_plan": "auto"}
