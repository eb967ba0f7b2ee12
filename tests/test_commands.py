"""The commands as a user runs them, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cwd=ROOT, typed: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=environment,
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, shapes_dataset) -> Path:
    """A recipe file: the quickstart's models on the small dataset, a few steps per stage."""
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(f"""
import importlib.util

def get_config():
    spec = importlib.util.spec_from_file_location("quickstart", {str(ROOT / "configs/quickstart.py")!r})
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    quickstart.DATASET = {shapes_dataset!r}
    config = quickstart.get_config()
    config.prepare = print
    for name in config.stage_order:
        config.stages[name].train.update(max_steps=2, log_steps=1)
        config.stages[name].data.batch_size = 8
    return config
""")
    return path


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, recipe) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    result = run("llava_jax.train", f"--config={recipe}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("llava_jax: recipe quickstart (towers -> pretrain -> finetune), run directory")
    assert any(line.startswith("finetune step 2/2  loss ") and " ETA " in line for line in lines)
    return workdir


def test_the_quickstart_trains_evaluates_and_exports(finished_run):
    results = json.loads((finished_run / "all_results.json").read_text())
    assert {"eval_accuracy", "eval_accuracy_blind", "eval_accuracy_shape", "stages"} <= results.keys()
    assert (finished_run / "export/model.safetensors").exists()
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, step) for stage in ("towers", "pretrain", "finetune") for step in (1, 2)
    ]


def test_the_same_command_again_has_nothing_left_to_train(finished_run, recipe):
    result = run(
        "llava_jax.train", f"--config={recipe}", f"--workdir={finished_run}", "--config.export.layout="
    )
    assert result.returncode == 0, result.stderr
    assert " step " not in result.stdout


@pytest.mark.parametrize("model", ["", "export"])
def test_generate_answers_from_a_run_and_from_its_export(finished_run, shapes_dataset, model):
    image = f"{shapes_dataset}/images/test_00000.jpg"
    image = image if os.path.exists(image) else image.replace(".jpg", ".png")
    result = run(
        "llava_jax.generate",
        f"--model={finished_run / model}",
        f"--image={image}",
        "--prompt=What color is the ring?",
        "--max_new_tokens=4",
        "--dtype=float32",
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2


def test_chat_answers_questions_until_there_is_none(finished_run, shapes_dataset):
    (image, *_) = sorted(Path(f"{shapes_dataset}/images").glob("test_*"))
    how = (
        f"--model={finished_run}",
        f"--image={image}",
        "--dtype=float32",
        "--max_new_tokens=6",
        "--system=",
    )
    typed = "What color is the ring?\nAnd <image>?\nWhere is it?\nclear\nWhat color is the ring?\nexit\nNo?\n"
    chat = run("llava_jax.chat", *how, typed=typed)
    assert chat.returncode == 0, chat.stderr
    first, *lines = [line for line in chat.stdout.splitlines() if not line.startswith("attention: ")]
    assert "An empty line or `exit` ends the conversation" in first
    assert [line[:2] for line in lines] == ["> "] * len(lines)
    answers = "".join(lines).split("> ")[1:]
    assert len(answers) == 6 and answers[0] == answers[4] and answers[1] == answers[5] == ""
    assert chat.stderr.startswith("error: the conversation has 2 <image> for 1 images")
    assert len(chat.stderr.splitlines()) == 1
    single = run("llava_jax.generate", *how, "--prompt=What color is the ring?")
    assert single.stdout.splitlines()[-1] == answers[0] != ""


def test_evaluate_gives_the_accuracy_and_the_answers_of_the_run(finished_run, shapes_dataset, tmp_path):
    result = run(
        "llava_jax.evaluate",
        f"--model={finished_run}",
        f"--questions={shapes_dataset}/questions_test.jsonl",
        f"--image_folder={shapes_dataset}/images",
        f"--predictions={tmp_path}/answers/llava.jsonl",
        "--max_new_tokens=8",
        "--dtype=float32",
        "--batch_size=24",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout[result.stdout.index("{") :])
    expected = json.loads((finished_run / "eval_results.json").read_text())
    assert found["eval_accuracy"] == expected["eval_accuracy"]
    rows, of_the_run = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "answers/llava.jsonl", finished_run / "predictions.jsonl")
    )
    for row in of_the_run:
        del row["blind_prediction"]
    assert rows == of_the_run
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["llava.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--questions=broken.jsonl"], 11, "broken.jsonl:1: a question needs text under text."),
        (["--questions=absent.jsonl"], 11, "'absent.jsonl': cannot be read"),
        (["--questions=pictures.jsonl"], 11, "question 1: image 'a.png' is not in image_folder"),
        (["--questions=text.jsonl", "--blind"], 11, "text.jsonl asks about fewer than two pictures"),
        (
            ["--questions=text.jsonl", "--predictions=/proc/a.jsonl"],
            10,
            "--predictions=/proc/a.jsonl cannot be",
        ),
        (["--questions=text.jsonl", "--predictions=/"], 10, "--predictions=/ is no file"),
        (["--data=text.jsonl", "--single_pred_prompt"], 10, "--single_pred_prompt is about --questions"),
        (["--questions=text.jsonl"], 12, "/nowhere"),
    ],
)
def test_evaluate_tells_mistakes_before_it_reads_the_model_and_keeps_older_answers(
    tmp_path, arguments, code, message
):
    (tmp_path / "broken.jsonl").write_text('{"question_id": 1}')
    (tmp_path / "pictures.jsonl").write_text('{"question_id": 1, "image": "a.png", "text": "?"}')
    (tmp_path / "text.jsonl").write_text('{"question_id": 1, "text": "?"}')
    (tmp_path / "answers.jsonl").write_text("older")
    result = run(
        "llava_jax.evaluate", "--model=/nowhere", "--predictions=answers.jsonl", *arguments, cwd=tmp_path
    )
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert message in result.stderr
    assert (tmp_path / "answers.jsonl").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 4


