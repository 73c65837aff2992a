"""Running a script in two gloo processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

PROLOGUE = """
import os
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastforget as ff
from architectures.families import build

dist.init_process_group("gloo")
torch.set_num_threads(1)


def sharded(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)
"""
EPILOGUE = """
print("ok", dist.get_rank(), flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may abort an interpreter that is being taken down, which is not what is tested
"""


def run_in_two_processes(script: str, folder: Path) -> None:
    """Run the script in two processes of one gloo group, after the prologue; either's failure is shown."""
    path = folder / "worker.py"
    path.write_text(PROLOGUE + script + EPILOGUE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = str(Path(__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(path)],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    ends = zip(processes, results, strict=True)
    errors = "\n".join(f"exit {process.returncode}\n{error}" for process, (_, error) in ends if process.returncode)
    assert not errors, errors
    assert all("ok" in out for out, _ in results)
