"""`log_perplexity` of a model under DistributedDataParallel and FSDP2, in two gloo processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, sys.argv[1])
from families import build
import fastforget as ff

dist.init_process_group("gloo")
torch.set_num_threads(1)
ids = torch.randint(3, 131, (4, 9), generator=torch.Generator().manual_seed(0))[dist.get_rank() * 2 :][:2]
for family in ("Llama", "Llama, tied", "Gemma 2"):
    expected = ff.log_perplexity(build(family), ids)
    wrapped = DistributedDataParallel(build(family))
    assert torch.equal(ff.log_perplexity(wrapped, ids), expected), "DDP"
    sharded = build(family)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    for _ in range(2):
        got = ff.log_perplexity(sharded, ids)
        assert torch.allclose(got, expected, atol=1e-6), "FSDP2"
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in sharded.parameters()), "FSDP2 gradients"
    mine = build(family)
    ff.log_perplexity(mine, ids).sum().backward()
    for (name, parameter), shard in zip(mine.named_parameters(), sharded.parameters()):
        dist.all_reduce(parameter.grad)
        assert torch.allclose(shard.grad.full_tensor(), parameter.grad / 2, atol=1e-5), name
print("ok", dist.get_rank(), flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may abort an interpreter that is being taken down, which is not what is tested
"""


def test_two_processes(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    families = Path(__file__).parents[1] / "architectures"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(families)],
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            | {"PYTHONPATH": os.pathsep.join(sys.path)},
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
    for process, (out, error) in zip(processes, results, strict=True):
        assert process.returncode == 0, error
        assert "ok" in out
