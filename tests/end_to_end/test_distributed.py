"""`log_perplexity` of a model under DistributedDataParallel and FSDP2, in two gloo processes."""

from __future__ import annotations

from pathlib import Path

from end_to_end.two_processes import run_in_two_processes

WORKER = """
ids = torch.randint(3, 131, (4, 9), generator=torch.Generator().manual_seed(0))[dist.get_rank() * 2 :][:2]
for family in ("Llama", "Llama, tied", "Gemma 2"):
    expected = ff.log_perplexity(build(family), ids)
    wrapped = DistributedDataParallel(build(family))
    assert torch.equal(ff.log_perplexity(wrapped, ids), expected), "DDP"
    model = sharded(build(family))
    for _ in range(2):
        got = ff.log_perplexity(model, ids)
        assert torch.allclose(got, expected, atol=1e-6), "FSDP2"
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "FSDP2 gradients"
    mine = build(family)
    ff.log_perplexity(mine, ids).sum().backward()
    for (name, parameter), shard in zip(mine.named_parameters(), model.parameters()):
        dist.all_reduce(parameter.grad)
        assert torch.allclose(shard.grad.full_tensor(), parameter.grad / 2, atol=1e-5), name
"""


def test_two_processes(tmp_path: Path):
    run_in_two_processes(WORKER, tmp_path)
