"""Names that people know from other trainers, and what they are called here: for messages and for docs/names.md."""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """What a name is called here: settings or flags, none where there is no such thing; and what differs, or why."""

    ours: tuple[str, ...]
    note: str = ""


def _is(*ours: str, note: str = "") -> Counterpart:
    return Counterpart(ours, note)


def _none(why: str) -> Counterpart:
    return Counterpart((), why)


_ROWS = "rows of an optimizer step over all devices and accumulation, not per device"
_LAZY = "samples are always read when they are needed"
_COMPONENTS = (
    "a run directory or a Hugging Face directory of ours is opened whole, as init.model or in its parts"
)

# What each name means elsewhere is told by the heading it stands under.
TABLE: dict[str, dict[str, Counterpart]] = {
    "Model": {
        "model_name_or_path": _is(
            "init.language_model", "init.model", note="a decoder alone, or a whole LLaVA model"
        ),
        "pretrained_model_path": _is("init.model"),
        "vision_tower": _is(
            "init.vision_tower", note="tune.vision_tower says how it trains; it cannot be left out"
        ),
        "pretrain_mm_mlp_adapter": _is("init.projector"),
        "adapter_name_or_path": _is("init.adapters"),
        "tokenizer_name_or_path": _is("init.tokenizer"),
        "mm_vision_select_layer": _is("model.select_layer", note="-2 unless set, not -1"),
        "mm_vision_select_feature": _is("model.select_feature"),
        "mm_projector_type": _is("model.projector_type", note="mlp2x_gelu unless set, not linear"),
        "connector_type": _is("model.projector_type"),
        "mm_patch_merge_type": _is("model.patch_merge_type"),
        "mm_use_im_start_end": _is(
            "model.use_im_start_end", note="model.text.vocab_size counts the two tokens"
        ),
        "mm_use_im_patch_token": _is(
            "model.use_im_patch_token", note="off unless set; model.text.vocab_size counts the token"
        ),
        "resize_vocab": _is("model.text.vocab_size", note="new rows start as the mean of the others"),
        "is_multimodal": _none(
            "every model here has a vision tower; text-only samples may be mixed with others"
        ),
        "mpt_attn_impl": _none("MPT is not supported; train.attention chooses for Llama-like decoders"),
        "attn_implementation": _is("train.attention"),
        "flash_attn": _is("train.attention"),
        "trust_remote_code": _none("no code of a model repository is ever run"),
        "use_cache": _none("training keeps no cache of keys and values, and generation always does"),
        "torch_dtype": _is("train.dtype", "train.frozen_dtype", note="trained parameters are always float32"),
        "bf16": _is("train.dtype", note='"bfloat16", which it is unless set'),
        "fp16": _is("train.dtype", note="bfloat16 or float32; float16 would need loss scaling"),
        "pure_bf16": _none("trained parameters are always float32"),
        "tf32": _none("jax_default_matmul_precision is JAX's own setting, in the environment"),
        "bits": _is("lora.quantization", note="int8 for 8, nf4 for 4"),
        "double_quant": _is("lora.double_quantization"),
        "quant_type": _is("lora.quantization", note="nf4; fp4 does not exist here"),
        "quantization_bit": _is("lora.quantization", note="int8 for 8, nf4 for 4"),
        "load_in_8bit": _is("lora.quantization", note='"int8", for training'),
        "load_in_4bit": _is("lora.quantization", note='"nf4", for training'),
    },
    "What trains": {
        "freeze_backbone": _is("tune.language_model", note='"frozen"'),
        "tune_mm_mlp_adapter": _is(
            "tune.language_model", "tune.projector", note='"frozen" and "full": the projector alone trains'
        ),
        "freeze_mm_mlp_adapter": _is("tune.projector", note='"frozen"'),
        "freeze_vision_tower": _is("tune.vision_tower", note='"frozen", which it is unless set'),
        "freeze_multi_modal_projector": _is("tune.projector", note='"frozen"'),
        "freeze_language_model": _is("tune.language_model", note='"frozen"'),
        "unfreeze_mm_vision_tower": _is("tune.vision_tower", note='"full"'),
        "freeze_trainable_layers": _is(
            "tune.language_model_layers", note="a slice: '-2:' for the last two, with 'partial'"
        ),
        "freeze_trainable_modules": _is("tune.language_model_modules"),
        "finetuning_type": _is(
            "tune.vision_tower", "tune.projector", "tune.language_model", note="frozen, full, partial or lora"
        ),
        "training_recipe": _is(
            "tune.vision_tower", "tune.projector", "tune.language_model", note="frozen, full, partial or lora"
        ),
        "tune_type_llm": _is("tune.language_model"),
        "tune_type_vision_tower": _is("tune.vision_tower"),
        "tune_type_connector": _is("tune.projector"),
        "tune_vision_tower_from_layer": _is(
            "tune.vision_tower_layers", note="a slice: '12:' for from layer 12 on, with 'partial'"
        ),
        "lora_enable": _is("tune.language_model", note='"lora"'),
        "lora_r": _is("lora.rank"),
        "lora_rank": _is("lora.rank"),
        "lora_alpha": _is("lora.alpha"),
        "lora_dropout": _is("lora.dropout"),
        "lora_bias": _is("lora.bias"),
        "lora_target": _is("lora.target"),
        "target_modules": _is("lora.target"),
        "additional_target": _is("tune.language_model_modules", "tune.projector", note="what trains whole"),
        "modules_to_save": _is("tune.language_model_modules", "tune.projector", note="what trains whole"),
        "lora_weight_path": _is("init.adapters", note="the original reads it and does nothing with it"),
        "use_rslora": _is("lora.rslora"),
        "use_dora": _none("DoRA does not exist here yet"),
        "create_new_adapter": _is("lora.create_new_adapter"),
        "loraplus_lr_ratio": _is("optimizer.loraplus_lr_ratio"),
    },
    "Data": {
        "data_path": _is("data.path"),
        "dataset": _is("data.dataset"),
        "dataset_dir": _is("data.dataset_dir"),
        "media_dir": _is("data.image_folder"),
        "image_folder": _is("data.image_folder"),
        "image_aspect_ratio": _is("data.image_aspect_ratio", note='"pad" unless set, not "square"'),
        "image_max_pixels": _is("data.image_max_pixels", note="no limit unless set"),
        "image_min_pixels": _is("data.image_min_pixels", note="no limit unless set"),
        "video_max_pixels": _is("data.video_max_pixels", note="of a frame"),
        "video_min_pixels": _none("frames are resized to the tower's size whatever their own"),
        "video_fps": _is("data.video_frames", note="so many frames, evenly spread, whatever the rate"),
        "video_maxlen": _is("data.video_frames", note="so many frames, evenly spread"),
        "version": _is("data.template", note="v1, plain, ...; v1 unless set"),
        "conv_version": _is("data.template"),
        "template": _is("data.template"),
        "model_max_length": _is("data.max_length", note="image features included; 2048 unless set, not 512"),
        "cutoff_len": _is("data.max_length"),
        "max_seq_length": _is("data.max_length"),
        "max_samples": _is("data.max_samples"),
        "mix_strategy": _is("data.weights", note="how often each file's samples are taken"),
        "interleave_probs": _is("data.weights", note="how often each file's samples are taken"),
        "train_on_prompt": _is("data.mask", note='"everything"'),
        "mask_history": _is("data.mask", note='"last_answer"'),
        "packing": _is("data.packing", note="samples of a row never see each other"),
        "neat_packing": _is("data.packing", note="samples of a row never see each other"),
        "group_by_modality_length": _is("data.group_by_modality_length"),
        "group_by_length": _is(
            "data.group_by_modality_length", note="or data.packing, which leaves no padding at all"
        ),
        "disable_shuffling": _is("data.shuffle", note="False"),
        "lazy_preprocess": _none(_LAZY + "; the original reads it and does nothing with it"),
        "streaming": _none(_LAZY + ", through an index of the file; images may lie in a bucket"),
        "tokenized_path": _none(_LAZY + "; data.cache_dir keeps their measured lengths"),
        "cache_dir": _is("data.cache_dir", note="for measured lengths; HF_HOME is for downloads"),
        "overwrite_cache": _is("data.overwrite_cache"),
        "preprocessing_num_workers": _is("data.num_threads"),
        "preprocessing_batch_size": _none(
            "nothing is preprocessed in batches; packing is planned for a whole epoch"
        ),
        "dataloader_num_workers": _is("data.num_threads", note="threads, not processes"),
        "dataloader_drop_last": _none(
            "the last step of an epoch has the samples that are left, with empty rows beside them"
        ),
        "remove_unused_columns": _none("only the keys of LLaVA's format are read"),
        "val_size": _is("data.val_size"),
        "eval_dataset": _is(
            "data.eval_dataset", "data.eval_path", note="names of dataset_info.json, or files"
        ),
        "eval_on_each_dataset": _is(
            "data.eval_dataset", note="as a=a,b=b; data.eval_path as NAME=FILE,NAME=FILE"
        ),
    },
    "Optimizer": {
        "optim": _is("optimizer.name", note="adamw, adamw_8bit, adafactor, lion, muon or sgd"),
        "learning_rate": _is("optimizer.learning_rate"),
        "mm_projector_lr": _is("optimizer.projector_learning_rate"),
        "mm_vision_tower_lr": _is("optimizer.vision_tower_learning_rate"),
        "vision_tower_lr": _is("optimizer.vision_tower_learning_rate"),
        "lr_scheduler_type": _is("optimizer.schedule", note="by the same names"),
        "warmup_ratio": _is("optimizer.warmup_ratio", note="0.03 unless set, not 0"),
        "warmup_steps": _is("optimizer.warmup_steps"),
        "weight_decay": _is("optimizer.weight_decay"),
        "adam_beta1": _is("optimizer.beta1"),
        "adam_beta2": _is("optimizer.beta2"),
        "adam_epsilon": _is("optimizer.epsilon"),
        "max_grad_norm": _is(
            "optimizer.max_grad_norm",
            note="no clipping unless set, as in the original under DeepSpeed, not 1.0",
        ),
        "moe_enable": _none("there are no mixtures of experts here"),
    },
    "Run": {
        "seed": _is("seed"),
        "output_dir": _is("--workdir"),
        "overwrite_output_dir": _is(
            "checkpoint.overwrite_output_dir",
            note="throws away checkpoints; without it the same command continues the run",
        ),
        "num_train_epochs": _is("train.num_epochs"),
        "max_steps": _is("train.max_steps"),
        "per_device_train_batch_size": _is("data.batch_size", note=_ROWS),
        "gradient_accumulation_steps": _is(
            "train.accumulation_steps",
            note="data.batch_size stays what it is and is cut into so many parts",
        ),
        "gradient_checkpointing": _is("train.remat", note="full, dots, minimal, offload, none or auto"),
        "disable_gradient_checkpointing": _is("train.remat", note='"none"'),
        "resume_from_checkpoint": _is(
            "checkpoint.resume_from_checkpoint", note="the newest good one unless set"
        ),
        "save_steps": _is("checkpoint.save_steps"),
        "save_strategy": _is(
            "checkpoint.save_steps", note="0.25 is four times per stage; the last step is always saved"
        ),
        "save_total_limit": _is("checkpoint.save_total_limit", note="2 unless set"),
        "save_only_model": _is("checkpoint.save_only_model"),
        "load_best_model_at_end": _is("train.load_best_model_at_end"),
        "metric_for_best_model": _is("train.metric_for_best_model"),
        "greater_is_better": _none("the metric's name tells: accuracies should be high, losses low"),
        "early_stopping_patience": _is("train.early_stopping_patience"),
        "early_stopping_steps": _is("train.early_stopping_patience", note="counted in evaluations"),
        "logging_steps": _is("train.log_steps", note="10 unless set"),
        "logging_strategy": _is("train.log_steps"),
        "logging_dir": _is(
            "--workdir", note="its directory tensorboard/, with train.report_to='tensorboard'"
        ),
        "logging_nan_inf_filter": _none(
            "a step without finite loss is not applied and is told; train.max_skipped_steps in a row end the run"
        ),
        "report_to": _is("train.report_to", note="metrics.jsonl is always written"),
        "run_name": _is("name"),
        "plot_loss": _none("training_loss.png is always drawn"),
        "do_train": _none("python -m llava_jax.train trains"),
        "do_eval": _is(
            "data.val_size", "data.eval_dataset", note="where there is data to evaluate on, it is evaluated"
        ),
        "eval_strategy": _is("train.eval_steps", note="0.25 is four times per stage"),
        "evaluation_strategy": _is("train.eval_steps", note="0.25 is four times per stage"),
        "eval_steps": _is("train.eval_steps"),
        "per_device_eval_batch_size": _is("data.batch_size", note="for evaluation too; " + _ROWS),
        "compute_accuracy": _none("eval_token_accuracy is always reported"),
        "predict_with_generate": _is(
            "evaluate.predict_with_generate",
            note="exact match and ROUGE-L over words; no BLEU, no ROUGE-1 and -2",
        ),
        "do_predict": _is(
            "evaluate.predict_with_generate", note="or python -m llava_jax.evaluate --data=FILE"
        ),
        "max_new_tokens": _is("evaluate.max_new_tokens"),
        "push_to_hub": _none("README.md and export/ are written for you to upload; nothing is sent anywhere"),
        "export_dir": _is("export.layout", note="written to export/ in --workdir"),
        "stage": _none(
            "records say what they are: conversations (sft), documents with a 'text' (pt; configs/pt.py), or captions with "
            "data.template='plain'; rewards and preferences do not exist here"
        ),
    },
    "Devices": {
        "deepspeed": _is("mesh.fsdp", "sharding.zero", note="ZeRO's stages 1 to 3"),
        "fsdp_config": _is("mesh.fsdp"),
        "tensor_parallel_size": _is("mesh.tensor"),
        "local_rank": _is("--process_id"),
        "nproc_per_node": _none("one process drives all devices of its host"),
        "master_addr": _is("--coordinator", note="HOST:PORT"),
        "nnodes": _is("--num_processes"),
        "ddp_timeout": _is("train.hang_timeout_minutes"),
        "torch_compile": _none("every step is compiled"),
    },
    "Code": {
        "BaseTrainingRecipe": _none(
            "a recipe is a file in configs/, and llava_jax.recipe.Recipe what it becomes; "
            "docs/conversion.md says where its parts went"
        ),
        "common": _is("tune.language_model", note='"full"'),
        "lora": _is("tune.language_model", note='"lora"'),
        "qlora_int8": _is("lora.quantization", note='"int8"'),
        "training_model_converse": _none("llava_jax.models.lora.add_lora, called where tune.* says lora"),
        "tune_type_setting": _none("llava_jax.tuning.is_trainable says what trains"),
        "add_args": _none("every setting is a field of llava_jax/config.py"),
        "load": _none(f"llava_jax.weights.open_any; {_COMPONENTS}"),
        "save": _none("llava_jax.checkpoint.Checkpoints; export.layout writes Hugging Face's files"),
        "split_to_even_chunks": _none("llava_jax.data.samplers has it under this name"),
        "get_length_grouped_indices": _none("llava_jax.data.samplers has it under this name"),
        "get_modality_length_grouped_indices": _is(
            "data.group_by_modality_length", note="llava_jax.data.samplers has it under this name"
        ),
        "LengthGroupedSampler": _is("data.group_by_modality_length"),
        "LLaVATrainer": _none(
            "llava_jax.trainer.run trains a recipe, llava_jax.stage.train_stage one of its stages"
        ),
        "CustomTrainer": _none(
            "llava_jax.trainer.run trains a recipe, llava_jax.stage.train_stage one of its stages"
        ),
        "create_optimizer": _none("llava_jax.optimizer.make_optimizer"),
        "run_pt": _none("python -m llava_jax.train --config=configs/pt.py trains on documents"),
        "load_tokenizer": _none("llava_jax.data.tokenizer.load_tokenizer"),
        "get_dataset": _none("llava_jax.data.dataset.open_datasets"),
        "split_dataset": _is("data.val_size", note="llava_jax.data.dataset.split_dataset"),
        "load_model": _none("llava_jax.weights.open_any"),
        "is_trainable": _none("what a stage trains, tune.* says; opened otherwise, nothing does"),
        "DataCollatorForLanguageModeling": _none("llava_jax.data.batching.collate, with labels by position"),
        "Seq2SeqTrainingArguments": _none("llava_jax.config.Config"),
        "ModelArguments": _none("llava_jax.config.ModelConfig and InitConfig"),
        "DataArguments": _none("llava_jax.config.DataConfig"),
        "FinetuningArguments": _none("llava_jax.config.TuneConfig and LoraConfig"),
        "TYPE_CHECKING": _none("Python's own"),
        "callbacks": _none("there are none; metrics.jsonl and train.report_to tell what a run does"),
        "save_model": _is("export.layout", note="checkpoints/ holds what trained"),
        "log_metrics": _none("train_results.json and eval_results.json are always written"),
        "save_metrics": _none(
            "train_results.json, eval_results.json and all_results.json are always written"
        ),
        "save_state": _none("trainer_state.json is always written, checkpoints/ is the state"),
        "is_world_process_zero": _none("llava_jax.processes.is_first"),
        "evaluate": _is("data.val_size", "data.eval_dataset", note="evaluate.* generates answers besides"),
        "perplexity": _none("eval_perplexity is always reported"),
        "create_modelcard_and_push": _none("README.md in --workdir is the model card; nothing is pushed"),
    },
}

