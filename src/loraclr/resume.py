"""Passes through a denoiser that go on where they stopped: what a finished part of it gave before, it gives again.

A part is finished for a visit when every layer that visits change lies behind it, or was changed by an earlier one. Of a pass its outputs
are kept, in memory and then on disk, as long as there is room; a part that contains others takes their place. Nothing that is computed
depends on it but the time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loraclr.errors import WriteError
from loraclr.scratch import Lent, Scratch

MOST = 1 << 28  # bytes that are kept in memory of all passes together
MOST_ON_DISK = 1 << 34
SHARE = 0.25  # of the memory and of the disk that are free when it begins, if that is less
Call = tuple[str, int]  # a part, and which of its calls in the pass


class Room:
    """Bytes that outputs may still take, of all passes together: in memory, and on disk, in `scratch`."""

    def __init__(self, left: int | None = None, scratch: Scratch | None = None, on_disk: int | None = None) -> None:
        self.scratch = scratch
        self.left = min(MOST, int(SHARE * _free())) if left is None else left
        if on_disk is None:
            on_disk = 0 if scratch is None else min(MOST_ON_DISK, int(SHARE * _free_on_disk(scratch)))
        self.on_disk, self.full = on_disk, False

    def on_which(self, output: Any, back: int, back_on_disk: int) -> bool | None:
        """False: in memory, True: on disk it has room once so many bytes have come back; None: there is none for it.

        To disk goes only what is computed beside it: a GPU computes anew in the time that it takes to be read.
        """
        tensors, size = _tensors(output), _size(output)
        if tensors and size <= self.left + back:
            return False
        # what is not contiguous would be when it comes back, and sums over it might differ in their last bit
        fit = bool(tensors) and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
        return True if fit and not self.full and size <= self.on_disk + back_on_disk else None

    def keep(self, output: Any, on_disk: bool) -> Kept | None:
        """None where the disk turns out to be full, which takes nothing from then on."""
        size, device = _size(output), _tensors(output)[0].device
        if not on_disk:
            self.left -= size
            return Kept(self, _mapped(_copied_to(torch.device("cpu")), output), device, size)
        assert self.scratch is not None
        lent: list[Lent] = []
        try:
            for tensor in _tensors(output):
                lent.append(self.scratch.lend(tensor))
        except WriteError:
            self.full = True
            for place in lent:
                place.give_back()
            return None
        self.on_disk -= size
        places = iter(lent)
        return Kept(self, _mapped(lambda _: next(places), output), device, size, on_disk)


@dataclass(frozen=True, eq=False)
class Kept:
    """A part's output: tensors, or places on disk, as it was nested."""

    room: Room
    output: Any
    device: torch.device
    size: int
    on_disk: bool = False

    def again(self) -> Any:
        """As it was, for others to change."""
        if self.on_disk:
            return _mapped(Lent.read, self.output)
        return _mapped(_copied_to(self.device), self.output)

    def clear(self) -> None:
        if self.on_disk:
            _mapped(Lent.give_back, self.output)
            self.room.on_disk += self.size
        else:
            self.room.left += self.size


@dataclass(eq=False)
class Outputs:
    """Of one pass."""

    room: Room
    given: dict[Call, Kept] = field(default_factory=dict)

    def keep(self, call: Call, output: Any) -> None:
        """In place of what the part's own parts gave; nothing where there is no room, or something else than tensors."""
        within = [known for known in self.given if known[0].startswith(f"{call[0]}.")]
        back = [sum(self.given[known].size for known in within if self.given[known].on_disk is on_disk) for on_disk in (False, True)]
        on_disk = self.room.on_which(output, *back)
        if on_disk is None:
            return
        for known in within:
            self.given.pop(known).clear()
        if kept := self.room.keep(output, on_disk):
            self.given[call] = kept

    def again(self, call: Call) -> Any:
        """The output as it was; None where it is not kept."""
        return self.given[call].again() if call in self.given else None

    def clear(self) -> None:
        for kept in self.given.values():
            kept.clear()
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


def _free_on_disk(scratch: Scratch) -> int:
    try:
        return shutil.disk_usage(scratch.place).free
    except OSError:  # no folder for temporary files, which nothing else needed
        return 0


def _tensors(output: Any) -> list[Tensor]:
    """All of a tensor, or of nested tuples and lists of nothing else; none of what has something else in it."""
    if isinstance(output, Tensor):
        return [output]
    found = [_tensors(one) for one in output] if type(output) in (tuple, list) else []
    return [tensor for one in found for tensor in one] if all(found) else []


def _size(output: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(output))


def _mapped(change: Callable[[Any], Any], output: Any) -> Any:
    """With every tensor, or what stands in its place, changed; nested as it was."""
    return type(output)(_mapped(change, one) for one in output) if isinstance(output, tuple | list) else change(output)


def _copied_to(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.clone() if tensor.device == device else tensor.to(device)
