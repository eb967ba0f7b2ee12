"""Every name that people bring along is answered, and no setting of ours goes unread."""

import ast
import dataclasses
import pkgutil
import re
import typing
from pathlib import Path

import pytest

from llava_jax.config import (
    ATTENTIONS,
    CLIP,
    OPTIMIZERS,
    REPORTERS,
    SCHEDULES,
    SIGLIP,
    TUNE_MODES,
    Config,
    ConfigError,
    OptimizerConfig,
    TrainConfig,
)
from llava_jax.config_values import build, meant, wrong_type
from llava_jax.data.templates import TEMPLATES, get_template
from llava_jax.known_names import TABLE, VALUES, explain, explain_value, to_markdown

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "tests/data/names_elsewhere.txt").read_text().splitlines()


def settings(cls=Config, prefix="") -> dict[str, type]:
    """All settings by full name, with the section they are a field of."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= settings(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = cls
    return found


def test_every_name_of_the_other_trainers_has_a_counterpart_or_a_reason():
    names = [line for line in LINES if not line.startswith("#")]
    assert len(names) > 120
    assert [name for name in names if not explain(name)] == []
    for names in TABLE.values():
        assert [
            name for name, counterpart in names.items() if not (counterpart.ours or counterpart.note)
        ] == []


def test_what_names_are_mapped_to_exists():
    source = "".join(
        (ROOT / f"llava_jax/{name}.py").read_text()
        for name in ("train", "generate", "asking", "evaluate", "score")
    )
    known = settings().keys() | {f"--{flag}" for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)}
    mapped = {own for names in TABLE.values() for counterpart in names.values() for own in counterpart.ours}
    assert sorted(mapped - known) == []


def test_no_name_stands_in_the_table_twice():
    names = [name.lower().replace("-", "_") for names in TABLE.values() for name in names]
    assert len(names) == len(set(names))


CHOICES = {
    "data.template": TEMPLATES,
    "data.image_aspect_ratio": ("pad", "square", "anyres"),
    "model.select_feature": ("patch", "cls_patch"),
    "model.vision.model_type": (CLIP, SIGLIP),
    "model.projector_type": ("linear", "identity", "mlp2x_gelu"),
    "tune.vision_tower": TUNE_MODES,
    "lora.target": ("all",),
    "lora.quantization": ("none", "int8", "nf4"),
    "optimizer.name": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
    "train.dtype": ("bfloat16", "float32"),
    "export.dtype": ("bfloat16", "float16", "float32"),
    "train.report_to": REPORTERS,
    "train.attention": ATTENTIONS,
    "train.remat": ("auto", "none", "minimal", "offload", "dots", "full"),
    "train.eval_steps": ("1 / train.num_epochs",),
    "checkpoint.save_steps": ("1 / train.num_epochs",),
    "sharding.zero": ("1", "2", "3"),
}


def test_what_values_are_mapped_to_is_one_of_ours_and_what_is_mapped_is_not():
    assert sorted(key for keys in VALUES for key in keys if key not in settings()) == []
    for (key, *_), values in VALUES.items():
        choices = CHOICES[key]
        assert [value for value in values if value in choices] == []
        assert [own for value in values.values() for own in value.ours if own not in choices] == []
        assert [value for value, here in values.items() if not (here.ours or here.note)] == []


@pytest.mark.parametrize(
    ("key", "value", "answer"),
    [
        ("data.template", "llava", "`llava` is `v1` here"),
        ("data.template", "llama", "`llama` is `v1` here"),
        ("data.template", "pretrain", "`pretrain` is `plain` here"),
        ("data.template", "mistral", "`mistral` is `mistral_instruct` here"),
        ("data.template", "qwen3", "`qwen3` has no counterpart here"),
        ("model.vision.model_type", "siglip", "`siglip` is `siglip_vision_model` here."),
        ("stages.finetune.data.template", "llama3", "`llama3` is `llama_3` here."),
        ("optimizer.name", "adamw_torch", "`adamw_torch` is `adamw` here."),
        ("optimizer.name", "paged_adamw_8bit", "`paged_adamw_8bit` is `adamw_8bit` here"),
        ("optimizer.schedule", "wsd", "`wsd` is `warmup_stable_decay` here."),
        ("lora.quantization", "4bit", "`4bit` is `nf4` here."),
        ("tune.language_model", "freeze", "`freeze` is `partial` here: LLaMA-Factory's"),
        ("train.report_to", "mlflow", "`mlflow` has no counterpart here: train.report_to knows tensorboard"),
        ("lora.language_model_target", "all-linear", "`all-linear` is `all` here."),
        ("train.dtype", "BF16", "`BF16` is `bfloat16` here."),
        ("train.attention", "sdpa", "`sdpa` is `auto` here"),
        ("train.dtype", "llava", None),
    ],
)
def test_values_of_other_trainers_are_answered(key, value, answer):
    found = explain_value(key, value)
    assert found is answer if answer is None else found.startswith(answer)


def test_every_way_to_a_wrong_value_gives_its_answer():
    with pytest.raises(
        ConfigError, match=r"elsewhere. `resampler` has no counterpart here: a projector is linear"
    ):
        build(Config, {"model": {"projector_type": "resampler"}}, "stages.finetune.")
    with pytest.raises(ConfigError, match=r"is not one of .*'sgd'. `adamw_torch` is `adamw` here.$"):
        OptimizerConfig(name="adamw_torch")
    with pytest.raises(ConfigError, match=r"is not one of .*'qwen_2'. `llava` is `v1` here: "):
        get_template("llava")
    with pytest.raises(
        ConfigError, match=r"'float32'. `fp16` has no counterpart here: float16 would need loss"
    ):
        TrainConfig(dtype="fp16")


def test_a_wrong_type_is_answered_with_what_the_setting_takes():
    epoch = wrong_type("stages.finetune.checkpoint.save_steps", "epoch")
    assert epoch.startswith(
        "stages.finetune.checkpoint.save_steps='epoch' should be a number of steps or, below 1, a share of the stage. "
        "`epoch` is `1 / train.num_epochs` here"
    )
    assert wrong_type("train.max_steps", "1e3") == "train.max_steps='1e3' should be a whole number."
    assert wrong_type("data.shuffle", "nein") == "data.shuffle='nein' should be True or False."
    assert wrong_type("sharding.zero", "zero3").endswith("`zero3` is `3` here.")
    assert wrong_type("workdir", "x") is None


@pytest.mark.parametrize(
    ("key", "settings", "sentence"),
    [
        ("optimizer.learning_rate", ("optimizer.learning_rate",), ""),
        ("batch_size", ("data.batch_size", "evaluate.batch_size"), ""),
        ("optimizer.learning_rat", ("optimizer.learning_rate",), ""),
        ("optimizer.lr", ("optimizer.learning_rate",), "`lr` is `optimizer.learning_rate` here."),
        (
            "pretrain_mm_mlp_adaptor",
            ("init.projector",),
            "Did you mean pretrain_mm_mlp_adapter? `pretrain_mm_mlp_adapter` is `init.projector` here.",
        ),
        ("load_best_model", ("train.load_best_model_at_end",), ""),
        ("model_path", ("--model",), "`model_path` is `--model` here: of generate, chat and evaluate."),
        ("zzz", (), ""),
    ],
)
def test_wrong_keys_lead_to_the_settings_that_are_meant(key, settings, sentence):
    assert meant(key) == (settings, sentence)


def test_the_page_of_names_is_the_table():
    assert (ROOT / "docs/names.md").read_text() == to_markdown(), (
        "run python -m llava_jax.known_names > docs/names.md"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"per_device_train_batch_size": 16},
            "Unknown key 'per_device_train_batch_size'. `per_device_train_batch_size` is `data.batch_size` here: rows "
            "of an optimizer step over all devices and accumulation, not per device.",
        ),
        ({"optimizer": {"optim": "adamw"}}, "`optim` is `optimizer.name` here: adamw, adamw_8bit"),
        ({"model": {"mpt_attn_impl": "triton"}}, "`mpt_attn_impl` has no counterpart here: "),
        (
            {"train": {"num_train_epochs": 1.0}},
            "`num_train_epochs` is `train.num_epochs` here: 1 unless set, not 3.",
        ),
        ({"train": {"log_step": 1}}, "Did you mean 'log_steps'?"),
    ],
)
def test_an_unknown_key_that_is_known_elsewhere_is_answered(fields, message):
    with pytest.raises(ConfigError) as error:
        build(Config, fields, "")
    assert message in str(error.value)


def reads() -> tuple[set[str], list[str]]:
    """Attributes that the package reads, and patterns of those it reads by name.

    What the schema reads of itself counts only in methods and properties that are themselves read.
    """
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "llava_jax").rglob("*.py")}
    schema = trees.pop(ROOT / "llava_jax/config.py")
    del trees[ROOT / "llava_jax/known_names.py"]
    names, patterns = set(), []
    for tree in trees.values():
        _collect(tree, names, patterns)
    methods = [
        node
        for section in ast.walk(schema)
        if isinstance(section, ast.ClassDef)
        for node in section.body
        if isinstance(node, ast.FunctionDef) and node.name != "__post_init__"
    ]
    for _ in methods:  # one may be read by the one before it
        for method in methods:
            if method.name in names:
                _collect(method, names, patterns)
    return names, patterns


def _collect(tree: ast.AST, names: set[str], patterns: list[str]) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            patterns.append(_pattern(node.args[1]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)  # handed to whoever reads it


def _pattern(node: ast.expr) -> str:
    """What names a getattr's second argument can be, as far as its text says."""
    if isinstance(node, ast.Constant):
        return re.escape(node.value)
    if not isinstance(node, ast.JoinedStr):
        return r"(?!)"  # any name at all, which would prove nothing
    modules = "(vision_tower|projector|language_model)"
    parts = [
        re.escape(part.value)
        if isinstance(part, ast.Constant)
        else (modules if ast.unparse(part.value) == "module" else r"\w+")
        for part in node.values
    ]
    return "".join(parts)


def test_every_setting_is_read_somewhere():
    names, patterns = reads()
    unread = [
        key
        for key in settings()
        if (name := key.rpartition(".")[2]) not in names
        and not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    assert unread == []


def test_the_functions_that_the_table_for_tinyllava_names_exist():
    page = (ROOT / "docs/conversion.md").read_text()
    _, _, table = page.partition("## For those who know TinyLLaVA Factory")
    names = re.findall(r"`(llava_jax\.[\w.]+)`", table.partition("\n## ")[0])
    assert len(names) > 10
    for name in names:
        assert pkgutil.resolve_name(name)
