"""Our reading of LyCORIS files against LyCORIS' own layers at work: `python -m benchmarks.lycoris`, which needs lycoris-lora.

For every kind of layer, linear and 3x3: a random layer of theirs is saved, read by us, and compared with what its forward pass adds to
the frozen module, on a basis of inputs. The last column does the same with their `get_merged_weight`, which is not always their layer.
"""

from __future__ import annotations

from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from loraclr.formats import kohya
from loraclr.formats.base import Content

NAMES = {
    "linear": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "conv": "lora_unet_down_blocks_0_downsamplers_0_conv",
}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "LoCon": (LoConModule, {}),
    "LoCon, Tucker": (LoConModule, {"use_tucker": True}),
    "LoCon, rank-stabilised": (LoConModule, {"rs_lora": True}),
    "DoRA, rows": (LoConModule, {"weight_decompose": True, "wd_on_out": True}),
    "DoRA, columns": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "LoHa": (LohaModule, {}),
    "LoHa, high rank": (LohaModule, {"lora_dim": 9}),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}),
    "LoHa with DoRA": (LohaModule, {"weight_decompose": True, "wd_on_out": False}),
    "LoKr": (LokrModule, {"factor": 4}),
    "LoKr, full": (LokrModule, {"full_matrix": True}),
    "LoKr, Tucker": (LokrModule, {"factor": 4, "use_tucker": True}),
    "LoKr with DoRA": (LokrModule, {"factor": 4, "weight_decompose": True}),
    "Diag-OFT": (DiagOFTModule, {"lora_dim": 4}),
    "Diag-OFT, constrained and rescaled": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 4}),
    "BOFT, constrained and rescaled": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
}


class Base:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def base_weight(self, name: str) -> Tensor:
        return self.weight


@torch.no_grad()
def errors(kind: str, where: str) -> tuple[float, float | None]:
    """Relative errors of our delta against the layer's forward pass and against its merged weight, None where that fails."""
    made, settings = KINDS[kind]
    frozen = nn.Linear(48, 32, bias=False) if where == "linear" else nn.Conv2d(16, 32, 3, bias=False)
    layer: Any = made(NAMES[where], frozen, 1.0, **{"lora_dim": 3, "alpha": 2, **settings})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = layer.state_dict()
    saved = layer.custom_state_dict() or {key: state[key] for key in ("oft_blocks", "rescale", "alpha") if key in state}
    [ours] = kohya.read(Content({f"{NAMES[where]}.{key}": tensor for key, tensor in saved.items()}), Base(frozen.weight))
    delta = ours.delta().view_as(frozen.weight)
    try:
        merged = layer.get_merged_weight(1.0)[0] - frozen.weight
    except RuntimeError:
        merged = None
    layer.eval()
    layer.apply_to()
    size = frozen.weight[0].numel()
    basis = torch.eye(size).view(size, *frozen.weight.shape[1:])
    applied = layer(basis).view(size, -1).T.view_as(frozen.weight) - frozen.weight
    return _relative(delta, applied), None if merged is None else _relative(delta, merged)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def main() -> None:
    torch.manual_seed(0)
    table = Table("kind", "module", "against its forward pass", "against its merged weight")
    for kind in KINDS:
        for where in NAMES:
            forward, merged = errors(kind, where)
            table.add_row(kind, where, f"{forward:.1e}", "fails" if merged is None else f"{merged:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
