"""LoRA adapters as PEFT writes them, merged against products in float64."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llava_jax.convert.adapter_names import parse, spell_low_rank, spell_replaced, spell_wrapped
from llava_jax.convert.adapters import open_adapter
from llava_jax.convert.description import describe
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.merging import describe_changes, merge
from llava_jax.convert.names import model_rows
from llava_jax.convert.opening import open_model, read_model
from tests.test_convert_layouts import components
from tests.tiny_models import (
    DECODERS,
    VISION,
    as_original,
    assert_same_leaves,
    randomized,
    save_clip,
    save_llava,
)

PREFIX = "base_model.model."
LAYER = "language_model.model.layers.{}."  # as llava-hf spells it
KINDS = [f"self_attn.{letter}_proj" for letter in "qkvo"] + [
    f"mlp.{kind}_proj" for kind in ("gate", "up", "down")
]


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf")


@pytest.fixture(scope="module")
def stored(llava_hf) -> dict[str, torch.Tensor]:
    return load_file(llava_hf / "model.safetensors")


def factors(shapes: dict[str, tuple[int, int]], rank: int) -> dict[str, torch.Tensor]:
    """Drawn A and B for linear layers by name; shapes [out, in]."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return tensors


def save_adapter(directory: Path, tensors: dict, others: dict | None = None, **settings) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    if others:
        save_file(others, directory / "non_lora_trainables.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "megatron_core": "megatron.core"}
    (directory / "adapter_config.json").write_text(json.dumps(fields | settings))
    return directory


def shapes_of(stored, *names) -> dict[str, tuple[int, int]]:
    return {name: tuple(stored[f"{name}.weight"].shape) for name in names}


def delta(tensors, name: str, scale: float) -> np.ndarray:
    a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].double().numpy() for side in "AB")
    return scale * (b @ a)


def test_all_linear_layers_are_merged_and_nothing_else(llava_hf, stored, tmp_path):
    names = [LAYER.format(layer) + kind for layer in (0, 1) for kind in KINDS]
    tensors = factors(shapes_of(stored, *names), rank=4)
    merged = merge(open_model(llava_hf), open_adapter(save_adapter(tmp_path / "a", tensors)))
    base = open_model(llava_hf)
    for kind in KINDS:
        leaf = f"language_model.layers.{kind}.kernel"
        expected = np.stack(
            [
                (stored[f"{name}.weight"].double().numpy() + delta(tensors, name, 6 / 4)).T
                for name in (LAYER.format(0) + kind, LAYER.format(1) + kind)
            ]
        )
        np.testing.assert_allclose(merged.read(leaf), expected, rtol=2e-6, atol=2e-6)
        assert not np.allclose(merged.read(leaf), base.read(leaf))
    changed = {f"language_model.layers.{kind}.kernel" for kind in KINDS}
    for name in base.names():
        if name not in changed:
            np.testing.assert_array_equal(merged.read(name), base.read(name))
    assert (merged.config, merged.idle.keys()) == (base.config, base.idle.keys())


