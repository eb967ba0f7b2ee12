"""LoRA against PEFT and torch: training, adapters in both directions, what it costs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, get_cosine_schedule_with_warmup

from llava_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    InitConfig,
    LoraConfig,
    OptimizerConfig,
    TuneConfig,
)
from llava_jax.convert.adapter_export import TrainedAdapter, write_adapter
from llava_jax.convert.adapters import open_adapter
from llava_jax.convert.merging import merge
from llava_jax.convert.opening import open_model
from llava_jax.convert.source import Leaf, ModelSource
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.models.lora import LoraLinear, dropout_keys
from llava_jax.optimizer import make_optimizer
from llava_jax.starting_adapters import with_adapters
from llava_jax.step import TrainState, abstract_model, abstract_tuned_model, bind, make_train_step
from llava_jax.tuned_weights import own_name, restored, tuned
from llava_jax.tuning import LORA_A, LORA_B, is_trainable
from tests.test_models import HF_IMAGE_TOKEN, llama, make_hf_model, make_rows, relative_error

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaVA as transformers saves it."""
    path = tmp_path_factory.mktemp("lora") / "base"
    make_hf_model(llama()).save_pretrained(path)
    return path


def load_hf(path):
    return LlavaForConditionalGeneration.from_pretrained(path, attn_implementation="eager").float().eval()


def make_config(model, **changes) -> Config:
    config = Config(
        model=model,
        data=DataConfig(max_length=128),
        tune=TuneConfig(language_model="lora"),
        lora=LoraConfig(rank=4, alpha=6.0, dropout=0.0),
        optimizer=OptimizerConfig(learning_rate=2e-3, projector_learning_rate=5e-4, weight_decay=0.1),
    )
    return dataclasses.replace(config, **changes)


def make_batch(model, seed=0):
    batch = make_rows(model.num_image_tokens, left=False)
    size = model.vision.image_size
    images = np.random.default_rng(seed).normal(size=(4, 2, size, size, 3)).astype(np.float32)
    return batch | {"images": images}


def hf_arguments(batch) -> dict[str, torch.Tensor]:
    used = [(0, 0), (0, 1), (2, 0), (3, 0)]  # the slots of make_rows that hold an image
    pixels = np.stack([batch["images"][i, j] for i, j in used]).transpose(0, 3, 1, 2)
    ids = np.where(batch["tokens"] == IMAGE_TOKEN, HF_IMAGE_TOKEN, batch["tokens"])
    return {
        "input_ids": torch.tensor(ids).long(),
        "pixel_values": torch.tensor(pixels),
        "attention_mask": torch.tensor(batch["segment_ids"]).long(),
        "position_ids": torch.tensor(batch["positions"]).long(),
    }


def hf_loss(model, batch, vocabulary):
    logits = model(**hf_arguments(batch)).logits[:, :-1, :vocabulary]
    labels = torch.tensor(batch["labels"][:, 1:]).long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def train(config, parameters, batches, **how):
    """The losses of some steps and the final state."""
    graphdef, shapes, keys = abstract_tuned_model(config)
    trainable = {n: jnp.asarray(v, jnp.float32) for n, v in parameters.items() if is_trainable(n, config)}
    frozen = {n: jnp.asarray(v) for n, v in parameters.items() if n not in trainable}
    assert parameters.keys() == shapes.keys()
    optimizer = make_optimizer(config.optimizer, len(batches))
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    step = jax.jit(make_train_step(graphdef, optimizer, config.loss, dropout=keys, **how))
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, {key: value[None] for key, value in batch.items()})
        losses.append(float(metrics["loss"]))
    return losses, state


def start(source, config) -> dict[str, np.ndarray]:
    return {name: leaf.read() for name, leaf in tuned(source, config).leaves.items()}


def hf_logits(model, batch, vocabulary) -> np.ndarray:
    with torch.no_grad():
        return model(**hf_arguments(batch)).logits[..., :vocabulary].numpy()


def network_logits(graphdef, parameters, batch) -> np.ndarray:
    def run(parameters):
        network = bind(graphdef, parameters)
        hidden = network(batch["tokens"], batch["images"], batch["positions"], batch["segment_ids"])
        return network.language_model.logits(hidden)

    return np.asarray(jax.jit(run)({name: jnp.asarray(value) for name, value in parameters.items()}))


