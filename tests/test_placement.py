"""Where a base lives and in what precision: the answers stay the same, and changes come back wherever the weights have gone meanwhile."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from families_twins import twin
from test_families import SMALL, adapter, of_each_stage, same, weights

from loraclr.collect import Concept, collect
from loraclr.errors import PipelineError, UsageError
from loraclr.loading import chosen, half, has_bfloat16, placed
from loraclr.merge import merge
from loraclr.pipeline import Pipeline

FAMILIES = pytest.mark.parametrize("family", ["sd2", "sdxl", "flux"])
OFFLOADS = pytest.mark.parametrize("offload", ["components", "layers"])


def offloaded(family: str, offload: str) -> Pipeline:
    """With accelerate's real hooks, whose other device is the processor again.

    Layer by layer as diffusers' enable_sequential_cpu_offload does it, but for the bookkeeping of tied weights: that takes a weight
    which is on its device already for one to be shared, and fails.
    """
    pipe = twin(family)
    if offload == "components":
        pipe.enable_model_cpu_offload(device="cpu")
        return Pipeline(pipe)
    device = torch.device("cpu")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            kept = {key: tensor.clone() for key, tensor in part.state_dict().items()}
            add_hook_to_module(part, AlignDevicesHook(device, io_same_device=True), append=True)
            attach_align_device_hook(part, execution_device=device, offload=True, weights_map=kept)
    assert pipe.unet.conv_in.weight.is_meta if hasattr(pipe, "unet") else pipe.transformer.x_embedder.weight.is_meta
    return Pipeline(pipe)


@FAMILIES
@OFFLOADS
def test_an_offloaded_base_is_merged_and_drawn_as_any(family, offload):
    plain, pipeline = Pipeline(twin(family)), offloaded(family, offload)
    assert pipeline.device.type == "cpu"
    before = weights(plain)
    assert same(before, weights(pipeline)), "weights are read wherever they are kept"
    concepts = [adapter(plain, name, seed) for seed, name in enumerate(("ada", "ben"))]
    merged = [merge(concepts, base=base, collection=SMALL).adapter for base in (plain, pipeline)]
    for name in merged[0].layers:
        torch.testing.assert_close(merged[1].layers[name].delta(), merged[0].layers[name].delta(), rtol=1e-4, atol=1e-5)
    drawn = []
    for base in (plain, pipeline):
        with base.applied(merged[0]):
            drawn.append(base.run(["a dog"], seeds=[0], steps=2))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-5)
    assert (plain.run(["a dog"], seeds=[0], steps=2) - drawn[0]).abs().max() > 1e-3, "the change was felt"
    assert pipeline.sample(["a dog"], seeds=[0], steps=1)[0].size == (16, 16)
    assert same(before, weights(pipeline))


def test_weights_that_moved_while_they_were_changed_are_restored():
    """A module sent to another device gets new storage; what was remembered of the old one is nothing."""
    pipeline = Pipeline(twin("sd2"))
    before, change = weights(pipeline), adapter(pipeline, "ada", 1)
    with pipeline.applied(change), pipeline.applied(change, scale=0.5):
        for part in (pipeline.pipe.unet, pipeline.pipe.text_encoder):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    assert same(before, weights(pipeline))


def test_tokens_need_the_text_encoder_in_memory():
    token = {"<x>": torch.zeros(1, 16)}
    with pytest.raises(PipelineError, match=r"offload whole components \(--offload\), not layer by layer"):
        offloaded("sd2", "layers").with_tokens(token).__enter__()
    pipeline, plain = offloaded("sd2", "components"), Pipeline(twin("sd2"))
    states = []
    for base in (plain, pipeline):
        with base.with_tokens(token):
            states.append(base.encode(["a <x>"]))
    assert torch.equal(*states)


def test_weights_that_are_nowhere():
    pipe = twin("sd2")
    pipe.unet.to("meta")
    pipeline = Pipeline(pipe)
    with pytest.raises(PipelineError, match=r"^unet\..* has no weights in memory"):
        pipeline.base_weight(next(name for name in pipeline.modules if name.startswith("unet.")))


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_collects_what_single_does_nearly(family, dtype):
    full, half = Pipeline(twin(family)), Pipeline(twin(family).to(dtype))
    concept, before = Concept(adapter(full, "ada", 1), "ada"), weights(half)
    for names in full.stages(of_each_stage(full)):
        stats = [collect(base, [concept], names, settings=SMALL) for base in (full, half)]
        for name in names:
            expected, found = (one[name].fit["ada"].gram() for one in stats)
            assert found.dtype == torch.float64 and (found - expected).norm() < 0.1 * expected.norm(), name
    assert half.dtype == dtype and same(before, weights(half))
    assert half.sample(["a dog"], seeds=[0], steps=1)[0].size == (16, 16)


# ---- choosing a device


def test_devices():
    assert chosen("cpu") == torch.device("cpu") and chosen("auto").type in ("cpu", "cuda", "mps")
    assert placed(lambda: twin("sd2"), "cpu", offload=False).unet.device.type == "cpu"

    def load():
        raise AssertionError("loaded before the device was looked at")

    with pytest.raises(UsageError, match=r"device 'nonsense' cannot be used .*give cpu, or auto"):
        placed(load, "nonsense", offload=False)
    with pytest.raises(UsageError, match="offloading spares the memory of a GPU"):
        placed(load, "cpu", offload=True)


def test_auto_takes_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert chosen("auto").type == "mps"


def test_offloading_asks_diffusers_for_it_on_that_device(monkeypatch):
    monkeypatch.setattr("loraclr.loading.chosen", lambda device: torch.device("cuda"))
    asked = []

    class Pipe:
        def enable_model_cpu_offload(self, *, device):
            asked.append(device)

    pipe = Pipe()
    assert placed(lambda: pipe, "cuda", offload=True) is pipe and asked == [torch.device("cuda")]


@pytest.mark.parametrize(("able", "expected"), [({"avx512_bf16": True}, True), ({"avx2": True, "avx512_bf16": False}, False)])
def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    rows = torch.randn(4, 4)
    assert has_bfloat16(torch.device("cpu")) is expected
    for wanted in (True, False):
        with half("cpu", wanted):
            assert (torch.nn.functional.linear(rows, rows).dtype == torch.bfloat16) is (wanted and expected)