def test_ranks_and_scales_follow_the_patterns(llava_hf, stored, tmp_path):
    """The first pattern that fits the end of a layer's name counts, as in PEFT."""
    q, v, up = (LAYER.format(1) + kind for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
    tensors = (
        factors(shapes_of(stored, q), 4)
        | factors(shapes_of(stored, v), 3)
        | factors(shapes_of(stored, up), 2)
    )
    settings = {
        "rank_pattern": {"v_proj": 3, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"mlp": 99, "self_attn.v_proj": 12, "v_proj": 99, "proj": 99, "(q|up)_proj": 7},
    }
    for rslora, scales in (
        (False, {q: 7 / 4, v: 4.0, up: 7 / 2}),
        (True, {q: 3.5, v: 12 / 3**0.5, up: 7 / 2**0.5}),
    ):
        adapter = open_adapter(save_adapter(tmp_path / str(rslora), tensors, use_rslora=rslora, **settings))
        merged = merge(open_model(llava_hf), adapter)
        for name, scale in scales.items():
            leaf = "language_model.layers." + name.removeprefix(LAYER.format(1)) + ".kernel"
            expected = (stored[f"{name}.weight"].double().numpy() + delta(tensors, name, scale)).T
            np.testing.assert_allclose(merged.read(leaf)[1], expected, rtol=2e-6, atol=2e-6)


def test_a_low_precision_base_is_rounded_once(tmp_path):
    base = save_llava(tmp_path / "base", dtype=torch.bfloat16)
    stored = load_file(base / "model.safetensors")
    name = LAYER.format(0) + "mlp.down_proj"
    tensors = {key: tensor.bfloat16() for key, tensor in factors(shapes_of(stored, name), 4).items()}
    merged = merge(open_model(base), open_adapter(save_adapter(tmp_path / "a", tensors)))
    found = merged.read("language_model.layers.mlp.down_proj.kernel")
    assert found.dtype.name == "bfloat16"
    exact = torch.from_numpy(stored[f"{name}.weight"].double().numpy() + delta(tensors, name, 6 / 4))
    np.testing.assert_array_equal(found[0].astype(np.float32), exact.bfloat16().float().numpy().T)


def test_what_float16_cannot_hold_is_an_error(tmp_path):
    base = save_llava(tmp_path / "base", dtype=torch.float16)
    name = LAYER.format(0) + "mlp.down_proj"
    tensors = factors(shapes_of(load_file(base / "model.safetensors"), name), 4)
    adapter = save_adapter(tmp_path / "a", tensors, lora_alpha=1e6)
    with pytest.raises(
        ConversionError, match=r"layers\.0\.mlp\.down_proj\.weight.*beyond the range of float16"
    ):
        merge(open_model(base), open_adapter(adapter)).read("language_model.layers.mlp.down_proj.kernel")


def test_trained_biases_and_whole_modules_take_the_place_of_the_base(llava_hf, stored, tmp_path):
    name = LAYER.format(0) + "self_attn.q_proj"
    new = {
        f"{PREFIX}multi_modal_projector.linear_1.weight": torch.full((24, 16), 2.0),
        f"{PREFIX}multi_modal_projector.linear_1.modules_to_save.default.bias": torch.full((24,), 3.0),
        f"{PREFIX}vision_tower.encoder.layers.0.mlp.fc1.base_layer.bias": torch.full((26,), 4.0),
        f"{PREFIX}language_model.lm_head.weight": torch.full((99, 24), 5.0),
    }
    adapter = open_adapter(save_adapter(tmp_path / "a", factors(shapes_of(stored, name), 4) | new))
    merged = merge(open_model(llava_hf), adapter)
    assert (merged.read("multi_modal_projector.linear_1.kernel") == 2).all()
    assert (merged.read("multi_modal_projector.linear_1.bias") == 3).all()
    assert (merged.read("vision_tower.layers.mlp.fc1.bias")[0] == 4).all()
    assert (merged.read("vision_tower.layers.mlp.fc1.bias")[1] != 4).all()
    head = merged.read("language_model.lm_head.kernel")
    assert head.shape == (24, 90) and (head == 5).all()
    rows = merged.set_aside()["language_model.lm_head.weight"]  # of <image> and what pads the vocabulary
    assert rows.shape == (9, 24) and (rows == 5).all()


def test_embeddings_have_their_factors_the_other_way_round(llava_hf, stored, tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 99, generator=generator), torch.randn(24, 4, generator=generator)
    name = f"{PREFIX}language_model.model.embed_tokens"
    tensors = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    merged = merge(open_model(llava_hf), open_adapter(save_adapter(tmp_path / "a", tensors)))
    old = stored["language_model.model.embed_tokens.weight"].double()
    expected = (old + 1.5 * (b.double() @ a.double()).T).numpy()
    found = merged.read("language_model.embed_tokens.embedding")
    np.testing.assert_allclose(found, expected[:90], rtol=2e-6, atol=2e-6)
    rows = merged.set_aside()["language_model.embed_tokens.weight"]
    np.testing.assert_allclose(rows, expected[90:], rtol=2e-6, atol=2e-6)


def test_an_adapter_that_reaches_into_clip_is_merged_there_and_says_so(llava_hf, stored, tmp_path):
    """PEFT finds q_proj in the tower too; its last layer is not run but stays part of the model."""
    names = [f"vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(4)]
    tensors = factors(shapes_of(stored, *names), 4)
    adapter = open_adapter(save_adapter(tmp_path / "a", tensors))
    assert describe_changes(adapter) == [
        "vision_tower: 1 arrays with LoRA, 0 replaced",  # of all four layers
        "note: the adapter reaches into the vision tower, which is merged as well",
    ]
    merged = merge(open_model(llava_hf), adapter)
    for layer, name in enumerate(names):
        expected = stored[f"{name}.weight"].double().numpy() + delta(tensors, name, 1.5)
        if layer < 3:
            found = merged.read("vision_tower.layers.self_attn.q_proj.kernel")[layer].T
        else:
            found = merged.set_aside()[f"{name}.weight"]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def original_adapter(llava_hf, stored, directory: Path, wrapped: str = PREFIX, **settings):
    """What the original's LoRA run leaves: LoRA on the decoder, the projector beside, its config.json."""
    names = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    shapes = {name: tuple(stored[f"language_model.{name}.weight"].shape) for name in names}
    projector = {
        f"{wrapped}model.mm_projector.{2 * i - 2}.{kind}": stored[f"multi_modal_projector.linear_{i}.{kind}"]
        + 1
        for i in (1, 2)
        for kind in ("weight", "bias")
    }
    save_adapter(directory, factors(shapes, 4), projector, **settings)
    original = as_original(llava_hf, directory / "x", tower=False)
    (directory / "config.json").write_text((original / "config.json").read_text())
    return directory


@pytest.mark.parametrize("wrapped", [PREFIX, "base_model.model.model.", ""])
def test_an_adapter_of_the_original_makes_its_decoder_a_llava(wrapped, llava_hf, stored, tmp_path):
    decoder = LlamaForCausalLM(DECODERS["gqa"])
    randomized(decoder).save_pretrained(tmp_path / "vicuna")
    save_clip(tmp_path / "clip", llava_hf)
    adapter = open_adapter(original_adapter(llava_hf, stored, tmp_path / "lora", wrapped))
    merged = merge(open_model(tmp_path / "vicuna"), adapter)
    assert merged.config.projector_type == "mlp2x_gelu" and merged.image_aspect_ratio == "pad"
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    llm = decoder.state_dict()
    for i in (0, 1):
        name = f"model.layers.{i}.self_attn.o_proj"
        expected = (llm[f"{name}.weight"].double().numpy() + delta(tensors, name, 1.5)).T
        found = merged.read("language_model.layers.self_attn.o_proj.kernel")[i]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(
        merged.read("multi_modal_projector.linear_2.kernel"),
        (stored["multi_modal_projector.linear_2.weight"] + 1).T,
    )
    np.testing.assert_array_equal(
        merged.read("vision_tower.class_embedding"), stored["vision_tower.embeddings.class_embedding"]
    )
    assert len(merged.set_aside()) == 18


def test_an_adapter_directory_opens_with_the_base_that_it_names(llava_hf, stored, tmp_path):
    base = as_original(llava_hf, tmp_path / "llava", tower=True, vision_config=VISION)
    adapter = original_adapter(llava_hf, stored, tmp_path / "lora", base_model_name_or_path=str(base))
    merged = open_model(adapter)
    assert merged.layout == "merged"
    assert_same_leaves(merged, merge(open_model(base), open_adapter(adapter)))


def test_the_base_that_an_adapter_names_may_be_a_repository(llava_hf, stored, tmp_path, monkeypatch):
    base = as_original(llava_hf, tmp_path / "llava", tower=True, vision_config=VISION)
    adapter = original_adapter(llava_hf, stored, tmp_path / "lora", base_model_name_or_path="org/llava")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path / name[4:]))
    assert_same_leaves(open_model(adapter), merge(open_model(base), open_adapter(adapter)))