def our_logits(source, batch) -> np.ndarray:
    graphdef, shapes = abstract_model(source.config)
    return network_logits(graphdef, {name: source.read(name) for name in shapes}, batch)


def open_merged(base, adapter):
    return merge(open_model(base), open_adapter(adapter))


def assert_same_logits(found, expected, batch, tolerance=1e-5):
    real = batch["segment_ids"] > 0
    assert relative_error(found[real], expected[real]) < tolerance


def as_trained_adapter(source, config, parameters) -> tuple[TrainedAdapter, ModelSource]:
    """What training made of `source`, as it would be written and merged."""
    leaves = {
        name: Leaf(value.shape, np.dtype(np.float32), lambda value=value: np.asarray(value))
        for name, value in parameters.items()
    }
    merged = restored(dataclasses.replace(source, leaves=leaves), config)
    pairs = [name for name in leaves if name.endswith(f".{LORA_A}")]
    whole = [n for n in leaves if is_trainable(n, config) and not n.endswith((LORA_A, LORA_B))]
    adapter = TrainedAdapter(
        model=source.config,
        lora=config.lora,
        base="base",
        low_rank={own_name(n): (leaves[n], leaves[n.removesuffix(LORA_A) + LORA_B]) for n in pairs},
        replaced={own_name(n): merged.leaves[own_name(n)] for n in whole},
        template="v1",
        image_aspect_ratio="pad",
    )
    return adapter, merged


def peft_model(path, **changes):
    peft = pytest.importorskip("peft")
    settings = dict(
        r=4,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=r".*language_model\..*_proj",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(load_hf(path), peft.LoraConfig(**settings | changes))


def loaded_by_peft(model, adapter):
    return pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter).eval()


def torch_steps(model, batches, vocabulary, *, rate, projector_rate, decay=0.1) -> list[float]:
    """The losses of AdamW steps on whatever requires a gradient; one step of warmup, then cosine."""
    groups = [
        {
            "params": [parameter],
            "lr": projector_rate if "projector" in name else rate,
            "weight_decay": 0.0 if name.endswith("bias") or "norm" in name else decay,
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, len(batches))
    losses = []
    for batch in batches:
        loss = hf_loss(model, batch, vocabulary)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_training_takes_the_steps_of_peft_and_the_adapter_loads_there_with_equal_logits(base, tmp_path):
    source = open_model(base)
    config, vocabulary = make_config(source.config), source.config.text.vocab_size
    parameters = start(source, config)
    batches = [make_batch(source.config, seed) for seed in range(NUM_STEPS)]
    losses, state = train(config, parameters, batches)

    theirs = peft_model(base)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.requires_grad_("lora_" in name or "multi_modal_projector" in name)
            if "lora_A" in name:  # ....layers.1.mlp.up_proj.lora_A.default.weight
                *_, layer, _, module, _, _, _ = name.split(".")
                (leaf,) = (leaf for leaf in parameters if leaf.endswith(f".{module}.{LORA_A}"))
                parameter.copy_(torch.tensor(parameters[leaf][int(layer)].T))
    expected = torch_steps(theirs, batches, vocabulary, rate=2e-3, projector_rate=5e-4)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)

    # Theirs, trained there; ours, written and loaded by PEFT alone; ours, merged; ours, written and merged.
    adapter, merged = as_trained_adapter(source, config, parameters | state.trainable)
    write_adapter(tmp_path / "adapter", adapter, layout="peft-llava-hf")
    batch = batches[0]
    logits = hf_logits(theirs.eval(), batch, vocabulary)
    loaded = loaded_by_peft(load_hf(base), tmp_path / "adapter")
    assert_same_logits(hf_logits(loaded, batch, vocabulary), logits, batch, 1e-4)
    assert_same_logits(our_logits(merged, batch), logits, batch, 1e-4)
    assert_same_logits(our_logits(open_merged(base, tmp_path / "adapter"), batch), logits, batch, 1e-4)
    with pytest.raises(AssertionError):
        assert_same_logits(hf_logits(load_hf(base), batch, vocabulary), logits, batch, 1e-2)