_COUNTERPARTS = {name: counterpart for names in TABLE.values() for name, counterpart in names.items()}


def explain(name: str) -> str | None:
    """What a name is called here, in a sentence; None for a name that the table does not hold."""
    counterpart = _COUNTERPARTS.get(name)
    if counterpart is None:
        return None
    if counterpart.ours:
        names = " and ".join(f"`{own}`" for own in counterpart.ours)
        return f"`{name}` is {names} here{f': {counterpart.note}' if counterpart.note else ''}."
    return f"`{name}` has no counterpart here: {counterpart.note}."


def to_markdown() -> str:
    """The table as a page of the documentation."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Names you may know"
    yield ""
    yield "Names of the original LLaVA, Hugging Face's trainer, TinyLLaVA Factory and LLaMA-Factory, and what they are"
    yield "called here. A command that is given one of them answers with its row. This page is written by"
    yield "`python -m llava_jax.known_names > docs/names.md`."
    for heading, names in TABLE.items():
        yield from ("", f"## {heading}", "", "| there | here | |", "|---|---|---|")
        for name, counterpart in names.items():
            ours = ", ".join(f"`{own}`" for own in counterpart.ours)
            yield f"| `{name}` | {ours or '-'} | {counterpart.note} |"


if __name__ == "__main__":
    print(to_markdown(), end="")
