"""The names under which a Fisher stores its tensors, and the mapping that answers to all of a parameter's names."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Fisher", "NamedTensors", "as_fisher", "canonical_name", "matching_names"]

# What torch.compile, FSDP, activation checkpointing and PEFT put into the path of the module that they wrap.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module"}
PEFT_PREFIX = ["base_model", "model"]

Default = TypeVar("Default")


def canonical_name(name: str) -> str:
    """The name that a parameter has in the bare model, without any wrapper around the model or its modules.

    Args:
        name: as `named_parameters` of the wrapped model gives it. DDP's `module.`, `torch.compile`'s `_orig_mod.`,
            FSDP's and activation checkpointing's wrappers, and PEFT's `base_model.model.`, `.base_layer`,
            `.modules_to_save.<adapter>` and `.original_module` are dropped; an adapter's own tensors keep theirs.

    Returns:
        The canonical name; a canonical name comes back as it is.
    """
    split = name.split(".")
    # Of two adapters on one module's parameters the inner one lies under `base_layer`: there it tells them apart.
    parts = [
        p for p, after in zip(split, [*split[1:], ""], strict=True) if p not in WRAPPERS or after.startswith("lora_")
    ]
    while "modules_to_save" in parts[:-1]:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]  # with the adapter's name
    while True:
        if len(parts) > 2 and parts[:2] == PEFT_PREFIX:
            parts = parts[2:]
        elif len(parts) > 1 and parts[0] == "module":
            parts = parts[1:]
        else:
            return ".".join(parts)


def matching_names(names: Mapping[str, Sequence[str]], patterns: Iterable[str]) -> set[str]:
    """The parameters that patterns match.

    Args:
        names: canonical names, each with the parameter's other names.
        patterns: shell patterns such as `*.mlp.*`.

    Returns:
        Those of which a name matches at least one.

    Raises:
        ValueError: if a pattern matches none; the message says which pattern would match something near.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name, also in names.items() if any(fnmatchcase(n, pattern) for n in (name, *also))}
        if names and not matched:
            raise ValueError(
                f"parameters: expected patterns that match trainable parameters, got none: {pattern!r} matches none of "
                f"{len(names)} names such as {next(iter(names))!r}; did you mean {_pattern_near(pattern, names)}?"
            )
        found |= matched
    return found


def _pattern_near(pattern: str, names: Iterable[str]) -> str:
    """Patterns that match, as near as possible to one that does not."""
    wider = f"*{pattern.strip('*')}*"
    if any(fnmatchcase(name, wider) for name in names):
        return repr(wider)
    of_all_layers = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    return " or ".join(map(repr, difflib.get_close_matches(pattern, of_all_layers, n=2, cutoff=0.0)))


class NamedTensors(dict[str, Tensor]):
    """Tensors by canonical parameter name, and how they came about.

    Args:
        tensors: by name.
        metadata: what a file or an estimator records.

    Attributes:
        metadata: the same.
    """

    metadata: dict[str, Any]

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (),
        metadata: Mapping[str, Any] | None = None,
    ):
        super().__init__(tensors)
        self.metadata = dict(metadata or {})


class Fisher(NamedTensors):
    """A diagonal Fisher: tensors by canonical parameter name, and how they came about.

    A lookup (`fisher[name]`, `in`, `get`) also takes the other names of a tied parameter, such as `lm_head.weight`,
    and names with wrappers in them; iteration gives each tensor once.

    Attributes:
        metadata: what the file or the estimator records: model, convention, examples, tokens, aliases, ...
    """

    def stored_name(self, name: str) -> str | None:
        """The name under which a parameter's tensor is stored.

        Args:
            name: any of the parameter's names.

        Returns:
            The name, or None where the Fisher has no such parameter.
        """
        aliases = self.metadata.get("aliases", {})
        for known in (name, canonical_name(name)):
            known = aliases.get(known, known)
            if super().__contains__(known):
                return known
        return None

    def __missing__(self, name: str) -> Tensor:
        known = self.stored_name(name)
        if known is None:
            raise KeyError(name)
        return super().__getitem__(known)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.stored_name(name) is not None

    def get(self, name: str, default: Default = None) -> Tensor | Default:
        """The tensor of a parameter, by any of its names.

        Args:
            name: the name.
            default: what to give where there is none.

        Returns:
            The tensor or the default.
        """
        known = self.stored_name(name)
        return default if known is None else super().__getitem__(known)

    def __repr__(self) -> str:
        """One line: a dict's would print every tensor."""
        about = [f"{name} {self.metadata[name]}" for name in ("per", "labels", "loss") if name in self.metadata]
        if "examples" in self.metadata:
            about.append(f"{self.metadata['examples']:,} examples")
        parameters = sum(tensor.numel() for tensor in self.values())
        return f"Fisher({', '.join([f'{len(self)} tensors', f'{parameters:,} parameters', *about])})"


def as_fisher(fisher: Any) -> Fisher:
    """A Fisher from whatever stands for one.

    Args:
        fisher: an estimator, a `{name: tensor}`, or the path of a saved file.

    Returns:
        The Fisher; a `Fisher` comes back as it is, the tensors are never copied.

    Raises:
        TypeError: if it is none of these.
        ValueError: if two names of a mapping are the same parameter's, or a file cannot be read.
    """
    if isinstance(fisher, Fisher):
        return fisher
    if isinstance(fisher, str | os.PathLike):
        from fastforget.fisher.files import load_fisher

        return load_fisher(fisher)
    if callable(getattr(fisher, "diagonal", None)) and not isinstance(fisher, Tensor):
        return Fisher(fisher.diagonal(), getattr(fisher, "metadata", None))
    if not isinstance(fisher, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in fisher.items()
    ):
        got = f"{type(fisher).__name__} of other things" if isinstance(fisher, Mapping) else type(fisher).__name__
        raise TypeError(
            f"fisher: expected a DiagonalFisher, a mapping from parameter names to tensors or the path of a saved "
            f"file, got {got}"
        )
    result = Fisher()
    for name, tensor in fisher.items():
        canonical = canonical_name(name)
        if canonical in result:
            raise ValueError(f"fisher: expected one tensor a parameter, got a second for {canonical!r} in {name!r}")
        result[canonical] = tensor
    return result