def test_scores_are_printed_of_written_answers(tmp_path):
    answers = (
        {"question_id": i, "prompt": "?", "text": t, "category": "random"} for i, t in enumerate(("No", "a"))
    )
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (tmp_path / "coco_pope_random.json").write_text('{"label": "no"}\n' * 2)
    arguments = ("llava_jax.score", f"--answers={tmp_path}/answers.jsonl")
    result = run(*arguments, f"--pope={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["random"]["accuracy"] == 0.5
    result = run(*arguments, f"--science_qa={tmp_path}")
    assert (result.returncode, "pid_splits.json: cannot be read" in result.stderr) == (11, True)


def test_evaluate_asks_the_originals_scienceqa_for_a_letter(finished_run, shapes_dataset, tmp_path):
    picture = next(Path(shapes_dataset, "images").glob("test_00000.*")).name
    asked = [{"from": "human", "value": "Which?\nA. red\nB. blue\n<image>"}, {"from": "gpt", "value": "A"}]
    records = [
        {"id": "4", "image": picture, "conversations": asked},
        {"id": "5", "conversations": [{"from": "human", "value": "Which?"}]},
    ]
    (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(records))
    result = run(
        "llava_jax.evaluate",
        f"--model={finished_run}",
        f"--questions={tmp_path}/llava_test_CQM-A.json",
        f"--image_folder={shapes_dataset}/images",
        f"--predictions={tmp_path}/answers.jsonl",
        "--single_pred_prompt",
        "--max_new_tokens=4",
        "--dtype=float32",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert found == {"eval_samples": 2, "eval_scored": 0}
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    letter_only = "\nAnswer with the option's letter from the given choices directly."
    assert [(row["question_id"], row["prompt"]) for row in rows] == [
        ("4", "<image>\nWhich?\nA. red\nB. blue" + letter_only),
        ("5", "Which?" + letter_only),
    ]
    assert rows[0]["model_id"] == finished_run.name


@pytest.mark.slow
def test_evaluate_compares_the_last_answers_of_conversations(finished_run, shapes_dataset, tmp_path):
    result = run(
        "llava_jax.evaluate",
        f"--model={finished_run}",
        f"--data={shapes_dataset}/finetune.json",
        f"--image_folder={shapes_dataset}/images",
        f"--predictions={tmp_path}/generated_predictions.jsonl",
        "--max_new_tokens=8",
        "--dtype=float32",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout[result.stdout.index("{") :])
    rows = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    assert found["eval_predicted"] == len(rows) > 50
    assert {"prompt", "predict", "label"} <= rows[0].keys()
    without = run("llava_jax.evaluate", f"--model={finished_run}")
    assert without.returncode == 10 and "questions" in without.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config.stages.finetune.optimizer.learning_rte=1"], 10, "learning_rate"),
        (["--config.sed=1"], 10, "The recipe has no setting sed. Did you mean --config.seed?"),
        (
            ["--config.stages.finetune.optimizer.projector_learning_rate=0.0"],
            10,
            "projector_learning_rate=0.0 must be",
        ),
        (
            ["--config.stages.finetune.optimizer.learning_rate=fast"],
            10,
            "stages.finetune.optimizer.learning_rate='fast' should be a number.",
        ),
        (["--confg=x"], 10, "config"),
        (
            ["--config.optimizer.learning_rate=1e-5"],
            10,
            "Write --config.stages.towers.optimizer.learning_rate=1e-5 or --config.stages.pretrain.optimizer.",
        ),
        (["--config.stages.finetune.data.template=v9"], 10, "data.template='v9' is not one of"),
        (["--config.stages.finetune.data.template=llava"], 10, "elsewhere. `llava` is `v1` here: "),
        (["--config.model_max_length=9"], 10, "`model_max_length` is `data.max_length` here"),
        (
            ["--config.stages.finetune.train.num_train_epochs=2"],
            10,
            "`num_train_epochs` is `train.num_epochs` here: 1 unless set, not 3.",
        ),
        (["--config.optim=lion"], 10, "`optim` is `optimizer.name` here"),
        (
            ["--per_device_train_batch_size=4"],
            10,
            "There is no flag --per_device_train_batch_size. `per_device_train_batch_size` is `data.batch_size` here: rows",
        ),
        (["--config.lr=1"], 10, "no setting lr. `lr` is `optimizer.learning_rate` here."),
        (
            ["--config.stages.finetune.train.learning_rate=1"],
            10,
            "Write --config.stages.finetune.optimizer.learning_rate.",
        ),
        (["extra"], 10, "Unexpected argument 'extra'"),
        (["--config.init.model=/nowhere"], 10, "init.model=/nowhere does not exist"),
        (["--workdir=/proc/run"], 12, "/proc/run cannot be written"),
    ],
)
def test_mistakes_end_in_one_paragraph_and_a_code(recipe, tmp_path, arguments, code, message):
    result = run("llava_jax.train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *arguments)
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    error = result.stderr[result.stderr.index("error: ") :]
    assert message in error
    assert len(error.strip().splitlines()) <= 6


def test_all_wrong_names_of_a_command_line_are_answered_at_once(recipe):
    line = "--deepspeed ./zero3.json --bf16 True --mm_vision_select_layer -2 --workdi=x --config.data.shuffl=False"
    result = run("llava_jax.train", f"--config={recipe}", *line.split())
    assert result.returncode == 10
    assert result.stderr[result.stderr.index("error: ") :].splitlines() == [
        "error: The recipe has no setting data.shuffl. Did you mean --config.stages.towers.data.shuffle or "
        "--config.stages.pretrain.data.shuffle or --config.stages.finetune.data.shuffle?",
        "There is no flag --deepspeed. `deepspeed` is `mesh.fsdp` and `sharding.zero` here: ZeRO's stages 1 to 3.",
        'There is no flag --bf16. `bf16` is `train.dtype` here: "bfloat16", which it is unless set.',
        "There is no flag --mm_vision_select_layer. `mm_vision_select_layer` is `model.select_layer` here: -2 unless set, "
        "not -1.",
        "There is no flag --workdi. Did you mean --workdir?",
        "Settings are written --config.KEY=VALUE, those of a stage --config.stages.STAGE.KEY=VALUE; the stages are "
        "towers, pretrain, finetune. (--help lists the flags, docs/recipes.md the settings.)",
    ]


def test_a_command_without_flags_is_told_which_it_needs():
    for command, flag in (("train", "config"), ("generate", "model"), ("chat", "model"), ("plan", "config")):
        result = run(f"llava_jax.{command}")
        assert result.returncode == 10
        assert f"error: --{flag} is missing: A " in result.stderr
        assert "Traceback" not in result.stderr


def test_stages_are_told_only_where_there_are_stages():
    arguments = ("--config.data.shuffl=False", "--config.optim=lion", "--num_epoch=1")
    result = run("llava_jax.train", "--config=configs/llava15_finetune.py:7b", *arguments)
    assert (result.returncode, "stages" in result.stderr) == (10, False)
    assert "Did you mean --config.data.shuffle?" in result.stderr


def test_flags_of_other_programs_that_answer_are_answered_without_settings():
    line = "--model-path x --image-file y --conv-mode llava_v1 --max-new-tokens 3"
    result = run("llava_jax.generate", *line.split())
    assert result.returncode == 10
    assert result.stderr[result.stderr.index("error: ") :].splitlines() == [
        "error: There is no flag --model-path. `model-path` is `--model` here: of generate, chat and evaluate.",
        "There is no flag --image-file. `image-file` is `--image` here: of generate and chat; repeated for several.",
        "There is no flag --conv-mode. `conv-mode` is `--template` here: of generate, chat and evaluate; the "
        "model's own unless set.",
        "There is no flag --max-new-tokens. Did you mean --max_new_tokens? (--help lists the flags, docs/recipes.md the "
        "settings.)",
    ]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "nothing.py",
            "error: --config=configs/nothing.py is no recipe. The project's own are in its directory configs.",
        ),
        ("llava15_pertrain.py:7b", "is no recipe. Did you mean configs/llava15_pretrain.py?"),
        (
            "quickstart.py:7b",
            "configs/quickstart.py takes no argument, as '7b' is one; write --config=configs/quickstart.py.",
        ),
        (
            "quickstart.py --config.stages.pretrain.data.batch_size=0",
            "error: Stage pretrain: data.batch_size=0 must be a positive number.",
        ),
        ("llava15_pretrain.py:70b", "'70b' is not one of '7b', '13b'. Did you mean '7b'?"),
        (
            "llava15_pretrain.py:7b",
            "checkpoints/clip-vit-large-patch14-336 and init.language_model=checkpoints/vicuna-7b-v1.5 do not exist; set",
        ),
    ],
)
def test_recipes_that_cannot_be_loaded_are_named(tmp_path, recipe, message):
    result = run("llava_jax.train", *f"--config=configs/{recipe}".split(), f"--workdir={tmp_path}")
    assert result.returncode == 10
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(:\n", "fails in line 1: SyntaxError: invalid syntax."),
        (
            "\nimport nothing_there\n",
            "fails in line 2: ModuleNotFoundError: No module named 'nothing_there'.",
        ),
        ("def get_config():\n    return 1 / 0\n", "fails in line 2: ZeroDivisionError: division by zero."),
        ("def get_config():\n    return {}['x']\n", "fails in line 2: KeyError: 'x'."),
    ],
)
def test_the_line_of_a_recipe_that_fails_is_told(tmp_path, code, message):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(code)
    result = run("llava_jax.train", f"--config={recipe}")
    assert (result.returncode, "Traceback" in result.stderr) == (10, False)
    assert f"error: The recipe {recipe} {message}" in result.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", "is no recipe: it has no get_config()"),
        ("def get_config():\n    return {'seed': 1}\n", "get_config() returns a dict; it should change what"),
        ("def get_config(size):\n    return 1\n", "wants an argument; write --config="),
    ],
)
def test_what_is_no_recipe_is_told(tmp_path, code, message):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(code)
    result = run("llava_jax.train", f"--config={recipe}")
    assert (result.returncode, "Traceback" in result.stderr) == (10, False)
    assert message in result.stderr


