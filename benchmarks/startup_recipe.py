"""The quickstart's last stage as a recipe of one stage: --config=benchmarks/startup_recipe.py:DATASET."""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(dataset: str) -> ConfigDict:
    """Trains on what `llava_jax.quickstart.dataset.prepare` wrote into the directory `dataset`."""
    config = quickstart.get_config()
    config.name = "startup"
    config.prepare = None
    config.init.tokenizer = f"{dataset}/tokenizer.model"
    config.evaluate.path = config.export.layout = ""
    config.stage_order = ("finetune",)
    for name in ("towers", "pretrain"):
        del config.stages[name]
    finetune = config.stages.finetune
    finetune.data.update(
        path=f"{dataset}/finetune.json", image_folder=f"{dataset}/images", cache_dir=f"{dataset}/cache"
    )
    finetune.train.update(max_steps=2, log_steps=1)
    return config
