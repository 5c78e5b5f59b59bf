"""LoHa, LoKr, Tucker, DoRA, OFT and BOFT: each change against its definition written out in loops, and the identities that must hold."""

from __future__ import annotations

import math

import pytest
import torch
from formats_samples import ATTN, KERNEL, PROJ, Base

from loraclr.adapter import Adapter, DenseLayer, LoraLayer, ProductLayer
from loraclr.errors import FormatError
from loraclr.formats import diffusers, files, kinds, kohya, load_adapter, peft, rotations, save_adapter
from loraclr.formats.base import Content

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
C = "lora_unet_down_blocks_0_downsamplers_0_conv"
EXACT = {"rtol": 0, "atol": 1e-12}


def only(tensors, stem=Q, base=None):
    [layer] = kohya.read(Content({f"{stem}.{part}": tensor for part, tensor in tensors.items()}), base)
    return layer


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def loop_kron(a, b):
    out = torch.zeros(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1], *b.shape[2:], dtype=torch.float64)
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            for k in range(b.shape[0]):
                for m in range(b.shape[1]):
                    out[i * b.shape[0] + k, j * b.shape[1] + m] = a[i, j] * b[k, m]
    return out


def loop_tucker(core, a, b):
    out = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for m in range(core.shape[0]):
        for n in range(core.shape[1]):
            for o in range(a.shape[1]):
                for i in range(b.shape[1]):
                    out[o, i] += a[m, o] * core[m, n] * b[n, i]
    return out


class TestLoHa:
    def test_a_two_by_two_by_hand(self):
        """[[1, 2], [2, 4]] times [[1, 1], [3, 3]] by elements, at alpha 3 and rank 1."""
        parts = {
            "hada_w1_a": torch.tensor([[1.0], [2.0]]),
            "hada_w1_b": torch.tensor([[1.0, 2.0]]),
            "hada_w2_a": torch.tensor([[1.0], [3.0]]),
            "hada_w2_b": torch.tensor([[1.0, 1.0]]),
            "alpha": torch.tensor(3.0),
        }
        assert torch.equal(only(parts).delta(), 3 * torch.tensor([[1.0, 2.0], [6.0, 12.0]]))

    @pytest.mark.parametrize(("rank", "kind"), [(2, LoraLayer), (4, ProductLayer)])
    def test_low_rank_where_that_is_smaller(self, rank, kind):
        """Rank r by elements has rank r^2: 4 (12 + 10) < 120 < 16 (12 + 10)."""
        parts = {"hada_w1_a": rand(12, rank), "hada_w1_b": rand(rank, 10), "hada_w2_a": rand(12, rank), "hada_w2_b": rand(rank, 10)}
        layer = only(parts | {"alpha": torch.tensor(3.0)})
        expected = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) * 3 / rank
        assert type(layer) is kind
        torch.testing.assert_close(layer.delta(torch.float64), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("rank", [1, 5])
    def test_a_flattened_convolution_gets_its_kernel_back(self, rank):
        """in * 9 columns, channel by channel, as a kernel flattens."""
        parts = {"hada_w1_a": rand(6, rank), "hada_w1_b": rand(rank, 36), "hada_w2_a": rand(6, rank), "hada_w2_b": rand(rank, 36)}
        layer = only(parts, C)
        flat = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        assert layer.shape == (6, 4, 3, 3)
        torch.testing.assert_close(layer.delta(torch.float64), flat.view(6, 4, 3, 3), rtol=0, atol=1e-5)

    def test_tucker(self):
        parts = {"hada_t1": rand(2, 2, 3, 3), "hada_w1_a": rand(2, 5), "hada_w1_b": rand(2, 4)}
        parts |= {"hada_t2": rand(2, 2, 3, 3), "hada_w2_a": rand(2, 5), "hada_w2_b": rand(2, 4), "alpha": torch.tensor(1.0)}
        halves = (loop_tucker(parts[f"hada_t{n}"], parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
        torch.testing.assert_close(only(parts, C).delta(torch.float64), math.prod(halves) / 2, **EXACT)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"hada_w2_b": None},
            {"hada_w2_b": torch.ones(2, 9)},
            {"hada_w2_a": torch.ones(11, 2)},
            {"hada_w1_b": torch.ones(3, 10)},
            {"hada_t1": torch.ones(2, 2, 3, 3)},
            {"lokr_w1": torch.ones(2, 2)},
            {"hada_w1_a": torch.ones(12, 0)},
        ],
    )
    def test_misfits(self, wrong):
        parts = {"hada_w1_a": rand(12, 2), "hada_w1_b": rand(2, 10), "hada_w2_a": rand(12, 2), "hada_w2_b": rand(2, 10)} | wrong
        with pytest.raises(FormatError, match=ATTN):
            only({part: tensor for part, tensor in parts.items() if tensor is not None})