def test_partial_training_takes_the_steps_of_torch_with_the_rest_frozen(base):
    source = open_model(base)
    config = make_config(
        source.config,
        tune=TuneConfig(
            vision_tower="partial",
            vision_tower_layers="-1:",
            projector="partial",
            projector_layers=":1",
            language_model="partial",
            language_model_layers="1:",
            language_model_modules="lm_head, norm",
        ),
        lora=LoraConfig(),
    )
    batches = [make_batch(source.config, seed) for seed in range(NUM_STEPS)]
    losses, state = train(config, start(source, config), batches)

    theirs = load_hf(base)
    trained = ("vision_tower.encoder.layers.1.", "projector.linear_1", "language_model.layers.1.")
    for name, parameter in theirs.named_parameters():
        whole = name in ("lm_head.weight", "model.language_model.norm.weight")
        parameter.requires_grad_(whole or any(part in name for part in trained))
    count = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    padding = (
        theirs.lm_head.weight.shape[0] - source.config.text.vocab_size
    ) * source.config.text.hidden_size
    assert sum(value.size for value in state.trainable.values()) == count - padding
    vocabulary = source.config.text.vocab_size
    expected = torch_steps(theirs, batches, vocabulary, rate=2e-3, projector_rate=5e-4)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def with_random_b(parameters: dict) -> dict:
    generator = np.random.default_rng(0)
    return {
        name: generator.normal(size=value.shape).astype(np.float32) * 0.1 if name.endswith(LORA_B) else value
        for name, value in parameters.items()
    }


def test_adapters_in_every_module_survive_writing_and_change_the_network_as_when_merged(base, tmp_path):
    source = open_model(base)
    config = make_config(
        source.config,
        tune=TuneConfig(
            vision_tower="lora", projector="lora", language_model="lora", language_model_modules="norm"
        ),
        lora=LoraConfig(rank=3, alpha=5.0, dropout=0.3, rslora=True, language_model_target="v_proj,up_proj"),
    )
    parameters = with_random_b(start(source, config))
    batch, vocabulary = make_batch(source.config), source.config.text.vocab_size
    graphdef, _, _ = abstract_tuned_model(config, dropout=False)
    logits = network_logits(graphdef, parameters, batch)
    adapter, merged = as_trained_adapter(source, config, parameters)
    assert_same_logits(our_logits(merged, batch), logits, batch)
    for layout in ("peft", "peft-llava-hf"):
        write_adapter(tmp_path / layout, adapter, layout=layout)
        for name in merged.names():
            written = open_merged(base, tmp_path / layout).read(name)
            np.testing.assert_allclose(written, merged.read(name), rtol=1e-5, atol=1e-6, err_msg=name)
    loaded = loaded_by_peft(load_hf(base), tmp_path / "peft-llava-hf")
    assert_same_logits(hf_logits(loaded, batch, vocabulary), logits, batch)