def test_a_path_to_json_hides_no_other_mistake():
    result = run(
        "llava_jax.train", "--config.data.path=x.json", "--config=configs/quickstart.py", "--workdr=x"
    )
    assert "There is no flag --workdr. Did you mean --workdir?" in result.stderr


@pytest.mark.parametrize("flag", ["--config={}", "{}"])
def test_keys_of_another_trainers_file_are_answered_one_by_one(tmp_path, flag):
    settings = tmp_path / "lora.yaml"
    settings.write_text("### model\nmodel_name_or_path: a/b\nlora_target: all\nnothing: 1\n")
    result = run("llava_jax.train", flag.format(settings))
    assert (result.returncode, "Traceback" in result.stderr) == (10, False)
    lines = result.stderr[result.stderr.index("error: ") :].splitlines()
    assert lines[0].startswith(f"error: {settings} is no recipe: recipes are Python files.")
    assert lines[1].startswith("`model_name_or_path` is `init.language_model` and `init.model` here")
    assert lines[2:] == [
        "`lora_target` is `lora.target` here.",
        "`nothing` is not known here. (--help lists the flags, docs/recipes.md the settings.)",
    ]


@pytest.mark.parametrize("command", ["train", "generate", "chat", "evaluate", "check_data"])
def test_help_lists_the_flags(command):
    result = run(f"llava_jax.{command}", "--help")
    flag = {"train": "--workdir", "check_data": "--report"}.get(command, "--model")
    assert flag in result.stdout
    assert "Traceback" not in result.stderr