class TestLoKr:
    @pytest.mark.parametrize("split1", [False, True])
    @pytest.mark.parametrize("split2", [False, True])
    @pytest.mark.parametrize("sizes", [(3, 2, 8, 9), (2, 3, 9, 8)])
    def test_against_loops(self, split1, split2, sizes):
        """Scaled by alpha / rank only where some factor is decomposed, by w2's rank where both are."""
        out1, in1, out2, in2 = sizes
        a1, b1, a2, b2 = rand(out1, 1), rand(1, in1), rand(out2, 2), rand(2, in2)
        parts = {"lokr_w1_a": a1, "lokr_w1_b": b1} if split1 else {"lokr_w1": a1 @ b1}
        parts |= {"lokr_w2_a": a2, "lokr_w2_b": b2} if split2 else {"lokr_w2": a2 @ b2}
        layer = only(parts | {"alpha": torch.tensor(3.0)})
        scale = 1.5 if split2 else 3.0 if split1 else 1.0
        assert layer.shape == (out1 * out2, in1 * in2)
        torch.testing.assert_close(layer.delta(torch.float64), scale * loop_kron(a1 @ b1, a2 @ b2), rtol=0, atol=1e-5)

    def test_low_rank_where_that_is_smaller(self):
        """kron(w1, a b) has rank min(w1) * r: here 2 * 1 of 16."""
        small = only({"lokr_w1": rand(2, 2), "lokr_w2_a": rand(8, 1), "lokr_w2_b": rand(1, 8)})
        full = only({"lokr_w1": rand(4, 4), "lokr_w2": rand(4, 4)})
        assert isinstance(small, LoraLayer) and small.rank == 2 and isinstance(full, ProductLayer) and full.rank == 16

    @pytest.mark.parametrize("flat", [False, True])
    def test_a_convolution(self, flat):
        w1, w2 = rand(2, 2), rand(3, 2, 3, 3)
        parts = {"lokr_w1": w1} | ({"lokr_w2_a": torch.eye(3), "lokr_w2_b": w2.flatten(1)} if flat else {"lokr_w2": w2})
        layer = only(parts, C)
        assert layer.shape == (6, 4, 3, 3)
        torch.testing.assert_close(layer.delta(torch.float64), loop_kron(w1, w2), rtol=0, atol=1e-5)

    def test_tucker(self):
        w1, core, a, b = rand(2, 2), rand(2, 2, 3, 3), rand(2, 3), rand(2, 2)
        layer = only({"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(4.0)}, C)
        torch.testing.assert_close(layer.delta(torch.float64), 2 * loop_kron(w1, loop_tucker(core, a, b)), **EXACT)

    @pytest.mark.parametrize(
        "parts",
        [
            {"lokr_w1": torch.ones(2, 2)},
            {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 2)},
            {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(3, 4)},
            {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 2), "lokr_w2_b": torch.ones(3, 4)},
            {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 2), "lokr_t2": torch.ones(2, 2, 3, 3)},
            {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(2, 4), "lokr_t2": torch.ones(2, 2)},
        ],
    )
    def test_misfits(self, parts):
        with pytest.raises(FormatError, match=ATTN):
            only(parts)

    def test_two_small_factors_cannot_ask_for_terabytes(self):
        with pytest.raises(FormatError, match=r"would expand to \(1000000, 1000000\)"):
            only({"lokr_w1": torch.ones(1000, 1000), "lokr_w2": torch.ones(1000, 1000)})

    def test_a_flattened_kernel_of_no_whole_number_of_channels(self):
        with pytest.raises(FormatError, match="no whole number"):
            only({"lokr_w1": torch.ones(1, 1), "lokr_w2_a": torch.ones(4, 1), "lokr_w2_b": torch.ones(1, 10)}, C)


