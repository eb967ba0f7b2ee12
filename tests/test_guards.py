"""What would train nothing, or something else than was meant, is refused at the start with what to change."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from llava_jax import trainer
from llava_jax.convert.opening import open_model
from llava_jax.convert.ours import write_model
from llava_jax.convert.projector_file import write_projector
from llava_jax.convert.source import Leaf
from llava_jax.errors import ConfigError
from llava_jax.recipe import parse
from llava_jax.weights import initial_weights
from tests.test_trainer import one_device  # noqa: F401 (a fixture)
from tests.tiny_models import export, random_source
from tests.tiny_recipe import get_config as tiny_recipe_of


@pytest.fixture
def weights(tiny_model):
    return open_model(tiny_model)


def held(array) -> Leaf:
    return Leaf(array.shape, array.dtype, lambda index=(): array[index], axis=0)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"language_model": "frozen"}, r"what trains \(projector\) and every gradient would be 0: name data"),
        ({"vision_tower": "full", "language_model": "frozen"}, r"\(vision_tower and projector\)"),
    ],
)
def test_a_projector_cannot_learn_from_text_alone(tiny_recipe, tmp_path, tune, message):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": turns}] * 8))
    tiny_recipe.data.path = str(tmp_path / "text.json")
    tiny_recipe.tune.update(tune)
    with pytest.raises(ConfigError, match=message):
        trainer.run(parse(tiny_recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gradients_that_are_exactly_0_end_the_run_at_its_first_step(tiny_recipe, weights, tmp_path):
    head = "language_model.lm_head.kernel"
    dead = weights.with_leaves({head: held(np.zeros(weights.shape(head), np.float32))})
    write_model(tmp_path / "dead", dead)
    tiny_recipe.init.model = str(tmp_path / "dead")
    tiny_recipe.tune.update(language_model="frozen")
    tiny_recipe.train.log_steps = 100  # rows are told later
    with pytest.raises(ConfigError, match=r"All gradients of the run are exactly 0 .* with a loss of 6\.238"):
        trainer.run(parse(tiny_recipe), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"projector_type": "linear"}, r"Add --config\.model\.projector_type=linear\."),
        ({"projector_type": "mlp3x_gelu"}, r"Add --config\.model\.projector_type=mlp3x_gelu\."),
        ({}, "with another tower or decoder: name that projector, or leave init.projector empty"),
    ],
)
def test_a_projector_of_another_shape_is_answered_with_what_it_is(
    tiny_recipe, weights, tmp_path, changes, cure
):
    model = weights.config
    if not changes:
        model, _ = random_source()
    _, arrays = random_source(**{"vision": model.vision, "text": model.text} | changes)
    other = dataclasses.replace(
        weights, config=dataclasses.replace(model, **changes), leaves={n: held(a) for n, a in arrays.items()}
    )
    write_projector(tmp_path / "projector.safetensors", other)
    tiny_recipe.init.projector = str(tmp_path / "projector.safetensors")
    with pytest.raises(ConfigError, match=cure):
        initial_weights(parse(tiny_recipe).first)


@pytest.fixture
def learnt(weights, tmp_path):
    """Writes a model that has learnt a template and returns its directory."""

    def write(template: str, layout: str) -> str:
        source = dataclasses.replace(weights, template=template)
        if layout == "ours":
            write_model(tmp_path / template, source)
        else:
            export(source, tmp_path / template, layout)
        return str(tmp_path / template)

    return write


@pytest.mark.parametrize("layout", ["ours", "llava"])
def test_a_template_that_the_model_has_not_learnt_is_refused(tiny_recipe, learnt, layout):
    tiny_recipe.init.model = learnt("mpt", layout)
    message = (
        r"has learnt the conversation template 'mpt'.*data\.template='v1'; add --config\.data\.template=mpt"
    )
    with pytest.raises(ConfigError, match=message):
        initial_weights(parse(tiny_recipe).first)
    for template, change in (("chatml_direct", False), ("plain", False), ("v1", True)):
        tiny_recipe.data.template = template  # of which the first differs in the system text alone
        tiny_recipe.init.change_template = change
        assert initial_weights(parse(tiny_recipe).first).template == template


def test_a_decoder_alone_says_what_it_has_learnt_too(tiny_recipe, learnt):
    tiny_recipe.init.language_model = learnt("mpt", "llama")
    with pytest.raises(
        ConfigError, match=r"init\.language_model=.* has learnt the conversation template 'mpt'"
    ):
        initial_weights(parse(tiny_recipe).first)
    tiny_recipe.data.template = "mpt"
    assert initial_weights(parse(tiny_recipe).first).template == "mpt"


def test_a_model_that_says_nothing_of_its_template_or_knows_captions_only_takes_any(tiny_recipe, learnt):
    tiny_recipe.init.model = learnt("plain", "ours")
    tiny_recipe.data.template = "llava_v0"
    assert initial_weights(parse(tiny_recipe).first).template == "llava_v0"
    tiny_recipe.init.model = learnt("mpt", "llava")
    file = Path(tiny_recipe.init.model) / "config.json"
    fields = json.loads(file.read_text())
    del fields["conversation_template"]
    file.write_text(json.dumps(fields))
    assert initial_weights(parse(tiny_recipe).first).template == "llava_v0"


def test_a_change_of_template_needs_a_model():
    recipe = tiny_recipe_of("nowhere")
    recipe.init.change_template = True
    with pytest.raises(ConfigError, match=r"init\.change_template is about .* neither is named; drop it"):
        parse(recipe)
