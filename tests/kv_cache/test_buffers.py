"""KVBuffers and KVScales: what they refuse, and that conversions are explicit and exact."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from torch_fp4ops.kv_cache import KVBuffers, KVScales
from torch_fp4ops.testing import assert_same_bytes


def buffers(**change) -> KVBuffers:
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randint(0, 256, (3, 2, 8, last), generator=generator, dtype=torch.uint8)
        for name, last in (("k", 64), ("v", 64), ("k_sf", 8), ("v_sf", 8))
    }
    return KVBuffers(**{"method": "nvfp4", **made, "kv_layout": "HND", "scale_convention": "amax/448", **change})


def test_sizes_and_immutability():
    hnd = buffers()
    assert (hnd.page_size, hnd.heads, hnd.head_dim, hnd.block_size, hnd.slots) == (8, 2, 128, 16, 24)
    assert hnd.nbytes == 24 * 2 * 2 * 72
    nhd = buffers(kv_layout="NHD")
    assert (nhd.page_size, nhd.heads, nhd.slots) == (2, 8, 6)
    with pytest.raises(FrozenInstanceError):
        hnd.kv_layout = "NHD"


def test_interleaving_is_undone_and_leaves_the_original_alone():
    linear = buffers()
    before = linear.v_sf.clone()
    turned = linear.with_v_scales("interleaved")
    assert turned.v_sf_layout == "interleaved"
    assert turned.k_sf is linear.k_sf
    for t, s in ((0, 0), (1, 0), (5, 3), (7, 7)):
        position = (t // 4) * 32 + s * 4 + t % 4
        assert torch.equal(turned.v_sf.flatten(2)[..., position], linear.v_sf[..., t, s])
    assert_same_bytes(turned.with_v_scales("linear").v_sf, before)
    assert_same_bytes(linear.v_sf, before)
    assert linear.with_v_scales("linear") is linear
    for wrong, layout in ((buffers(kv_layout="NHD"), "interleaved"), (linear, "swizzled")):
        with pytest.raises(ValueError, match="KVBuffers: v_sf_layout is"):
            wrong.with_v_scales(layout)


B = buffers()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_layout": "HDN"}, "kv_layout is 'HDN'; allowed: 'NHD' or 'HND'"),
        ({"v_sf_layout": "swizzled"}, "v_sf_layout is 'swizzled'; allowed: 'linear' or 'interleaved'"),
        ({"v_sf_layout": "interleaved", "kv_layout": "NHD"}, "allowed: 'interleaved' only with 'HND'"),
        (
            {"v_sf_layout": "interleaved", **{n: getattr(B, n)[:, :, :6] for n in ("k", "v", "k_sf", "v_sf")}},
            "v_sf_layout is 'interleaved' with 'HND', pages of 6 and 8 scales a head; allowed",
        ),
        ({"scale_convention": "amax/6"}, "the scale convention is 'amax/6'; allowed: 'amax/2688' or 'amax/448'"),
        ({"k": B.k.float()}, r"k is torch.float32 on cpu; allowed: torch.uint8 on cpu"),
        ({"v_sf": B.v_sf.to("meta")}, r"v_sf is torch.uint8 on meta; allowed: torch.uint8 on cpu"),
        ({"k": B.k[0]}, r"k is of shape \(2, 8, 64\); allowed: 4 dimensions"),
        ({"v": B.v[:2]}, r"v is of shape \(2, 2, 8, 64\); allowed: \[3, 2, 8, ...\] as k"),
        ({"v": B.v[..., :32]}, r"v is of shape \(3, 2, 8, 32\); allowed: that of k"),
        ({"k_sf": B.k_sf[..., :7]}, r"k_sf is of 7 scales a head; allowed: whole blocks of head_dim 128"),
        ({"v_sf": B.v_sf[..., :4]}, r"v_sf is of shape \(3, 2, 8, 4\); allowed: that of k_sf"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        buffers(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_layout": "NHD"}, "trtllm: the buffers' kv_layout is 'NHD'; allowed: 'HND'"),
        ({"v_sf_layout": "linear"}, "v_sf_layout is 'linear'; allowed: 'interleaved'"),
        ({"scale_convention": "amax/2688"}, "scale_convention is 'amax/2688'; allowed: 'amax/448'"),
        ({"method": "mxfp4"}, "method is 'mxfp4'; allowed: 'nvfp4'"),
    ],
)
def test_the_wrong_reader_raises(change, message):
    wanted = {"method": "nvfp4", "kv_layout": "HND", "v_sf_layout": "interleaved", "scale_convention": "amax/448"}
    right = buffers().with_v_scales("interleaved")
    right.require("trtllm", **wanted)
    with pytest.raises(ValueError, match=message):
        replace(right, **{"v_sf_layout": "linear", **change} if "kv_layout" in change else change).require(
            "trtllm", **wanted
        )


def test_scales_convert_and_survive_a_file(tmp_path):
    pytest.importorskip("safetensors")
    scales = KVScales.from_amax(torch.tensor([5.0, 7.0]), torch.tensor([3.0, 0.1]))
    assert scales.convention == "amax/2688"
    assert torch.equal(scales.k, torch.tensor([5.0, 7.0]) / 2688)
    larger = scales.to_convention("amax/448")
    torch.testing.assert_close(larger.v, torch.tensor([3.0, 0.1]) / 448)
    torch.testing.assert_close(larger.to_convention("amax/2688").v, scales.v)
    larger.save(tmp_path / "kv.safetensors")
    read = KVScales.load(tmp_path / "kv.safetensors")
    assert read.convention == "amax/448"
    assert_same_bytes(read.k, larger.k)
    assert_same_bytes(read.v, larger.v)


def test_scales_of_a_checkpoint():
    tensors = {
        f"model.layers.{i}.self_attn.{kv}_proj.{kv}_scale": torch.tensor(0.001 * (i + 1 + 20 * (kv == "v")))
        for i in range(11)
        for kv in "vk"
    }
    tensors |= {"model.layers.3.mlp.weight_scale": torch.ones(4, 4), "model.layers.99.input_scale": torch.ones(1)}
    scales = KVScales.from_checkpoint(tensors)
    assert scales.convention == "amax/2688"
    torch.testing.assert_close(scales.k, torch.arange(1, 12) * 0.001)
    torch.testing.assert_close(scales.v, torch.arange(21, 32) * 0.001)
    del tensors["model.layers.4.self_attn.v_proj.v_scale"]
    with pytest.raises(ValueError, match="without 4.v_scale; allowed: one of each layer from 0 on"):
        KVScales.from_checkpoint(tensors)
    with pytest.raises(ValueError, match="without any k_scale or v_scale"):
        KVScales.from_checkpoint({"k_scale": torch.ones(1)})


def test_scales_of_a_checkpoint_that_mean_no_one_scale():
    names = [f"model.layers.0.self_attn.{kv}_proj.{kv}_scale" for kv in "kv"]
    tensors = dict.fromkeys(names, torch.ones(1))
    with pytest.raises(ValueError, match=r"both 'model.layers.0.*' and 'vision.layers.0.*'; allowed: one k_scale of"):
        KVScales.from_checkpoint(tensors | {"vision.layers.0.attn.k_scale": torch.ones(1)})
    with pytest.raises(ValueError, match=r"v_proj.v_scale'\] is of shape \(8,\); allowed: one element"):
        KVScales.from_checkpoint(tensors | {names[1]: torch.ones(8)})


def test_scales_that_are_none():
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"KVScales.from_amax: v_amax is \[1.0, 2.0\]; allowed: a tensor"):
        KVScales.from_amax(one, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"KVScales: k is 1.0; allowed: a float32 tensor"):
        KVScales(1.0, one, "amax/448")
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"KVScales.layer: layer_id is {layer}; allowed: 0 to 1"):
            KVScales(one, one, "amax/448").layer(layer)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_without_a_convention_is_refused(tmp_path, metadata):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"k_scales": torch.ones(2), "v_scales": torch.ones(2)}
    safetensors.save_file(tensors, tmp_path / "kv.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"allowed: k_scales and v_scales with a scale_convention"):
        KVScales.load(tmp_path / "kv.safetensors")


@pytest.mark.parametrize(
    ("k", "v", "convention", "message"),
    [
        (torch.ones(2), torch.ones(2), "2688/amax", "the scale convention is '2688/amax'"),
        (torch.ones(2).double(), torch.ones(2), "amax/448", "k is torch.float64"),
        (torch.ones(2, 1), torch.ones(2), "amax/448", r"k is torch.float32 of shape \(2, 1\); allowed"),
        (torch.ones(2), torch.tensor([1.0, 0.0]), "amax/448", r"v is \[1.0, 0.0\]; allowed: finite values above zero"),
        (torch.full((2,), 2.0**-128), torch.ones(2), "amax/448", "k is .*; allowed: .* with finite reciprocals"),
        (torch.ones(2), torch.ones(3), "amax/448", "v has 3 on cpu; allowed: as many as k, 2 on cpu"),
    ],
)
def test_wrong_scales(k, v, convention, message):
    with pytest.raises(ValueError, match=message):
        KVScales(k, v, convention)


def test_scales_of_parameters_and_of_one_tensor(tmp_path):
    pytest.importorskip("safetensors")
    names = [f"model.layers.{i}.self_attn.{kv}_proj.{kv}_scale" for i in range(2) for kv in "kv"]
    scales = KVScales.from_checkpoint({name: torch.nn.Parameter(torch.tensor(0.001)) for name in names})
    assert not scales.k.requires_grad and not scales.layer(1).v.requires_grad
    both = torch.tensor([[0.5, 0.25], [2.0, 4.0]])
    for k, v in (
        (both[0], both[0]),
        (both[0], both[1]),
        (both[:, 0], both[:, 1]),
        (torch.tensor(0.5).expand(2), both[0]),
    ):
        KVScales(k, v, "amax/448").save(tmp_path / "scales.safetensors")
        again = KVScales.load(tmp_path / "scales.safetensors")
        assert torch.equal(again.k, k) and torch.equal(again.v, v)


def test_buffers_that_are_no_tensors():
    with pytest.raises(ValueError, match="KVBuffers: v_sf is a NoneType; allowed: a tensor"):
        buffers(v_sf=None)
