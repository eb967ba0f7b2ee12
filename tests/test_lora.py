"""LoRA against PEFT and torch: training, adapters in both directions, what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llava_jax.config import Config, DataConfig, LoraConfig, OptimizerConfig, TuneConfig
from llava_jax.convert.adapter_export import TrainedAdapter, write_adapter
from llava_jax.convert.adapters import open_adapter
from llava_jax.convert.merging import merge
from llava_jax.convert.opening import open_model
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.optimizer import make_optimizer
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
    from transformers import LlavaForConditionalGeneration

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


def our_logits(model, leaves, batch) -> np.ndarray:
    graphdef, _ = abstract_model(model)

    def run(parameters):
        network = bind(graphdef, parameters)
        hidden = network(batch["tokens"], batch["images"], batch["positions"], batch["segment_ids"])
        return network.language_model.logits(hidden)

    return np.asarray(jax.jit(run)({name: jnp.asarray(value) for name, value in leaves.items()}))


def assert_same_logits(found, expected, batch, tolerance=1e-5):
    real = batch["segment_ids"] > 0
    assert relative_error(found[real], expected[real]) < tolerance


def as_trained_adapter(source, config, state) -> TrainedAdapter:
    leaves = {n: dataclasses.replace(leaf) for n, leaf in tuned(source, config).leaves.items()}
    for name, value in state.trainable.items():
        array = np.asarray(value)
        leaves[name] = dataclasses.replace(leaves[name], read=lambda array=array: array, axis=None)
    final = restored(dataclasses.replace(source, leaves=leaves), config)
    return TrainedAdapter(
        model=source.config,
        lora=config.lora,
        base="base",
        low_rank={
            own_name(n): (leaf, leaves[n.removesuffix(LORA_A) + LORA_B])
            for n, leaf in leaves.items()
            if n.endswith(f".{LORA_A}")
        },
        replaced={
            own_name(n): final.leaves[own_name(n)]
            for n in state.trainable
            if not n.endswith((LORA_A, LORA_B))
        },
        template="v1",
        image_aspect_ratio="pad",
    ), final


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


def test_training_takes_the_steps_of_peft_and_its_adapter_loads_there_with_equal_logits(base, tmp_path):
    source = open_model(base)
    config = make_config(source.config)
    parameters = start(source, config)
    batches = [make_batch(source.config, seed) for seed in range(NUM_STEPS)]
    losses, state = train(config, parameters, batches)

    theirs = peft_model(base)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.requires_grad_("lora_" in name or "multi_modal_projector" in name)
            if "lora_A" in name:
                layer, module = int(name.split(".layers.")[1].split(".")[0]), name.split(".")[-4:-3][0]
                leaf = next(n for n in parameters if n.endswith(f"{module}.lora_a"))
                parameter.copy_(torch.tensor(parameters[leaf][layer].T))
    groups = [
        {
            "params": [parameter],
            "lr": 5e-4 if "projector" in name else 2e-3,
            "weight_decay": 0.0 if name.endswith("bias") else 0.1,
        }
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    from transformers import get_cosine_schedule_with_warmup

    schedule = get_cosine_schedule_with_warmup(optimizer, 1, NUM_STEPS)
    expected = []
    for batch in batches:
        loss = hf_loss(theirs, batch, source.config.text.vocab_size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    np.testing.assert_allclose(losses, expected, rtol=1e-5)

    # Ours, written and loaded by PEFT alone; theirs, trained there; ours, merged: three ways to the same logits.
    adapter, merged = as_trained_adapter(source, config, state)
    write_adapter(tmp_path / "adapter", adapter, layout="peft-llava-hf")
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(load_hf(base), tmp_path / "adapter").eval()
    batch, vocabulary = batches[0], source.config.text.vocab_size
    logits = hf_logits(loaded, batch, vocabulary)
    assert_same_logits(logits, hf_logits(theirs.eval(), batch, vocabulary), batch, 1e-4)
    assert_same_logits(
        our_logits(source.config, {n: leaf.read() for n, leaf in merged.leaves.items()}, batch), logits, batch
    )
    opened = merge(open_model(base), open_adapter(tmp_path / "adapter"))
    assert_same_logits(
        our_logits(source.config, {n: leaf.read() for n, leaf in opened.leaves.items()}, batch), logits, batch
    )
    assert not np.allclose(logits, hf_logits(load_hf(base), batch, vocabulary), atol=1e-3)
