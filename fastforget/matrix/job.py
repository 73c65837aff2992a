"""What a run computes: models, examples, settings, and the plan that follows from them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from fastforget.matrix import plan
from fastforget.matrix.checkpoints import Checkpoint
from fastforget.matrix.plan import Unit
from fastforget.matrix.store import FORMAT_VERSION, Store
from fastforget.matrix.upstream import Upstream

if TYPE_CHECKING:
    from fastforget.matrix.forecast import Forecast

KINDS = ("base", "adapter", "full")  # their order: adapters want the base's weights, which checkpoints overwrite


@dataclass
class Job:
    """What a run computes.

    Attributes:
        models: the base, then the tasks in the caller's order.
        examples: the upstream examples.
        device: where models are scored; its type is an input of the run.
        dtype: the parameters' dtype.
        tokens_per_batch: padded tokens that one forward takes.
        noise_examples: how many examples measure the noise floor.
        buckets: the lengths for which models are compiled; None where they are not.
        upstream: the source of the examples, for the manifest.
        forecast: which examples are evaluated where the rest is predicted; None: all are evaluated.
        lengths: tokens of each example, int64 `[N]`.
        shards: the examples of each shard.
        units: every unit, in order.
    """

    models: list[Checkpoint]
    examples: Upstream
    device: str
    dtype: torch.dtype
    tokens_per_batch: int
    noise_examples: int
    buckets: plan.Buckets | None
    upstream: str
    forecast: "Forecast | None" = None
    lengths: np.ndarray = field(init=False)
    shards: list[np.ndarray] = field(init=False)
    units: list[Unit] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = self.examples.lengths
        chosen = np.arange(len(self.lengths)) if self.forecast is None else self.forecast.columns
        self.shards = [chosen[shard] for shard in plan.shards(self.lengths[chosen])]
        order = sorted(range(-1, len(self.models) - 1), key=lambda task: KINDS.index(self.model(task).kind))
        self.units = plan.units(order, len(self.shards))

    def model(self, task: int) -> Checkpoint:
        """The model of a task.

        Args:
            task: its index, -1 for the base.

        Returns:
            Its checkpoint.
        """
        return self.models[task + 1]

    def tokens(self, units: list[Unit]) -> np.ndarray:
        """The tokens of units.

        Args:
            units: some units.

        Returns:
            int64 `[units]`.
        """
        tokens = np.array([self.lengths[shard].sum() for shard in self.shards])
        return tokens[[unit.shard for unit in units]]

    def manifest(self, settings: dict[str, Any], tokenizer: str) -> dict[str, Any]:
        """What the run records of itself.

        Args:
            settings: how the examples were cut.
            tokenizer: the fingerprint of the base's tokenizer.

        Returns:
            The manifest: `inputs` have to be the same to continue the run; the rest is for the reader. `environment`
            is for the process that scores to fill in.

        Raises:
            ValueError: the known matrix of a forecast is of something else.
        """
        examples = self.examples
        models = {model.name: {"kind": model.kind, "weights": model.fingerprint} for model in self.models[1:]}
        inputs = {
            "base": {"weights": self.models[0].fingerprint, "tokenizer": tokenizer},
            "tasks": models,
            "task order": list(models),
            "upstream": {"content": examples.fingerprint, "examples": len(examples.ids)},
            "settings": {
                **settings,
                "device": torch.device(self.device).type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "tokens_per_batch": self.tokens_per_batch,
                "noise_examples": self.noise_examples,
                **({} if self.buckets is None else {"compile": True}),
            },
            "plan": {
                "units": len(self.units),
                "shards": len(self.shards),
                "tokens": int(sum(self.lengths[shard].sum() for shard in self.shards)),
            },
        }
        about: dict[str, Any] = {
            "base": self.models[0].path,
            "upstream": self.upstream,
            "truncated": examples.truncated,
            "skipped": examples.skipped,
        }
        if self.forecast is not None:
            self.forecast.check(inputs)
            inputs["prediction"] = self.forecast.manifest()
            about["known"] = self.forecast.path
        return {"format": FORMAT_VERSION, "inputs": inputs, "environment": {}, "about": about}

    def tables(self) -> dict[str, pa.Table]:
        """The tables that name tasks and examples, by file name; they depend on the inputs alone."""
        examples, models = self.examples, self.models
        more = {} if self.forecast is None else self.forecast.tables()
        return more | {
            "examples.parquet": pa.table(
                {
                    "index": pa.array(range(len(examples.ids)), pa.int32()),
                    "id": pa.array(examples.ids, pa.string()),
                    "tokens": pa.array(self.lengths, pa.int32()),
                    "targets": pa.array(examples.targets, pa.int32()),
                    "text": pa.array(examples.texts, pa.large_string()),
                }
            ),
            "tasks.parquet": pa.table(
                {
                    "index": pa.array(range(-1, len(models) - 1), pa.int32()),
                    **{
                        name: pa.array([getattr(model, name) for model in models], pa.string())
                        for name in ("name", "kind", "path", "fingerprint")
                    },
                }
            ),
        }

    def base_row(self, store: Store) -> np.ndarray | None:
        """The base's log-perplexities as they are recorded.

        Args:
            store: the run's files.

        Returns:
            Nats per token, float64 `[N]`; None while a unit of the base is missing.
        """
        base = [unit.file_name for unit in self.units if unit.task < 0]
        if not store.finished().issuperset(base):
            return None
        table = store.read_units(base)
        recorded = np.full(len(self.lengths), np.nan)
        recorded[table["example"].to_numpy()] = table["nll_sum"].to_numpy() / table["tokens"].to_numpy()
        return recorded


def environment(device: str) -> dict[str, str]:
    """Versions and hardware of the process that scores.

    Args:
        device: its device.

    Returns:
        `torch`, `transformers`, `device`.
    """
    import transformers

    cuda = torch.device(device).type == "cuda"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
    }