def test_products_are_written_as_full_differences_and_read_back(tmp_path):
    layer = only({"lokr_w1": rand(4, 4), "lokr_w2": rand(4, 4)})
    path = save_adapter(Adapter.of([layer]), tmp_path / "a.safetensors", dtype=torch.float32)
    [back] = load_adapter(path)
    assert type(back) is DenseLayer
    torch.testing.assert_close(back.delta(), layer.delta())


class TestDoRA:
    @pytest.fixture(autouse=True)
    def _draw(self, _seed):
        self.lora = {"lora_down.weight": rand(2, 5), "lora_up.weight": rand(6, 2), "alpha": torch.tensor(4.0)}
        self.weight = rand(6, 5)
        self.delta = 2 * self.lora["lora_up.weight"] @ self.lora["lora_down.weight"]

    def test_no_change_at_the_norms_of_the_base_is_the_identity(self):
        zero = {"lora_down.weight": rand(2, 5), "lora_up.weight": torch.zeros(6, 2)}
        for magnitude in (self.weight.norm(dim=1, keepdim=True), self.weight.norm(dim=0, keepdim=True)):
            layer = only(zero | {"dora_scale": magnitude}, base=Base(**{ATTN: self.weight}))
            torch.testing.assert_close(layer.delta(), torch.zeros(6, 5), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("axis", ["rows", "columns", "vector"])
    def test_against_loops(self, axis):
        moved, expected = self.weight + self.delta, torch.zeros(6, 5, dtype=torch.float64)
        magnitude = rand(1, 5) if axis == "columns" else rand(6, 1)
        for o in range(6):
            for i in range(5):
                line, m = (moved[:, i], magnitude[0, i]) if axis == "columns" else (moved[o], magnitude[o, 0])
                expected[o, i] = m * moved[o, i] / line.square().sum().sqrt() - self.weight[o, i]
        given = magnitude[:, 0] if axis == "vector" else magnitude
        layer = only(self.lora | {"dora_scale": given}, base=Base(**{ATTN: self.weight}))
        assert type(layer) is DenseLayer
        torch.testing.assert_close(layer.delta(), expected.float())

    def test_square_layers_are_told_by_shape(self):
        lora, weight = {"lora_down.weight": rand(1, 4), "lora_up.weight": rand(4, 1)}, rand(4, 4)
        moved = weight + lora["lora_up.weight"] @ lora["lora_down.weight"]
        for sides, dim in (((4, 1), 1), ((1, 4), 0)):
            layer = only(lora | {"dora_scale": torch.ones(sides)}, base=Base(**{ATTN: weight}))
            torch.testing.assert_close((weight + layer.delta().double()).norm(dim=dim), torch.ones(4, dtype=torch.float64))
            assert not torch.allclose(moved.norm(dim=dim), torch.ones(4, dtype=torch.float64))

    @pytest.mark.parametrize(("sides", "dims"), [((6, 1, 1, 1), (1, 2, 3)), ((1, 4, 1, 1), (0, 2, 3))])
    def test_convolutions(self, sides, dims):
        weight, magnitude = rand(6, 4, 3, 3), rand(*sides).abs()
        lora = {"lora_down.weight": rand(2, 4, 3, 3), "lora_up.weight": rand(6, 2, 1, 1), "dora_scale": magnitude}
        moved = weight + only(lora, C, base=Base(**{KERNEL: weight})).delta(torch.float64)
        torch.testing.assert_close(torch.linalg.vector_norm(moved, dim=dims, keepdim=True), magnitude, rtol=1e-5, atol=1e-5)

    def test_on_a_loha(self):
        loha = {"hada_w1_a": rand(6, 2), "hada_w1_b": rand(2, 5), "hada_w2_a": rand(6, 2), "hada_w2_b": rand(2, 5)}
        moved = self.weight + only(loha, base=Base(**{ATTN: self.weight})).delta(torch.float64)
        expected = 3 * moved / moved.norm(dim=1, keepdim=True) - self.weight
        layer = only(loha | {"dora_scale": torch.full((6, 1), 3.0)}, base=Base(**{ATTN: self.weight}))
        torch.testing.assert_close(layer.delta(), expected.float())

    def test_without_a_base(self, tmp_path):
        tensors = {f"{Q}.{part}": tensor.contiguous() for part, tensor in (self.lora | {"dora_scale": rand(6, 1)}).items()}
        (tmp_path / "a.safetensors").write_bytes(files.safetensors_bytes(tensors, {}))
        with pytest.raises(FormatError, match=f"{ATTN} is a DoRA.*pass the base model it is for"):
            load_adapter(tmp_path / "a.safetensors")
        assert type(load_adapter(tmp_path / "a.safetensors", base=Base(**{ATTN: self.weight})).layers[ATTN]) is DenseLayer

    @pytest.mark.parametrize("sides", [(5, 1), (1, 6), (1, 1), (6, 5)])
    def test_magnitudes_that_fit_neither_side(self, sides):
        with pytest.raises(FormatError, match=r"expected \(6, 1\) or \(1, 5\)"):
            only(self.lora | {"dora_scale": torch.ones(sides)}, base=Base(**{ATTN: self.weight}))

    def test_a_base_of_another_size(self):
        with pytest.raises(FormatError, match="give the base it was trained on"):
            only(self.lora | {"dora_scale": torch.ones(6, 1)}, base=Base(**{ATTN: rand(6, 7)}))

    def test_names_of_diffusers_and_peft(self):
        path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        own = only(self.lora | {"dora_scale": torch.ones(6, 1), "alpha": torch.tensor(2.0)}, base=Base(**{ATTN: self.weight}))
        for reader, prefix, metadata in (
            (diffusers, "unet.", {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": true}'}),
            (diffusers, "", {}),
            (peft, "base_model.model.", {"adapter_config.json": '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": true}'}),
        ):
            stem = f"{prefix}{path}"
            tensors = {f"{stem}.lora_A.weight": self.lora["lora_down.weight"], f"{stem}.lora_B.weight": self.lora["lora_up.weight"]}
            [layer] = reader.read(
                Content(tensors | {f"{stem}.lora_magnitude_vector": torch.ones(6)}, metadata), Base(**{ATTN: self.weight})
            )
            torch.testing.assert_close(layer.delta(), own.delta())
            if metadata:
                with pytest.raises(FormatError, match="use_dora, but there are no magnitudes"):
                    reader.read(Content(tensors, metadata), Base(**{ATTN: self.weight}))

    def test_peft_arrives_at_the_same_weights(self):
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        model = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(3, 6, 3), "conv_out": torch.nn.Linear(5, 6)})
        base = {f"unet.{name}": module.weight.detach().clone() for name, module in model.items()}
        model.forward = lambda x: x
        wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["conv_in", "conv_out"], use_dora=True))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                torch.nn.init.normal_(parameter)
        config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": true}'
        tensors = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(wrapped).items()}
        assert {tuple(tensor.shape) for key, tensor in tensors.items() if "magnitude" in key} == {(6,), (1, 6, 1, 1)}
        adapter = peft.read(Content(tensors, {"adapter_config.json": config}), Base(**base))
        merged = wrapped.merge_and_unload()
        for name, weight in base.items():
            torch.testing.assert_close(weight + adapter.layers[name].delta(), merged[name.removeprefix("unet.")].weight, rtol=0, atol=1e-5)