def test_check_data_looks_at_every_stage_and_its_evaluation_data(recipe, tmp_path):
    page = tmp_path / "page.html"
    result = run(
        "llava_jax.check_data",
        f"--config={recipe}",
        f"--report={page}",
        "--config.stages.finetune.data.val_size=2",
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "llava_jax: checking the data of recipe quickstart"
    assert [line for line in lines if line.endswith(" data")] == [
        "towers training data",
        "pretrain training data",
        "finetune training data",
        "finetune evaluation data",
    ]
    assert lines[-2:] == [f"{page} shows all of it.", "Training may start."]
    assert page.stat().st_size < 1_000_000


def test_check_data_exits_with_11_and_says_why_when_training_may_not_start(recipe, tmp_path, shapes_dataset):
    records = json.loads(Path(f"{shapes_dataset}/finetune.json").read_text())
    records[3]["conversations"][1]["value"] = 7
    (tmp_path / "records.json").write_text(json.dumps(records))
    arguments = (f"--config={recipe}", f"--config.stages.finetune.data.path={tmp_path / 'records.json'}")
    result = run("llava_jax.check_data", *arguments, f"--report={tmp_path / 'page.html'}")
    assert result.returncode == 11
    assert "  1 x 'value' should be text, not a number." in result.stdout
    error = result.stderr[result.stderr.index("error: ") :].splitlines()
    assert error[:2] == [
        "error: Training may not start.",
        "finetune training data: records.json: 1 problem; correct or remove these records:",
    ]
    assert error[2].startswith("  record 3 (id ") and len(error) == 3
    assert "Training may not start" not in (tmp_path / "page.html").read_text()
    result = run("llava_jax.check_data", *arguments, f"--report={tmp_path / 'page.html'}", "--stage=pretrain")
    assert (result.returncode, "finetune" in result.stdout) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--report=/nowhere/page.html"], 10, "--report=/nowhere/page.html cannot be written"),
        (["--report=/"], 10, "--report=/ cannot be written"),
        (["--stage=pretran"], 10, "the stages of this recipe are towers, pretrain, finetune"),
        (["--config.init.tokenizer="], 10, "No tokenizer: set init.tokenizer"),
        (
            ["--config.stages.finetune.data.path=/nowhere.json"],
            11,
            "error: Stage finetune: '/nowhere.json': cannot be read",
        ),
        (
            ["--config.stages.towers.data.image_folder=/nowhere"],
            11,
            "image_folder='/nowhere' is no directory",
        ),
    ],
)
def test_check_data_tells_mistakes_before_it_reads_the_data(recipe, tmp_path, arguments, code, message):
    result = run(
        "llava_jax.check_data", f"--config={recipe}", f"--report={tmp_path / 'page.html'}", *arguments
    )
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert message in result.stderr and "samples  " not in result.stdout
    assert not (tmp_path / "page.html").exists()


def test_check_data_needs_no_jax_where_the_tokenizer_is_named(recipe, tmp_path):
    script = (
        "import sys, runpy; sys.modules['jax'] = None\n"  # importing it then fails
        f"sys.argv = ['check_data', '--config={recipe}', '--report={tmp_path / 'page.html'}', '--stage=towers']\n"
        "runpy.run_module('llava_jax.check_data', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