@pytest.mark.parametrize(
    "base, message",
    [
        (
            "org/gone",
            r"without its base: org/gone does not exist here, .* Or merge them with .*merge-lora BASE",
        ),
        (
            "./gone",
            r"without its base: gone does not exist\. .*ORG/NAME.* Or merge them with .*merge-lora BASE",
        ),
        ("", r"names no base that is a model; merge them with .*merge-lora BASE"),
    ],
)
def test_an_adapter_without_its_base_is_told_how_to_merge(
    base, message, llava_hf, stored, tmp_path, monkeypatch
):
    def unreachable(*arguments, **options):
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    adapter = original_adapter(llava_hf, stored, tmp_path / "lora", base_model_name_or_path=base)
    with pytest.raises(ConversionError, match=message):
        open_model(adapter)


def test_components_with_an_adapter_beside_them_open_merged(llava_hf, stored, tmp_path):
    """TinyLLaVA Factory's LoRA runs keep the base's parts and the adapter in one directory."""
    directory = components(llava_hf, tmp_path / "run", wrapped="q_proj")
    names = [f"language_model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    tensors = factors(shapes_of(stored, *names), 4)
    save_adapter(directory, tensors)
    merged = open_model(directory)
    for i, name in enumerate(names):
        expected = (stored[f"{name}.weight"].double().numpy() + delta(tensors, name, 1.5)).T
        found = merged.read("language_model.layers.self_attn.q_proj.kernel")[i]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_setting_of_the_future": 1}, "a_setting_of_the_future=1"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"r": 8}, r"do not have the rank 8"),
        ({"r": None}, "neither r nor lora_alpha"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(settings, message, stored, tmp_path):
    tensors = factors(shapes_of(stored, LAYER.format(0) + "self_attn.q_proj"), 4)
    with pytest.raises(ConversionError, match=message):
        open_adapter(save_adapter(tmp_path / "a", tensors, **settings))


def test_training_settings_are_no_obstacle(stored, tmp_path):
    """`fan_in_fan_out` too: PEFT sets it back for linear layers."""
    tensors = factors(shapes_of(stored, LAYER.format(0) + "self_attn.q_proj"), 4)
    settings = {"lora_dropout": 0.1, "fan_in_fan_out": True, "task_type": "CAUSAL_LM", "use_dora": False}
    assert open_adapter(save_adapter(tmp_path / "a", tensors, **settings)).low_rank


def test_broken_adapters_name_the_tensor(llava_hf, stored, tmp_path):
    name = LAYER.format(0) + "self_attn.q_proj"
    good = factors(shapes_of(stored, name), 4)
    a, _ = good
    empty = torch.empty(0)
    for number, (tensors, message) in enumerate(
        (
            ({a: good[a]}, r"q_proj\.lora_A\.weight without its other half"),
            (good | {a: empty}, r"lora_A\.weight has shape \[0\].*ZeRO-3"),
            (good | {f"{PREFIX}{name}.lora_magnitude_vector": torch.ones(40)}, "lora_magnitude_vector"),
            ({"model.mm_projector.0.bias": torch.ones(24)}, "holds no LoRA tensors"),
            (factors({LAYER.format(7) + "self_attn.q_proj": (40, 24)}, 4), r"does not have.*layers\.7"),
            (factors({name: (41, 24)}, 4), r"another shape.*q_proj\.weight \[41, 24\] instead of \[40, 24\]"),
        )
    ):
        directory = save_adapter(tmp_path / str(number), tensors)
        with pytest.raises(ConversionError, match=message):
            merge(open_model(llava_hf), open_adapter(directory))
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"no adapter_model\.safetensors or \.bin"):
        open_adapter(directory)


def test_a_lora_of_a_tied_head_is_refused(tmp_path):
    base = save_llava(tmp_path / "tied", "tied")
    adapter = save_adapter(tmp_path / "a", factors({"language_model.lm_head": (99, 24)}, 4))
    with pytest.raises(ConversionError, match=r"does not have \(language_model\.lm_head\.weight\)"):
        merge(open_model(base), open_adapter(adapter))


@pytest.mark.parametrize("layout", ["llava", "llava-hf", "tinyllava"])
def test_names_are_written_as_they_are_read(layout, llava_hf):
    rows = model_rows(open_model(llava_hf).config)
    for row in rows:
        for tensor in row.tensors:
            assert parse(spell_replaced(tensor, layout), layout).tensor == tensor
            if row.leaf.endswith(".kernel") and len(row.tensor_shape) == 2:
                a, b = (parse(name, layout) for name in spell_low_rank(tensor, layout))
                assert (a.tensor, a.side, b.tensor, b.side) == (tensor, "A", tensor, "B")
                assert f"{a.module}.weight" == spell_wrapped(tensor, layout)
    assert spell_low_rank("language_model.layers.3.mlp.up_proj.weight", "llava") == (
        "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight",
    )


def test_a_description_of_an_adapter_says_rank_scale_and_base(llava_hf, stored, tmp_path):
    name = LAYER.format(0) + "self_attn.q_proj"
    directory = save_adapter(
        tmp_path / "a",
        factors(shapes_of(stored, name), 4),
        base_model_name_or_path="liuhaotian/llava-v1.5-7b",
    )
    found = describe(read_model(directory))
    assert found.as_json() == {
        "layout": "adapter",
        "base": "liuhaotian/llava-v1.5-7b",
        "wrapped_layout": "llava-hf",
        "low_rank": {"language_model.layers.0.self_attn.q_proj.weight": {"rank": 4, "scale": 1.5}},
        "replaced": [],
        "notes": ["language_model: 1 arrays with LoRA, 0 replaced"],
    }
    assert "q_proj.weight: rank 4, scale 1.5\n" in found.as_text()


def test_a_part_of_a_merged_leaf_is_that_part_of_the_whole(llava_hf, stored, tmp_path):
    names = [LAYER.format(i) + "mlp.up_proj" for i in (0, 1)] + ["language_model.lm_head"]
    tensors = factors(shapes_of(stored, *names), 4)
    tensors[f"{PREFIX}multi_modal_projector.linear_1.weight"] = torch.randn(24, 16)
    base = open_model(llava_hf)
    parts = {
        "language_model.layers.mlp.up_proj.kernel": (slice(1, 2), slice(3, 20), slice(5, None)),
        "language_model.lm_head.kernel": (slice(2, 24), slice(7, 70)),
        "multi_modal_projector.linear_1.kernel": (slice(None), slice(0, 9)),
    }
    leaves = {
        name: dataclasses.replace(leaf, read=lambda index=(), leaf=leaf: leaf.read()[index])
        for name, leaf in base.leaves.items()
    }
    adapter = open_adapter(save_adapter(tmp_path / "a", tensors))
    merged = merge(dataclasses.replace(base, leaves=leaves), adapter)
    for name, index in parts.items():
        whole = merged.read(name)
        assert not np.array_equal(whole, base.read(name))
        np.testing.assert_allclose(merged.leaves[name].read(index), whole[index], rtol=1e-6, atol=1e-6)