class TestRotations:
    @pytest.mark.parametrize("blocks", [torch.zeros(4, 4, 4), torch.zeros(3, 4, 4, 4)], ids=["oft", "boft"])
    def test_zero_blocks_are_the_identity(self, blocks):
        assert not rotations.change(ATTN, rand(16, 5), blocks, None, 0.0).any()

    def test_rotations_are_orthogonal(self):
        turn = rotations.rotation(rand(3, 4, 4), 0.0)
        torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(4, dtype=torch.float64).expand(3, 4, 4), rtol=0, atol=1e-12)

    def test_a_quarter_turn_by_hand(self):
        """Q = [[0, 1], [-1, 0]] makes R = (I + Q)(I - Q)^-1 = Q; Diag-OFT takes its transpose: rows (a, b) become (-b, a)."""
        blocks = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
        torch.testing.assert_close(rotations.rotation(blocks, 0.0)[0], torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64))
        weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        turned = weight + rotations.change(ATTN, weight, blocks, None, 0.0)
        torch.testing.assert_close(turned, torch.tensor([[-3.0, -4.0], [1.0, 2.0]]))

    def test_the_limit_scales_all_blocks_together(self):
        blocks = rand(3, 2, 2)
        skew = blocks - blocks.transpose(1, 2)
        limited = rotations.rotation(blocks, float(skew.norm()) / 2)
        torch.testing.assert_close(limited, rotations.rotation(blocks / 2, 0.0))
        torch.testing.assert_close(rotations.rotation(blocks, float(skew.norm()) * 2), rotations.rotation(blocks, 0.0))

    def test_alpha_is_the_limit_per_output_row_and_rescale_comes_last(self):
        weight, blocks, rescale = rand(6, 5), rand(3, 2, 2), rand(6, 1)
        layer = only({"oft_blocks": blocks, "rescale": rescale, "alpha": torch.tensor(0.01)}, base=Base(**{ATTN: weight}))
        turn, expected = rotations.rotation(blocks, 0.06), torch.zeros(6, 5, dtype=torch.float64)
        for k in range(3):
            for m in range(2):
                for n in range(2):
                    expected[2 * k + m] += turn[k, n, m] * weight[2 * k + n] * rescale[2 * k + m]
        torch.testing.assert_close(weight + layer.delta().double(), expected, rtol=0, atol=1e-6)

    def test_butterfly_stages(self):
        """8 rows in blocks of 4: stage 0 takes neighbouring pairs of runs of 2, stage 1 runs of 4."""
        assert rotations.butterfly(ATTN, 8, 4, 0).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
        assert rotations.butterfly(ATTN, 8, 4, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]

    def test_boft_against_loops(self):
        weight, blocks = rand(8, 3), rand(2, 2, 4, 4)
        turn, turned = rotations.rotation(blocks, 0.0), weight
        for stage in range(2):
            order, after = rotations.butterfly(ATTN, 8, 4, stage), torch.zeros(8, 3, dtype=torch.float64)
            for k in range(2):
                for i in range(4):
                    for j in range(4):
                        after[order[4 * k + i]] += turn[stage, k, i, j] * turned[order[4 * k + j]]
            turned = after
        layer = only({"oft_blocks": blocks}, base=Base(**{ATTN: weight}))
        torch.testing.assert_close(weight + layer.delta().double(), turned, rtol=0, atol=1e-6)
        torch.testing.assert_close(turned.norm(), weight.norm())  # every stage is orthogonal

    def test_convolutions(self):
        weight, blocks = rand(6, 4, 3, 3), rand(3, 2, 2)
        flat = rotations.change(ATTN, weight.flatten(1), blocks, None, 0.0)
        torch.testing.assert_close(only({"oft_blocks": blocks}, C, base=Base(**{KERNEL: weight})).delta(), flat.view(6, 4, 3, 3))

    @pytest.mark.parametrize(
        "parts",
        [
            {"oft_blocks": torch.zeros(3, 4, 4)},
            {"oft_blocks": torch.zeros(3, 2, 1)},
            {"oft_blocks": torch.zeros(6)},
            {"oft_blocks": torch.zeros(40, 3, 2, 2)},
            {"oft_blocks": torch.zeros(1, 6, 1, 1)},
            {"oft_blocks": torch.zeros(3, 2, 2), "rescale": torch.ones(5, 1)},
            {"oft_blocks": torch.zeros(3, 2, 2), "dora_scale": torch.ones(6, 1)},
        ],
    )
    def test_misfits(self, parts):
        with pytest.raises(FormatError, match=ATTN):
            only(parts, base=Base(**{ATTN: rand(6, 5)}))

    def test_without_a_base(self):
        with pytest.raises(FormatError, match="is an OFT / BOFT rotation.*pass the base model"):
            only({"oft_blocks": torch.zeros(3, 2, 2)})


