"""Two devices on a machine that has none: CPU tensors that say where they lie and refuse to meet those of another place.

Inside `devices()` the devices other:0 and other:1 hold tensors, by a wrapper around CPU ones; an operation on tensors of
two devices raises what torch raises. As on a GPU, index tensors and scalars may come from the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
CPU = torch.device("cpu")


class Elsewhere(Tensor):
    """`held`, as if on another device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Elsewhere:
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{self.device}: {self.held}"

    def data_ptr(self) -> int:
        """By which accelerate tells tied weights."""
        return self.held.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    moves = func._schema.name in ("aten::to", "aten::_to_copy", "aten::copy_") or not tensors
    asked = [torch.device(value) for value in flat if isinstance(value, torch.device)]
    places = {t.device for t in tensors if t.ndim > 0}
    if func in INDEXED:
        places = {t.device for t in tensors if t.device != CPU} or {CPU}
    if len(places) > 1 and not moves:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {sorted(map(str, places))}")
    if asked and not moves and not func._schema.name.startswith("aten::new_"):
        moves = "device" in kwargs
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    into = kwargs.get("out", args[0] if func._schema.is_mutable and args else None)
    if isinstance(into, Tensor):
        return into
    scalars = {t.device for t in tensors}
    place = asked[0] if asked else next(iter(places or scalars or {CPU}))
    if func._schema.name == "aten::to" and func._overloadname == "other":
        place = args[1].device
    elif moves and not asked and tensors:
        place = args[0].device
    return tree_map(lambda value: Elsewhere(value, place) if _plain(value) and place != CPU else value, result)


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, Elsewhere)


def _inner(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.held
    return CPU if isinstance(value, torch.device) else value


class _Module:
    """What torch asks a backend's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 2

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...


class _Lists(TorchFunctionMode):
    """What goes from lists to tensors and back without asking a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist:
            args = (args[0].cpu(),)
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


@contextmanager
def two_devices() -> Iterator[None]:
    """A context in which tensors may be made on other:0 and other:1. For the rest of the process there is that backend."""
    backend_registration._setup_privateuseone_for_python_backend("other", backend_module=_Module())
    with _Devices(), _Lists():
        yield


def scatter(model: nn.Module, places: dict[str, str]) -> None:
    """Moves the modules of a model (by name) to devices, with accelerate's own hooks between them."""
    from accelerate import dispatch_model

    # Tied weights stay one; the old ones are kept, as their numbers name them.
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, place in places.items():
        for module in model.get_submodule(name).modules():
            for key, value in [*module._parameters.items()]:
                if value is not None and not isinstance(value, Elsewhere):
                    if id(value) not in moved:
                        moved[id(value)] = value, nn.Parameter(Elsewhere(value.data, torch.device(place)), False)
                    module._parameters[key] = moved[id(value)][1]
            for key, buffer in [*module._buffers.items()]:
                if buffer is not None and not isinstance(buffer, Elsewhere):
                    module._buffers[key] = Elsewhere(buffer, torch.device(place))
    dispatch_model(model, places, skip_keys=getattr(model, "_skip_keys_device_placement", None))