def test_what_the_originals_loader_reads_beside_a_decoder(base, tmp_path):
    """builder.py loads non_lora_trainables.bin into the base, then lets PEFT merge the adapter."""
    source = open_model(base)
    config = make_config(source.config)
    parameters = with_random_b(start(source, config))
    adapter, merged = as_trained_adapter(source, config, parameters)
    write_adapter(tmp_path / "lora", adapter, layout="peft")
    assert {file.name for file in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "non_lora_trainables.bin",
    }
    others = torch.load(tmp_path / "lora/non_lora_trainables.bin", weights_only=True)
    prefix = "base_model.model.model.mm_projector."
    assert sorted(others) == [f"{prefix}{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    kernel = parameters["multi_modal_projector.linear_1.kernel"]
    assert torch.equal(others[f"{prefix}0.weight"], torch.tensor(kernel.T.copy()))
    fields = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], sorted(fields["target_modules"])) == (4, 6, sorted(LINEARS))
    assert json.loads((tmp_path / "lora/config.json").read_text())["model_type"] == "llava_llama"

    hf = load_hf(base)
    decoder = LlamaForCausalLM(hf.config.text_config).eval()
    decoder.model.load_state_dict(hf.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(hf.lm_head.state_dict())
    decoder = loaded_by_peft(decoder, tmp_path / "lora").merge_and_unload()
    tokens = np.arange(3, 12, dtype=np.int32)[None]
    size = source.config.vision.image_size
    batch = {
        "tokens": tokens,
        "images": np.zeros((1, 0, size, size, 3), np.float32),
        "positions": np.arange(9, dtype=np.int32)[None],
        "segment_ids": np.ones_like(tokens),
    }
    with torch.no_grad():
        logits = decoder(torch.tensor(tokens).long()).logits[..., : source.config.text.vocab_size].numpy()
    assert_same_logits(our_logits(merged, batch), logits, batch)


def test_all_is_what_the_original_finds_in_the_decoder(base):
    """find_all_linear_names of llava/train/train.py: the last words of torch.nn.Linear layers, without lm_head."""
    skipped = ("projector", "vision_tower", "vision_resampler")
    found = {
        name.split(".")[-1]
        for name, module in load_hf(base).named_modules()
        if isinstance(module, torch.nn.Linear) and not any(word in name for word in skipped)
    } - {"lm_head"}
    config = make_config(open_model(base).config)
    adapted = {n.split(".")[-2] for n in abstract_tuned_model(config)[1] if n.endswith(LORA_A)}
    assert adapted == found == set(LINEARS)


def dots(jaxpr) -> list[tuple[tuple[int, ...], int]]:
    """The shape and the floating-point operations of every matrix product, those in loops as often as they run."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            (shape,) = (out.aval.shape for out in equation.outvars)
            size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            found.append((shape, 2 * math.prod(shape) * size))
        inner = [jaxpr for jaxpr in jax.tree.leaves(list(equation.params.values())) if hasattr(jaxpr, "eqns")]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for jaxpr_ in inner:
            found += times * dots(getattr(jaxpr_, "jaxpr", jaxpr_))
    return found


def test_no_gradient_of_a_frozen_kernel_is_computed(base):
    source = open_model(base)
    batch = make_batch(source.config)

    def products(config):
        parameters = {n: jnp.asarray(v) for n, v in start(source, config).items()}
        trainable = {n: v for n, v in parameters.items() if is_trainable(n, config)}
        frozen = {n: v for n, v in parameters.items() if n not in trainable}
        optimizer = make_optimizer(config.optimizer, 4)
        state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
        step = make_train_step(abstract_tuned_model(config)[0], optimizer, config.loss)
        step = jax.make_jaxpr(step)(state, frozen, {key: value[None] for key, value in batch.items()})
        return dots(step.jaxpr)

    with_lora = products(make_config(source.config))
    without = products(
        make_config(
            source.config,
            tune=TuneConfig(language_model="frozen"),
            lora=LoraConfig(),
            optimizer=OptimizerConfig(),
        )
    )
    text = source.config.text
    D, F, rank, layers = text.hidden_size, text.intermediate_size, 4, text.num_hidden_layers
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    sizes = [(D, queries), (D, keys), (D, keys), (queries, D), (D, F), (D, F), (F, D)]
    # Forward, and backward to the input and to both factors: each pair costs three times its forward pass.
    tokens = batch["tokens"].size
    expected = 3 * layers * sum(2 * tokens * rank * (inputs + outputs) for inputs, outputs in sizes)
    assert sum(flops for _, flops in with_lora) - sum(flops for _, flops in without) == expected
    assert not {shape for shape, _ in with_lora} & {(D, F), (F, D), (D, keys)}
    full = products(make_config(source.config, tune=TuneConfig(), lora=LoraConfig()))
    assert {shape for shape, _ in full} & {(D, F), (F, D)}


def test_dropout_zeroes_its_share_and_scales_the_rest():
    layer = LoraLinear(nnx.Linear(512, 512, rngs=nnx.Rngs(0)), rank=512, scale=3.0, dropout=0.25)
    layer.kernel[...] = jnp.zeros((512, 512))
    layer.lora_a[...] = layer.lora_b[...] = jnp.eye(512)
    found = np.asarray(layer(jnp.full((40, 512), 2.0)))
    np.testing.assert_allclose(np.unique(found), [0.0, 2.0 / 0.75 * 3.0], rtol=1e-6)
    assert np.mean(found == 0) == pytest.approx(0.25, abs=0.01)


def test_dropout_scales_in_float32():
    layer = LoraLinear(nnx.Linear(128, 128, rngs=nnx.Rngs(0)), rank=128, scale=1.0, dropout=0.05)
    layer.dtype = jnp.bfloat16
    layer.kernel[...] = jnp.zeros((128, 128))
    layer.lora_a[...] = layer.lora_b[...] = jnp.eye(128)
    values = 1 + np.arange(128, dtype=np.float32) / 128  # all of bfloat16 from 1 to 2
    rows = np.tile(values, (64, 1))  # each is kept in some
    found = np.asarray(layer(jnp.asarray(rows, jnp.bfloat16)), np.float32).max(axis=0)
    # Rounded once; 0.95 in bfloat16 would make the branch 0.08 % larger in training than afterwards.
    np.testing.assert_array_equal(found, (values.astype(np.float64) / 0.95).astype(jnp.bfloat16))


def test_every_layer_of_every_microbatch_of_every_step_drops_other_inputs(base):
    config = make_config(open_model(base).config, lora=LoraConfig(rank=4, dropout=0.5))
    shapes = abstract_tuned_model(config)[2]
    assert {leaf.shape for leaf in shapes.values()} == {(2,)} and len(shapes) == len(LINEARS)
    keys = [dropout_keys(shapes, jax.random.key(number)) for number in range(3)]
    words = np.concatenate([jax.random.key_data(key) for some in keys for key in some.values()])
    assert len(np.unique(words, axis=0)) == 3 * len(LINEARS) * 2
    assert abstract_tuned_model(config, dropout=False)[2] == {}


def test_dropout_is_a_function_of_seed_and_step(base):
    source = open_model(base)
    config = make_config(source.config, lora=LoraConfig(rank=4, dropout=0.5, target="down_proj"))
    parameters = {name: jnp.asarray(value) for name, value in with_random_b(start(source, config)).items()}
    batch = {key: value[None].repeat(2, axis=0) for key, value in make_batch(source.config).items()}
    graphdef, _, keys = abstract_tuned_model(config)
    trainable = {n: v for n, v in parameters.items() if is_trainable(n, config)}
    frozen = {n: v for n, v in parameters.items() if n not in trainable}
    optimizer = make_optimizer(config.optimizer, 4)
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))

    def loss(step, state):
        return float(step(state, frozen, batch)[1]["loss"])

    step = jax.jit(make_train_step(graphdef, optimizer, config.loss, dropout=keys, seed=1))
    later = dataclasses.replace(state, step=jnp.int32(1))
    assert loss(step, state) == loss(step, state) != loss(step, later)
    draws = [make_train_step(graphdef, optimizer, config.loss, dropout=keys, seed=seed) for seed in (1, 2)]
    programs = [str(jax.make_jaxpr(step)(state, frozen, batch)) for step in draws]
    assert programs[0] != programs[1]  # the seed is a constant of the program


def peft_adapter(base, directory, seed, **changes):
    """An adapter that PEFT made, with random factors."""
    model = peft_model(base, **changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    return directory


def test_adapters_are_merged_in_order_and_the_last_is_trained_further(base, tmp_path):
    first = peft_adapter(base, tmp_path / "first", 1, r=2, target_modules=r".*language_model.*\.v_proj")
    second = peft_adapter(base, tmp_path / "second", 2)
    source = open_model(base)
    init = InitConfig(model=str(base), adapters=f"{first}, {second}")
    expected = merge(merge(source, open_adapter(first)), open_adapter(second))
    config = make_config(source.config, init=init)
    continued = tuned(with_adapters(source, config), config)
    a = continued.read(f"language_model.layers.mlp.up_proj.{LORA_A}")
    stored = load_file(second / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"
    np.testing.assert_array_equal(a[1], stored[name].numpy().T)
    assert_close_leaves(restored(continued, config), expected)

    new = make_config(source.config, init=init, lora=LoraConfig(rank=8, create_new_adapter=True))
    assert_close_leaves(restored(tuned(with_adapters(source, new), new), new), expected)
    full = make_config(source.config, init=init, tune=TuneConfig(), lora=LoraConfig())
    assert_close_leaves(with_adapters(source, full), expected)


def assert_close_leaves(found, expected):
    assert set(found.names()) == set(expected.names())
    for name in expected.names():
        np.testing.assert_allclose(found.read(name), expected.read(name), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8, "alpha": 12.0}, "has rank 4 and scale 1.5 .*trains rank 8 and scale 1.5"),
        ({"rank": 4, "alpha": 8.0}, "has rank 4 and scale 1.5 .*trains rank 4 and scale 2"),
        ({"rank": 4, "alpha": 6.0, "target": "q_proj"}, r"and 11 more, which lora\.\*target does not name"),
    ],
)
def test_an_adapter_that_the_run_cannot_train_further_is_refused(base, tmp_path, lora, message):
    adapter = peft_adapter(base, tmp_path / "a", 0)
    source = open_model(base)
    init = InitConfig(model=str(base), adapters=str(adapter))
    config = make_config(source.config, init=init, lora=LoraConfig(**lora))
    with pytest.raises(ConfigError, match=message):
        with_adapters(source, config)