def test_lycoris_around_a_model_says_the_component_by_the_path():
    found = kohya.read(
        Content(
            {
                "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.diff": torch.ones(2, 2),
                "lycoris_text_model_encoder_layers_0_self_attn_q_proj.diff": torch.ones(2, 2),
                "lycoris_single_transformer_blocks_3_proj_mlp.diff": torch.ones(2, 2),
                "lycoris_double_blocks_3_img_mlp_0.diff": torch.ones(2, 2),
                "lycoris_input_blocks_1_1_proj_in.diff": torch.ones(2, 2),
            }
        )
    )
    assert list(found.layers) == [
        "text_encoder.encoder.layers.0.self_attn.q_proj",
        "transformer.single_transformer_blocks.3.proj_mlp",
        "transformer.transformer_blocks.3.ff.net.0.proj",
        "unet.down_blocks.0.attentions.0.proj_in",
        ATTN,
    ]


def test_every_kind_has_a_limit_on_what_it_may_grow_to():
    side = math.isqrt(kinds.LARGEST) + 1
    factors = {part: torch.ones(1).expand(side, 1) for part in ("hada_w1_a", "hada_w2_a")}
    with pytest.raises(FormatError, match="would expand"):
        only(factors | {part: torch.ones(1).expand(1, side) for part in ("hada_w1_b", "hada_w2_b")})


