"""Files that are broken or made to hurt: each is exactly one FormatError, quickly, and nothing is allocated because a header says so."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile

import pytest
import torch
from formats_samples import ATTN, mixed

from loraclr.errors import FormatError
from loraclr.formats import describe, detect_format, files, load_adapter, save_adapter

READERS = (load_adapter, describe)  # detection alone looks at names only
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(autouse=True)
def quick_and_small():
    """Every test here takes less than two seconds of computing and 300 MB of further memory."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def refused(path, message=None, *, by=(load_adapter, describe, detect_format)):
    for read in by:
        with pytest.raises(FormatError, match=message) as caught:
            read(path)
        assert str(caught.value).count(str(path)) == 1
    return str(caught.value)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class TestSafetensors:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x00" * 7,
            b"\x00" * 8,
            struct.pack("<Q", 2**63) + b"{}",
            struct.pack("<Q", 2**40) + b"{}",
            struct.pack("<Q", 50_000_000) + b"{}",
            raw(b"{"),
            raw(b"[1, 2]"),
            raw(b"\xff\xfe{}"),
            raw(b"[" * 200_000),
            raw({}),
            raw({"__metadata__": {"a": 1}}),
            raw({f"{Q}.lora_up.weight": entry([2**40, 2**20], 0, 2**62)}, b"\x00" * 16),
            raw({f"{Q}.lora_up.weight": entry([2**62, 2**62], 0, 16)}, b"\x00" * 16),
            raw({f"{Q}.lora_up.weight": entry([1000, 1000], 0, 16)}, b"\x00" * 16),
            raw({f"{Q}.lora_up.weight": entry([2, 2], 16, 0)}, b"\x00" * 16),
            raw({f"{Q}.lora_up.weight": entry([-2, -2], 0, 16)}, b"\x00" * 16),
            raw({f"{Q}.lora_up.weight": entry([2, 2], 0, 16), f"{Q}.lora_down.weight": entry([2, 2], 8, 24)}, b"\x00" * 24),
            raw({f"{Q}.lora_up.weight": entry([2, 2], 0, 16), f"{Q}.lora_down.weight": entry([2, 2], 0, 16)}, b"\x00" * 16),
            raw({f"{Q}.lora_up.weight": entry([2, 2], 0, 16)}, b"\x00" * 160),
            raw({f"{Q}.lora_up.weight": entry([2, 2], 0, 16, "X9")}, b"\x00" * 16),
            raw({f"{Q}.lora_up.weight": "no entry"}),
            b"PK\x03\x04 not really a zip",
            b"<html><body>404 Not Found</body></html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
        ],
    )
    def test_what_is_no_safetensors_file(self, content, tmp_path):
        (tmp_path / "a.safetensors").write_bytes(content)
        refused(tmp_path / "a.safetensors", "a.safetensors")

    def test_cut_off_anywhere(self, tmp_path):
        whole = save_adapter(mixed(), tmp_path / "whole.safetensors").read_bytes()
        size = 8 + int.from_bytes(whole[:8], "little")
        cuts = {*range(16), *range(16, size, 97), size - 1, size, size + 1, *range(size, len(whole), 31), len(whole) - 1}
        for cut in cuts:
            (tmp_path / "a.safetensors").write_bytes(whole[:cut])
            with pytest.raises(FormatError):
                load_adapter(tmp_path / "a.safetensors")

    def test_one_byte_changed_in_the_header_never_crashes(self, tmp_path):
        whole = bytearray(save_adapter(mixed(), tmp_path / "whole.safetensors").read_bytes())
        path = tmp_path / "a.safetensors"
        for position in range(0, 1200, 13):
            changed = whole.copy()
            changed[position] ^= 0x15
            path.write_bytes(changed)
            with contextlib.suppress(FormatError):
                load_adapter(path)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_weights_that_are_no_ordinary_floats(self, dtype, tmp_path):
        tensors = {f"{Q}.lora_up.weight": torch.ones(2, 2).to(dtype), f"{Q}.lora_down.weight": torch.ones(2, 2)}
        (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
        refused(tmp_path / "a.safetensors", f"lora_up.weight has type {dtype}; expected one of float16")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("part", ["lora_up.weight", "alpha"])
    def test_values_that_are_no_numbers(self, value, part, tmp_path):
        tensors = {f"{Q}.lora_up.weight": torch.ones(2, 2), f"{Q}.lora_down.weight": torch.ones(2, 2), f"{Q}.alpha": torch.tensor(1.0)}
        tensors[f"{Q}.{part}"].view(-1)[0] = value
        (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
        refused(tmp_path / "a.safetensors", f"{part} holds NaN or infinite")

    def test_a_whole_checkpoint_names_its_first_keys(self, tmp_path):
        tensors = {f"model.diffusion_model.input_blocks.{i}.weight": torch.ones(2) for i in range(5)}
        (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
        assert "input_blocks.0.weight, model.diffusion_model.input_blocks.1.weight" in refused(
            tmp_path / "a.safetensors", "whole checkpoint.*and 2 more"
        )

    def test_very_many_unknown_keys_are_a_short_message(self, tmp_path):
        tensors = {f"{Q}.{'x' * 50}{i}": torch.ones(1) for i in range(2000)}
        (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
        assert len(refused(tmp_path / "a.safetensors", "2000 keys", by=READERS)) < 800


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


class TestTorch:
    def test_code_is_not_run(self, tmp_path):
        for name, kwargs in (("zip.pth", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
            torch.save({"params": {"unet": Evil(tmp_path / "owned")}}, tmp_path / name, **kwargs)
            refused(tmp_path / name, name)
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
        refused(tmp_path / "plain.pth", "no torch zip file")
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize(
        "content",
        [
            [1, 2],
            {"state_dict": {}},
            {"params": 3},
            {"params": {}, "optimizer": {}},
            {"params": {"unet": {"a": "text"}}},
            {"params": {"unet": torch.ones(2)}},
            {"params": {"unet": [torch.ones(2)]}},
            {"params": {"unet": {"mid_block.attentions.0.proj_in.lora_up.weight": torch.ones(1, 1).expand(10**6, 10**6)}}},
            {"params": {"unet": {"a": torch.empty(10**6, 10**6, device="meta")}}},
            {"params": {"unet": {"a": torch.eye(3).to_sparse()}}},
            {"params": {"unet": {}}},
            {},
        ],
    )
    def test_contents_that_are_no_edlora(self, content, tmp_path):
        torch.save(content, tmp_path / "a.pth")
        refused(tmp_path / "a.pth", "a.pth", by=READERS)

    def test_cut_off(self, tmp_path):
        whole = save_adapter(mixed(), tmp_path / "whole.pth", format="edlora").read_bytes()
        for cut in range(0, len(whole), len(whole) // 40):
            (tmp_path / "a.pth").write_bytes(whole[:cut])
            refused(tmp_path / "a.pth", "a.pth")

    def test_a_zip_whose_end_claims_several_disks(self, tmp_path):
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2)  # zipfile.is_zipfile raises on it
        (tmp_path / "a.pth").write_bytes(b"PK\x03\x04" + locator + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0))
        refused(tmp_path / "a.pth", "cannot be unpickled")

    def test_a_zip_that_unpacks_to_gigabytes(self, tmp_path):
        with (
            zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("archive/data.pkl", "w", force_zip64=True) as file,
        ):
            for _ in range(64):
                file.write(bytes(1 << 20))
        refused(tmp_path / "a.pth", "no honest file")

    def test_a_tensor_larger_than_its_record(self, tmp_path):
        buffer = io.BytesIO()
        torch.save({"params": {"unet": {"x": torch.ones(4)}}}, buffer)
        writer = torch._C.PyTorchFileWriter(str(tmp_path / "a.pth"))
        with zipfile.ZipFile(buffer) as archive:
            for item in archive.namelist():
                name, data = item.split("/", 1)[1], archive.read(item)
                if name == "data.pkl":
                    larger = data.replace(b"K\x04t", b"K\xc8t").replace(b"K\x04\x85", b"K\xc8\x85")
                    assert larger != data
                    data = larger
                if name != "version" and not name.startswith(".data"):
                    writer.write_record(name, data, len(data))
        writer.write_end_of_file()
        refused(tmp_path / "a.pth", "cannot be unpickled as plain tensors")


class TestPaths:
    @pytest.mark.parametrize("name", ["a.ckpt", "a.txt", "a"])
    def test_other_endings(self, name, tmp_path):
        (tmp_path / name).write_bytes(b"whatever")
        refused(tmp_path / name, "convert it to .safetensors first")

    def test_a_bin_is_read_as_a_torch_file(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(b"whatever")
        refused(tmp_path / "a.bin", "is no torch zip file")

    def test_nothing_there(self, tmp_path):
        refused(tmp_path / "a.safetensors", "no such file")

    def test_a_folder_without_configuration(self, tmp_path):
        (tmp_path / "notes.txt").write_text("none")
        refused(tmp_path, "a folder without adapter_config.json")

    def test_a_configuration_without_weights(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        refused(tmp_path, "lacks adapter_model.safetensors")

    @pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null", '{"peft_type": "LORA", "r": 1e999}', "\xff"])
    def test_configurations_that_are_none(self, text, tmp_path):
        save_adapter(mixed((ATTN,)), tmp_path / "a", format="peft")
        (tmp_path / "a" / "adapter_config.json").write_bytes(text.encode("latin1"))
        refused(tmp_path / "a", by=READERS)

    def test_a_configuration_of_megabytes(self, tmp_path):
        save_adapter(mixed((ATTN,)), tmp_path / "a", format="peft")
        with (tmp_path / "a" / "adapter_config.json").open("wb") as file:
            file.truncate(1 << 33)
        refused(tmp_path / "a", "too many for a configuration")

    def test_what_cannot_be_opened(self, tmp_path):
        os.symlink(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
        with pytest.raises(FormatError):
            load_adapter(tmp_path / "a.safetensors")

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
    def test_what_may_not_be_read(self, tmp_path):
        path = save_adapter(mixed(), tmp_path / "a.safetensors")
        path.chmod(0)
        refused(path, "cannot be read")

    def test_a_pipe_does_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "a.safetensors")
        refused(tmp_path / "a.safetensors", "is no ordinary file")


def test_patterns_of_a_header_cannot_keep_the_matcher_busy(tmp_path):
    save_adapter(mixed((ATTN,)), tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for pattern in (r"(\w+\w+)+!", "(a|a)*!", r"(((\w*)*)*)!", r"\w*\w*\w*\w*!"):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {pattern: 1}}))
        refused(tmp_path / "a", "too involved", by=READERS)
