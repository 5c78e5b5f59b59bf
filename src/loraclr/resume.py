"""Passes through a denoiser that go on where they stopped: what a finished part of it gave before, it gives again.

A part is finished for a visit when every layer that visits change lies behind it, or was changed by an earlier one. Of a pass its outputs
are kept, as long as there is room; a part that contains others takes their place. Nothing that is computed depends on it but the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MOST = 1 << 28  # bytes that are kept of all passes together
SHARE = 0.25  # of the memory that is free when it begins, if that is less
Call = tuple[str, int]  # a part, and which of its calls in the pass


@dataclass(eq=False)
class Room:
    """Bytes that outputs may still take, of all passes together."""

    left: int = field(default_factory=lambda: min(MOST, int(SHARE * _free())))


@dataclass(eq=False)
class Outputs:
    """Of one pass."""

    room: Room
    given: dict[Call, tuple[Any, torch.device]] = field(default_factory=dict)

    def keep(self, call: Call, output: Any) -> None:
        """In place of what the part's own parts gave; nothing where there is no room, or something else than tensors."""
        within = [known for known in self.given if known[0].startswith(f"{call[0]}.")]
        back = sum(_size(self.given[known][0]) for known in within)
        if not (tensors := _tensors(output)) or (size := _size(output)) > self.room.left + back:
            return
        for known in within:
            del self.given[known]
        self.given[call] = _copied(output, torch.device("cpu")), tensors[0].device
        self.room.left += back - size

    def again(self, call: Call) -> Any:
        """The output as it was, for others to change; None where it is not kept."""
        return _copied(*self.given[call]) if call in self.given else None

    def clear(self) -> None:
        self.room.left += sum(_size(output) for output, _ in self.given.values())
        self.given.clear()


class Parts:
    """Everything around some layers of a denoiser, down to the attentions and feed-forwards of its blocks, by path."""

    def __init__(self, denoiser: nn.Module, layers: Sequence[nn.Module]) -> None:
        """`layers` are what visits change, in the order in which the denoiser runs them."""
        order = {layer: place for place, layer in enumerate(layers)}
        self.modules: dict[str, nn.Module] = {}
        self.last: dict[str, int] = {}  # of the layers within a part; -1: none
        self._take("", denoiser, order)

    def _take(self, path: str, module: nn.Module, order: Mapping[nn.Module, int]) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        for name, child in module.named_children():
            inside, listed = list(child.modules()), isinstance(child, nn.ModuleList)
            last = max((order[one] for one in inside if one in order), default=-1)
            if isinstance(child, nn.Linear | nn.Conv2d) or not any(isinstance(one, nn.Linear | nn.Conv2d) for one in inside):
                continue  # to which changes are added from outside, and what takes no time
            if not listed:
                self.modules[f"{path}{name}"], self.last[f"{path}{name}"] = child, last
            if listed or (last >= 0 and not isinstance(module, BasicTransformerBlock)):
                self._take(f"{path}{name}.", child, order)

    @contextmanager
    def resuming(self, visit: int) -> Iterator[Callable[[Outputs], None]]:
        """Inside, parts that are finished for the visit run once in each pass; to be told of a pass's outputs before it begins."""
        now: list[Outputs] = []
        calls: dict[str, int] = {}

        def begin(outputs: Outputs) -> None:
            now[:] = [outputs]
            calls.clear()

        def wrapped(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*inputs: Any, **named: Any) -> Any:
                calls[path] = calls.get(path, -1) + 1
                call, outputs = (path, calls[path]), now[0]
                if (output := outputs.again(call)) is None:
                    output = forward(*inputs, **named)
                    outputs.keep(call, output)
                return output

            return run

        with ExitStack() as stack:
            for path in (path for path, last in self.last.items() if last < visit):
                stack.enter_context(_instead(self.modules[path], wrapped(path, self.modules[path].forward)))
            yield begin


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of the module's own, or of what else stands there (offloading)."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _free() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _tensors(output: Any) -> list[Tensor]:
    """All of a tensor, or of nested tuples and lists of nothing else; none of what has something else in it."""
    if isinstance(output, Tensor):
        return [output]
    found = [_tensors(one) for one in output] if type(output) in (tuple, list) else []
    return [tensor for one in found for tensor in one] if all(found) else []


def _size(output: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(output))


def _copied(output: Any, device: torch.device) -> Any:
    if isinstance(output, tuple | list):
        return type(output)(_copied(one, device) for one in output)
    return output.clone() if output.device == device else output.to(device)