def test_a_convolution_by_name_only_where_the_name_tells():
    """1x1 convolutions of SD1.x are linear layers in SDXL: their names do not tell, and the base's own shape is used in the end."""
    stem = "lora_unet_down_blocks_1_attentions_0_proj_in"
    layer = only({"lokr_w1": rand(2, 2), "lokr_w2": rand(3, 3)}, stem)
    assert layer.name == PROJ and layer.shape == (6, 6)


@pytest.mark.parametrize(
    "parts",
    [
        {f"hada_w{n}_{side}": torch.full((3, 1) if side == "a" else (1, 3), 1e30) for n in (1, 2) for side in "ab"},
        {"lokr_w1": torch.full((2, 2), 1e30), "lokr_w2_a": torch.ones(9, 1), "lokr_w2_b": torch.full((1, 9), 1e30)},
        {
            "lora_down.weight": torch.full((2, 2, 1, 1), 1e30),
            "lora_mid.weight": torch.full((2, 2, 3, 3), 1e30),
            "lora_up.weight": torch.ones(2, 2, 1, 1),
        },
        {"lora_down.weight": torch.ones(1, 3), "lora_up.weight": torch.ones(3, 1), "dora_scale": rand(3, 1) * 1e60},
        {"oft_blocks": torch.zeros(1, 3, 3), "rescale": torch.full((3, 1), 1e30)},
    ],
    ids=["loha", "lokr", "tucker", "dora", "oft"],
)
def test_products_beyond_float32_are_refused(parts):
    base = Base(**{ATTN: torch.eye(3).double() * 1e30})
    with pytest.raises(FormatError, match=f"{ATTN}: .*more than float32 can hold"):
        only(parts, base=base)
