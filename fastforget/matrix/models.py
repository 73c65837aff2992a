"""The resident base model, and the tasks' checkpoints and adapters that are loaded into it one after the other."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastforget import perplexity
from fastforget.matrix.checkpoints import (
    Checkpoint,
    config_difference,
    find_checkpoint,
    load_config,
    tensor_shapes,
    weight_files,
)

COMPILER = "inductor"
GRAPHS = 64  # buckets times forms of adapters; beyond it models run uncompiled
PROVENANCE = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}  # of an adapter's configuration
BASE_FIX = "pass check_adapter_base=False (--no-check-adapter-base) if it is the same model under another name"


class ResidentModel:
    """One model on the device that becomes each task's model in turn, in place.

    Args:
        base: the base's checkpoint.
        device: where it stays.
        dtype: its parameters' dtype.
        compile: compile its body for the shapes of `plan.Buckets`.
        spread: over all devices of `device`'s type, layer by layer.
    """

    def __init__(
        self, base: Checkpoint, device: str, dtype: torch.dtype, *, compile: bool = False, spread: bool = False
    ):
        self.base = base
        self.config = load_config(base)
        self.device, self.dtype = device, dtype
        tensor_shapes(base)  # says which file is damaged, where transformers may not
        try:
            options = {"device_map": "auto" if torch.device(device).type == "cuda" else {"": device}} if spread else {}
            loaded = from_pretrained(base, dtype, **options)
            self.model: nn.Module = (loaded if spread else loaded.to(device)).eval()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"base: expected a model that fits on {device}, got {base.path} in {dtype}: "
                f"{str(error).splitlines()[0]}; choose a narrower dtype or another device"
            ) from error
        elsewhere = {str(p.device) for p in self.model.parameters()} & {"meta", *(["cpu"] if "cuda" in device else [])}
        if elsewhere:
            raise ValueError(
                f"base: expected a model that fits on the devices of this machine, got {base.path} in {dtype}, of which a part "
                "was put off to the CPU or the disk; choose a narrower dtype, or tensor_parallel over more machines"
            )
        self._compile = compile
        if compile:
            self.model.requires_grad_(False)  # as PEFT leaves it: graphs hold for one setting
            self.model.base_model.compile(dynamic=False, backend=COMPILER)  # type: ignore[operator]
        self._modules = [(m, dict(m._modules)) for m in self.model.modules()]
        self._holds_base = True
        self._slot: tuple[Any, nn.Module] | None = None  # an adapter that stays on for one of the same form

    # Before the run

    def environment(self) -> dict[str, str]:
        """What a manifest says of how models are held, where that moves values by rounding."""
        return {}

    def check(self, task: Checkpoint, *, check_adapter_base: bool = True) -> None:
        """Refuse a task that cannot be loaded into the base, from the headers of its files.

        Args:
            task: the checkpoint or adapter.
            check_adapter_base: whether an adapter has to name this base.

        Raises:
            ValueError: if it does not fit; the message names the tensor or the entry.
        """
        if task.kind == "adapter":
            config = _adapter_config(task)
            if check_adapter_base:
                self._check_adapter_base(task, config)
            self._check_adapter_shapes(task)
            return
        state = self.model.state_dict()
        for name, shape in tensor_shapes(task).items():
            if name in state and shape != tuple(state[name].shape):
                raise ValueError(
                    f"{task.label}: expected {name} of shape {tuple(state[name].shape)} as in the base, got {shape}; "
                    "evaluate it against the base that it was tuned from"
                )
        difference = config_difference(self.config, load_config(task))
        if difference:
            raise ValueError(
                f"{task.label}: {difference}; evaluate it against a base with the same architecture and settings"
            )

    def _check_adapter_base(self, task: Checkpoint, config: Any) -> None:
        named = config.base_model_name_or_path
        if not named:
            return
        folder = Path(named).expanduser()
        if (folder / "config.json").is_file():
            same = folder.resolve() == self.base.folder.resolve()
            same = same or find_checkpoint("", named, is_base=True).fingerprint == self.base.fingerprint
        else:
            names = {self.base.path, str(self.base.folder.resolve()), getattr(self.config, "_name_or_path", "") or ""}
            same = folder.name in {Path(name).name for name in names}
        if not same:
            raise ValueError(f"{task.label}: expected an adapter for {self.base.path}, got one for {named}; {BASE_FIX}")

    def _check_adapter_shapes(self, task: Checkpoint) -> None:
        modules, state = dict(self.model.named_modules()), self.model.state_dict()
        for name, shape in tensor_shapes(task).items():
            module, lora, rest = name.removeprefix("base_model.model.").partition(".lora_")
            if not lora:  # a whole tensor, or another kind of adapter, which PEFT checks when it loads
                if module in state and shape != tuple(state[module].shape):
                    raise ValueError(
                        f"{task.label}: expected {module} of shape {tuple(state[module].shape)} as in the base, got "
                        f"{shape}; evaluate the adapter against the base that it was tuned from"
                    )
                continue
            module = module.replace(".base_layer", "")  # one adapter around another, as on the experts of a layer
            weight = getattr(modules.get(module), "weight", None)
            # A is [r, in] and B is [out, r]; Conv1D and embeddings store their weight the other way round.
            size = {"A": shape[-1], "B": shape[0]}.get(rest[0]) if len(shape) == 2 else None
            misfit = size is not None and weight is not None and size not in weight.shape
            if module not in modules or misfit:
                got = f"a weight of shape {tuple(weight.shape)}" if weight is not None else "no such module"
                raise ValueError(
                    f"{task.label}: expected a base with a module for {name} of shape {shape}, got {got}; "
                    "evaluate the adapter against the base that it was tuned from"
                )

    # During the run

    @contextlib.contextmanager
    def holding(self, task: Checkpoint) -> Iterator[nn.Module]:
        """The model of a task, for as long as the context lasts.

        Args:
            task: the base, a checkpoint or an adapter.

        Yields:
            The model, in eval mode.

        Raises:
            ValueError: if the task cannot be loaded.
        """
        with self._held(task) as model:
            if not self._compile:
                yield model
                return
            with eager(model):  # a check that comes once, of shapes that do not come again
                perplexity.score_examples(model, torch.zeros(1, 8, dtype=torch.int64, device=self.device))
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                yield model

    @contextlib.contextmanager
    def _held(self, task: Checkpoint) -> Iterator[nn.Module]:
        form = _form(task) if task.kind == "adapter" else None
        if self._slot is not None and form == self._slot[0]:
            self._swap(self._slot[1], task)
            yield self._slot[1]
            return
        self._without_adapter()
        if task.kind == "full":
            self._holds_base = False
            self._load(task)
            yield self.model
            return
        if not self._holds_base:
            self._load(self.base)
            self._holds_base = True
        if task.kind == "base":
            yield self.model
            return
        try:
            model = self._with_adapter(task)
            yield model
            self._slot = None if form is None else (form, model)
        finally:
            if self._slot is None:
                self._without_adapter()
            self._holds_base = form is not None

    def _swap(self, model: nn.Module, task: Checkpoint) -> None:
        # The last step of PEFT's own loading; building the modules takes most of the time.
        from peft import set_peft_model_state_dict
        from peft.utils.save_and_load import load_peft_weights

        try:
            weights = load_peft_weights(str(task.folder), device="cpu")
            set_peft_model_state_dict(model, weights)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            self._without_adapter()
            raise _cannot_load(task, error) from error

    def _with_adapter(self, task: Checkpoint) -> nn.Module:
        from peft import PeftModel, get_peft_model_state_dict

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model = PeftModel.from_pretrained(self.model, str(task.folder))  # type: ignore[arg-type]
            except (RuntimeError, ValueError, KeyError, OSError) as error:
                raise _cannot_load(task, error) from error
            loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
        missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
        unexpected = [name for name in tensor_shapes(task) if ".lora_" in name and name not in loaded]
        if missing or unexpected:
            raise ValueError(
                f"{task.label}: expected the adapter's tensors to be those of its adapter_config.json, got "
                f"{missing[0] if missing else 'no place for ' + unexpected[0]}; save the adapter again"
            )
        for warning in caught:
            if not issubclass(warning.category, DeprecationWarning | FutureWarning):
                warnings.warn(f"{task.label}: {warning.message}", warning.category, stacklevel=2)
        return model.eval()

    def _without_adapter(self) -> None:
        """Put the base's own modules back; PEFT's unload leaves tuned copies of whole modules in."""
        self._slot = None
        for module, children in self._modules:
            module._modules.clear()
            module._modules.update(children)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(self.model):
                delattr(self.model, name)

    @torch.no_grad()
    def _load(self, checkpoint: Checkpoint) -> None:
        # One tensor at a time where the names are the model's own.
        from safetensors import SafetensorError, safe_open

        state = self.model.state_dict()
        files = weight_files(checkpoint)
        names = set(tensor_shapes(checkpoint))
        places = {_place(state[name]) for name in names & state.keys()}
        # A tied tensor is in the file once; whatever else differs (renamed, merged, absent) is for transformers.
        if (
            files[0].suffix != ".safetensors"
            or not names <= state.keys()
            or any(_place(tensor) not in places for tensor in state.values())
        ):
            self._copy(checkpoint, state, from_pretrained(checkpoint, self.dtype).state_dict())
            return
        written: dict[Any, str] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in sorted(file.keys()):
                        self._copy(checkpoint, {name: state[name]}, {name: file.get_tensor(name)}, written)
            except (OSError, SafetensorError) as error:  # it was readable when the run began
                raise ValueError(
                    f"{checkpoint.label}: cannot read {path}: {error}; copy the checkpoint again"
                ) from error

    def _copy(
        self,
        checkpoint: Checkpoint,
        state: dict[str, torch.Tensor],
        tensors: dict[str, torch.Tensor],
        written: dict[Any, str] | None = None,
    ) -> None:
        written = {} if written is None else written
        if state.keys() != tensors.keys():
            odd = sorted(state.keys() ^ tensors.keys())[0]
            raise ValueError(
                f"{checkpoint.label}: expected the base's tensors, got a difference in {odd}; save it again"
            )
        for name, place in state.items():
            tensor = tensors[name].to(place.device, place.dtype)
            first = written.setdefault(_place(place), name)
            same_shape = place.shape == tensor.shape
            if not same_shape or (first != name and not torch.allclose(place, tensor, rtol=0, atol=0, equal_nan=True)):
                reason = f"tied to {first}" if same_shape else f"of shape {tuple(place.shape)}"
                raise ValueError(
                    f"{checkpoint.label}: expected {name} {reason} as in the base, got another; evaluate it against "
                    "the base that it was tuned from"
                )
            place.copy_(tensor)


def eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context in which a compiled model runs as it is.

    Args:
        model: the model, compiled or not.

    Returns:
        The context.
    """
    if all(module._compiled_call_impl is None for module in model.modules()):
        return contextlib.nullcontext()  # the compiler takes seconds to import
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def parameters_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold a model's parameters in a wider dtype for a while; buffers stay. Casting back restores every bit.

    Args:
        model: the model; its floating-point parameters are replaced in place.
        dtype: a dtype that holds every value of the present one.

    Yields:
        Nothing.

    Raises:
        ValueError: if they are divided among processes.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("the parameters are divided among processes, and stay as they are")
    narrow = {p: p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < dtype.itemsize}
    try:
        for parameter in narrow:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, before in narrow.items():
            parameter.data = parameter.data.to(before)


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def from_pretrained(checkpoint: Checkpoint, dtype: torch.dtype, **options: Any) -> Any:
    """A checkpoint's model, all of whose tensors were in its files.

    Args:
        checkpoint: the checkpoint.
        dtype: its parameters' dtype.
        **options: of transformers, such as `device_map`.

    Returns:
        The model.

    Raises:
        ValueError: if it cannot be loaded.
        torch.OutOfMemoryError: if there is no room for it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, output_loading_info=True, **options
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors and remote files have their own
        raise ValueError(
            f"{checkpoint.label}: cannot load {checkpoint.folder}: {error}; copy the checkpoint again"
        ) from error
    finally:
        if had_bar:
            logging.enable_progress_bar()
    model, info = loaded
    bad = [str(name) for key in ("missing_keys", "mismatched_keys", "error_msgs") for name in info[key]]
    if bad:
        raise ValueError(
            f"{checkpoint.label}: expected every tensor of the model in {checkpoint.folder}, got none or "
            f"another shape for {', '.join(bad[:5])}; save the checkpoint again"
        )
    return model


def _adapter_config(task: Checkpoint) -> Any:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError(f"{task.label}: an adapter needs PEFT; pip install 'fastforget[peft]'") from error
    try:
        config = PeftConfig.from_pretrained(str(task.folder))
    except Exception as error:  # whatever the configuration's own code raises
        raise ValueError(f"{task.label}: cannot read adapter_config.json: {error}; save the adapter again") from error
    if config.is_prompt_learning:
        raise ValueError(
            f"{task.label}: expected an adapter of the weights such as LoRA, got {config.peft_type}, which adds "
            "virtual tokens to the input; these have no log-perplexity of their own and are not supported"
        )
    return config


def _cannot_load(task: Checkpoint, error: Exception) -> ValueError:
    return ValueError(f"{task.label}: cannot load the adapter {task.folder}: {error}; save it again")


def _form(task: Checkpoint) -> Any:
    # Adapters of one form differ in their tensors' values alone. None for those that change the base's weights: biases
    # and whole tensors are loaded over the base's own, and PiSSA-like initialisations subtract from them.
    config, shapes = _adapter_config(task), tensor_shapes(task)
    ordinary = str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
    ordinary = ordinary and getattr(config, "init_lora_weights", True) in (True, False, "gaussian")
    if not ordinary or not all(".lora_" in name for name in shapes):
        return None
    return {name: value for name, value in config.to_dict().items() if name not in PROVENANCE}, shapes
