"""Names and values that people know from other trainers, and what they are here: for messages and for docs/names.md."""

import dataclasses
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """What a name or a value is here (settings or flags; values), nothing where there is no such thing; and what differs,
    or why."""

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

_SHARE = "below 1 it is a share of the stage: 0.25 is four times"
_EACH_EPOCH = "1 / train.num_epochs, 0.5 of two epochs"
_LAST_SAVED = (
    "the last step is always saved, so with one epoch give a number above the stage's steps (1 is every step)"
)
_LAST_EVALUATED = "the last step is always evaluated, so with one epoch leave it out (1 is every step)"

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
        "vision_feature_layer": _is("model.select_layer"),
        "mm_vision_select_feature": _is(
            "model.select_feature",
            note="patch costs a SigLIP tower its first patch, here as in TinyLLaVA Factory",
        ),
        "vision_feature_select_strategy": _is(
            "model.select_feature", note="default is patch here, full is cls_patch"
        ),
        "mm_projector_type": _is("model.projector_type", note="mlp2x_gelu unless set, not linear"),
        "connector_type": _is("model.projector_type"),
        "mm_patch_merge_type": _is("model.patch_merge_type"),
        "mm_vision_resampler": _none("a projector is linear layers (model.projector_type)"),
        "image_grid_pinpoints": _is(
            "model.image_grid_pinpoints",
            note="with data.image_aspect_ratio='anyres'; sizes are (width, height)",
        ),
        "rope_scaling": _is(
            "model.text.rope_scaling.rope_type",
            "model.text.rope_scaling.factor",
            "model.text.max_position_embeddings",
            note="default, linear or llama3; longer rows need data.max_length too",
        ),
        "mm_use_im_start_end": _is(
            "model.use_im_start_end", note="model.text.vocab_size counts the two tokens"
        ),
        "mm_use_im_patch_token": _is(
            "model.use_im_patch_token", note="off unless set; model.text.vocab_size counts the token"
        ),
        "add_tokens": _none("the vocabulary is the tokenizer's; add them to it and to model.text.vocab_size"),
        "add_special_tokens": _none(
            "the vocabulary is the tokenizer's; add them to it and to model.text.vocab_size"
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
        "use_unsloth": _none("every step is compiled"),
        "enable_liger_kernel": _none(
            "the loss needs no switch: logits exist for supervised tokens alone, loss.chunk_size at a time"
        ),
        "torch_dtype": _is("train.dtype", "train.frozen_dtype", note="trained parameters are always float32"),
        "bf16": _is("train.dtype", note='"bfloat16", which it is unless set'),
        "fp16": _is("train.dtype", note="bfloat16 or float32; float16 would need loss scaling"),
        "pure_bf16": _none("trained parameters are always float32"),
        "tf32": _none("train.dtype is bfloat16 or float32, and products of float32 keep all its bits"),
        "bits": _is("lora.quantization", note="int8 for 8, nf4 for 4"),
        "double_quant": _is("lora.double_quantization"),
        "quant_type": _is("lora.quantization", note="nf4; fp4 does not exist here"),
        "quantization_bit": _is("lora.quantization", note="int8 for 8, nf4 for 4"),
        "load_in_8bit": _is(
            "lora.quantization", "--quantization", note="int8; the flag is one of generate, chat and evaluate"
        ),
        "load_in_4bit": _is(
            "lora.quantization", "--quantization", note="nf4; the flag is one of generate, chat and evaluate"
        ),
    },
    "What trains": {
        "freeze_backbone": _is(
            "tune.language_model",
            note='"frozen"; the original still trains the head, which is "partial" with '
            "tune.language_model_modules='lm_head'",
        ),
        "tune_mm_mlp_adapter": _is(
            "tune.language_model", "tune.projector", note='"frozen" and "full": the projector alone trains'
        ),
        "freeze_mm_mlp_adapter": _is("tune.projector", note='"frozen"'),
        "freeze_vision_tower": _is("tune.vision_tower", note='"frozen", which it is unless set'),
        "freeze_multi_modal_projector": _is(
            "tune.projector", note='"frozen"; LLaMA-Factory freezes it unless told, here it trains'
        ),
        "freeze_language_model": _is("tune.language_model", note='"frozen"'),
        "unfreeze_mm_vision_tower": _is("tune.vision_tower", note='"full"'),
        "freeze_trainable_layers": _is(
            "tune.language_model_layers", note="a slice: '-2:' for 2, ':2' for -2, with 'partial'"
        ),
        "freeze_trainable_modules": _none("the layers of tune.language_model_layers train whole"),
        "freeze_extra_modules": _is("tune.language_model_modules", note="embed_tokens, norm and lm_head"),
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
        "tune_embed_tokens": _is(
            "tune.language_model_modules",
            note="\"embed_tokens\", with tune.language_model='partial' or 'lora'",
        ),
        "lora_enable": _is("tune.language_model", note='"lora"'),
        "lora_r": _is("lora.rank", note="128 unless set, not 64"),
        "r": _is("lora.rank", note="128 unless set"),
        "lora_rank": _is("lora.rank", note="128 unless set, not 8"),
        "lora_alpha": _is("lora.alpha", note="2 * lora.rank unless set"),
        "lora_dropout": _is("lora.dropout", note="0.05 unless set, not 0"),
        "lora_bias": _is("lora.bias"),
        "lora_target": _is("lora.target"),
        "target_modules": _is("lora.target"),
        "additional_target": _is("tune.language_model_modules", "tune.projector", note="what trains whole"),
        "modules_to_save": _is("tune.language_model_modules", "tune.projector", note="what trains whole"),
        "lora_weight_path": _is("init.adapters", note="the original reads it and does nothing with it"),
        "use_rslora": _is("lora.rslora"),
        "use_dora": _none("DoRA does not exist here yet"),
        "pissa_init": _none("adapters begin as LoRA's do: A is drawn, B is zero"),
        "use_llama_pro": _none("no layers are added"),
        "train_from_scratch": _is("init.model", note="empty, as it is unless set: drawn from the seed"),
        "use_oft": _none("adapters are LoRA's"),
        "create_new_adapter": _is("lora.create_new_adapter"),
        "loraplus_lr_ratio": _is("optimizer.loraplus_lr_ratio"),
    },
    "Data": {
        "data": _is("data.path"),
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
        "buffer_size": _none("samples are shuffled over the whole epoch"),
        "data_seed": _is("seed"),
        "version": _is("data.template", note="v1, plain, ...; v1 unless set"),
        "conv_version": _is("data.template"),
        "template": _is("data.template", note="LLaMA-Factory's `default` is not the one here"),
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
        "dataloader_pin_memory": _none("batches are sent to the devices ahead of their step"),
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
        "learning_rate": _is("optimizer.learning_rate", note="2e-5 unless set, not 5e-5"),
        "lr": _is("optimizer.learning_rate"),
        "mm_projector_lr": _is("optimizer.projector_learning_rate"),
        "mm_vision_tower_lr": _is("optimizer.vision_tower_learning_rate"),
        "vision_tower_lr": _is("optimizer.vision_tower_learning_rate"),
        "lr_scheduler_type": _is(
            "optimizer.schedule", note="by the same names; cosine unless set, not linear"
        ),
        "lr_scheduler_kwargs": _is(
            "optimizer.min_lr_ratio",
            "optimizer.decay_ratio",
            note="of cosine_with_min_lr and warmup_stable_decay; as shares of the peak rate and of the run",
        ),
        "warmup_ratio": _is("optimizer.warmup_ratio", note="0.03 unless set, not 0"),
        "warmup_steps": _is("optimizer.warmup_steps", note="a share of the stage is optimizer.warmup_ratio"),
        "weight_decay": _is("optimizer.weight_decay"),
        "adam_beta1": _is("optimizer.beta1"),
        "adam_beta2": _is("optimizer.beta2"),
        "adam_epsilon": _is("optimizer.epsilon"),
        "max_grad_norm": _is(
            "optimizer.max_grad_norm",
            note="no clipping unless set, as in the original under DeepSpeed, not 1.0",
        ),
        "use_galore": _none(
            "adamw_8bit and adafactor are the optimizers with small moments (optimizer.name)"
        ),
        "galore_target": _none("GaLore does not exist here"),
        "use_apollo": _none(
            "adamw_8bit and adafactor are the optimizers with small moments (optimizer.name)"
        ),
        "use_badam": _none("adamw_8bit and adafactor are the optimizers with small moments (optimizer.name)"),
        "use_adam_mini": _none(
            "adamw_8bit and adafactor are the optimizers with small moments (optimizer.name)"
        ),
        "use_muon": _is("optimizer.name", note='"muon"'),
        "neftune_noise_alpha": _none("no noise is added to embeddings"),
        "label_smoothing_factor": _none("labels are not smoothed"),
        "moe_enable": _none("there are no mixtures of experts here"),
    },
    "Run": {
        "seed": _is("seed"),
        "output_dir": _is("--workdir"),
        "overwrite_output_dir": _is(
            "checkpoint.overwrite_output_dir",
            note="throws away checkpoints; without it the same command continues the run",
        ),
        "num_train_epochs": _is("train.num_epochs", note="1 unless set, not 3"),
        "epochs": _is("train.num_epochs"),
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
        "ignore_data_skip": _none(
            "a continued run goes on with the next sample at once, and reads none again"
        ),
        "save_steps": _is("checkpoint.save_steps", note=_SHARE),
        "save_strategy": _is(
            "checkpoint.save_steps", note=f"{_SHARE}; 'epoch' is {_EACH_EPOCH}; {_LAST_SAVED}"
        ),
        "save_safetensors": _is("export.layout", note="exports always are; checkpoints/ is orbax's format"),
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
        "use_swanlab": _none("train.report_to knows tensorboard and wandb; metrics.jsonl is always written"),
        "include_num_input_tokens_seen": _none(
            "metrics.jsonl has tokens_per_second and num_supervised_tokens"
        ),
        "log_level": _none("a run prints what it does; --debug shows the traceback of an error"),
        "full_determinism": _none("the same command on the same devices always gives the same bits"),
        "run_name": _is("name"),
        "plot_loss": _none("training_loss.png is always drawn"),
        "do_train": _none("python -m llava_jax.train trains"),
        "do_eval": _is(
            "data.val_size", "data.eval_dataset", note="where there is data to evaluate on, it is evaluated"
        ),
        "eval_strategy": _is(
            "train.eval_steps", note=f"{_SHARE}; 'epoch' is {_EACH_EPOCH}; {_LAST_EVALUATED}"
        ),
        "evaluation_strategy": _is(
            "train.eval_steps", note=f"{_SHARE}; 'epoch' is {_EACH_EPOCH}; {_LAST_EVALUATED}"
        ),
        "eval_steps": _is("train.eval_steps", note=_SHARE),
        "per_device_eval_batch_size": _is("data.batch_size", note="for evaluation too; " + _ROWS),
        "compute_accuracy": _none("eval_token_accuracy is always reported"),
        "predict_with_generate": _is(
            "evaluate.predict_with_generate",
            note="exact match and ROUGE-L over words; no BLEU, no ROUGE-1 and -2",
        ),
        "do_predict": _is(
            "evaluate.predict_with_generate", note="or python -m llava_jax.evaluate --data=FILE"
        ),
        "max_new_tokens": _is(
            "evaluate.max_new_tokens", "--max_new_tokens", note="a flag of generate, chat and evaluate"
        ),
        "push_to_hub": _none("README.md and export/ are written for you to upload; nothing is sent anywhere"),
        "hub_model_id": _none(
            "README.md and export/ are written for you to upload; nothing is sent anywhere"
        ),
        "export_dir": _is("export.layout", note="written to export/ in --workdir"),
        "export_size": _none("exported files hold 5 GB at most"),
        "save_model_path": _none("the DST of tools/convert_weights.py merge-lora BASE ADAPTER DST"),
        "model_revision": _none("weights are directories; hf download --revision fetches another"),
        "pref_beta": _none("rewards and preferences do not exist here"),
        "ref_model": _none("rewards and preferences do not exist here"),
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
        "ddp_find_unused_parameters": _none("gradients exist for what trains alone"),
    },
    "Asking a model": {
        "model-path": _is("--model", note="of generate, chat and evaluate"),
        "model-base": _none(
            "a run by LoRA knows its base; for an adapter alone, tools/convert_weights.py merge-lora"
        ),
        "image-file": _is("--image", note="of generate and chat; repeated for several"),
        "query": _is("--prompt", note="of generate"),
        "conv-mode": _is("--template", note="of generate, chat and evaluate; the model's own unless set"),
        "default_system": _is(
            "--system", note="of generate and chat; in training a record's 'system' replaces the template's"
        ),
        "question-file": _is(
            "--questions", note="of evaluate; as it is, and right answers in it are compared"
        ),
        "answers-file": _is("--predictions", note="of evaluate; the original's scorers read it"),
        "single-pred-prompt": _is("--single_pred_prompt", note="of evaluate"),
        "all-rounds": _none("MMBench's tables are not read"),
        "num-chunks": _none("--batch_size questions of evaluate are spread over the devices"),
        "chunk-idx": _none("--batch_size questions of evaluate are spread over the devices"),
        "result-file": _is("--answers", note="of score, for POPE and ScienceQA"),
        "annotation-dir": _is("--pope", note="of score"),
        "base-dir": _is("--science_qa", note="of score"),
        "load-8bit": _is("--quantization", note="int8, of generate, chat and evaluate"),
        "load-4bit": _is("--quantization", note="nf4, of generate, chat and evaluate"),
        "do_sample": _is(
            "--temperature",
            note="of generate and chat: above 0 draws, 0 does not; other answers are never drawn",
        ),
        "temperature": _is("--temperature", note="of generate and chat; 0 unless set: the likeliest tokens"),
        "top_p": _is("--top_p", note="of generate and chat"),
        "top_k": _is("--top_k", note="of generate and chat; 0 unless set: drawn of all tokens"),
        "num_beams": _none("answers are not searched for with beams"),
        "repetition_penalty": _is(
            "--repetition_penalty", note="of generate and chat; images count as nothing"
        ),
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

_V1_WORDS = "v1 with another end, for a decoder that does not run here"
_OTHER_DECODER = "for decoders that do not run here"
_OWN_TEMPLATE = "no template here writes its turns"
_BFLOAT16 = "float16 would need loss scaling; bfloat16 has as many bits"
_NO_OPTIMIZER = "adamw, adamw_8bit, adafactor, lion, muon and sgd are the optimizers"
_QUANTIZED_HERE = "kernels are read unquantised and become int8 or nf4 as they are loaded"
_PAGED = "sharding.offload_moments keeps moments in the host's memory"
_LION_BITS = "optimizer.moment_dtype='bfloat16' halves its moments"
_FASTEST = "the kernel that docs/kernels.md lists for the platform; the others are called by their own names"
_OFFLOAD = "sharding.offload_moments keeps moments in the host's memory; parameters stay on the devices"

# What values of settings are called elsewhere. A value that is one of ours too does not stand here.
VALUES: dict[tuple[str, ...], dict[str, Counterpart]] = {
    ("data.template",): {
        "vicuna": _is("v1"),
        "llava": _is("v1", note="LLaMA-Factory's LLaVA-1.5; llava_v1 is another"),
        "llama": _is("v1", note="TinyLLaVA's, for TinyLlama"),
        "pretrain": _is("plain"),
        "phi": _none(f"TinyLLaVA's: {_V1_WORDS}; LLaMA-Factory's: {_OTHER_DECODER}"),
        "gemma": _none(f"TinyLLaVA's: {_V1_WORDS}; LLaMA-Factory's: {_OTHER_DECODER}"),
        "llava_next": _is("v1", note="with data.image_aspect_ratio='anyres'"),
        "llava_next_llama3": _is("llama_3"),
        "llava_next_mistral": _is("mistral_instruct", note="LLaVA-1.6's, with a space before [/INST]"),
        "llava_next_qwen": _is("qwen_2"),
        "llava_next_yi": _is("chatml_direct", note="LLaVA-1.6 34B's, without line breaks between turns"),
        "llava_next_video": _is("v1"),
        "llava_next_video_mistral": _is("mistral_instruct", note="with a space before [/INST]"),
        "llava_next_video_yi": _is("chatml_direct", note="without line breaks between turns"),
        "video_llava": _is("v1"),
        "mistral": _is("mistral_instruct", note="with a space before [/INST]"),
        "llama2": _is("llama_2", note="which has Llama 2's own system text unless a record has one"),
        "llama3": _is("llama_3"),
        "llava_llama_3": _is("llama_3"),
        "qwen": _is("qwen_2", note='its system text is "You are a helpful assistant."'),
        "qwen_1_5": _is("qwen_2"),
        "chatml": _is("qwen_2", note="which has Qwen2's own system text unless a record has one"),
        "alpaca": _none("for records written so, data.dataset with 'formatting': 'alpaca', and any template"),
        "qwen2_vl": _none("Qwen2-VL is another architecture"),
        "qwen3": _none(_OWN_TEMPLATE),
        "qwen3_nothink": _none(_OWN_TEMPLATE),
        "deepseek": _none(_OWN_TEMPLATE),
        "zephyr": _none(_OWN_TEMPLATE),
        "yi": _is("qwen_2", note="which has Qwen2's own system text unless a record has one"),
        "gemma2": _none(_OTHER_DECODER),
        "phi3": _none(_OTHER_DECODER),
        "llama4": _none(_OTHER_DECODER),
        "mllama": _none(_OTHER_DECODER),
        "empty": _none('documents, {"text": ...}, are what no template writes'),
    },
    ("data.image_aspect_ratio",): {
        "anyres_max_9": _is("anyres", note="model.image_grid_pinpoints lists the sizes"),
    },
    ("model.select_feature",): {
        "default": _is("patch"),
        "full": _is("cls_patch"),
    },
    ("model.vision.model_type",): {
        "clip": _is("clip_vision_model"),
        "siglip": _is("siglip_vision_model"),
        "siglip2_vision_model": _none(
            "SigLIP 2 of many resolutions is not built; of one resolution it is siglip_vision_model"
        ),
        "dinov2": _none("towers are CLIP's and SigLIP's"),
        "mof": _none("there is one tower, CLIP's or SigLIP's"),
    },
    ("model.projector_type",): {
        "mlp": _is("mlp2x_gelu"),
        "resampler": _none("a projector is linear layers: linear or mlp2x_gelu"),
        "qformer": _none("a projector is linear layers: linear or mlp2x_gelu"),
        "mof_mlp": _none("there is one tower; linear or mlp2x_gelu project its features"),
    },
    ("tune.vision_tower", "tune.projector", "tune.language_model"): {
        "partially-tune": _is("partial", note="with tune.vision_tower_layers and its like"),
        "qlora": _is("lora", note="with lora.quantization"),
        "freeze": _is(
            "partial",
            note="LLaMA-Factory's, with tune.language_model_layers; what is 'frozen' does not train",
        ),
        "common": _is("full"),
    },
    ("lora.target", "lora.vision_tower_target", "lora.projector_target", "lora.language_model_target"): {
        "all-linear": _is("all"),
    },
    ("lora.quantization",): {
        "8bit": _is("int8"),
        "8": _is("int8"),
        "llm_int8": _is("int8", note="without outliers: activations are never quantised"),
        "4bit": _is("nf4"),
        "4": _is("nf4"),
        "int4": _is("nf4"),
        "bnb": _is("nf4", "int8", note="4 bits and 8 bits"),
        "bitsandbytes": _is("nf4", "int8", note="4 bits and 8 bits"),
        "fp4": _none("nf4 has as many bits"),
        "fp8": _none("int8 has as many bits"),
        "gptq": _none(_QUANTIZED_HERE),
        "awq": _none(_QUANTIZED_HERE),
        "hqq": _none(_QUANTIZED_HERE),
    },
    ("optimizer.name",): {
        "adamw_torch": _is("adamw"),
        "adamw_torch_fused": _is("adamw"),
        "adamw_torch_xla": _is("adamw"),
        "adamw_apex_fused": _is("adamw"),
        "adamw_hf": _is("adamw"),
        "adamw_anyprecision": _is("adamw", note="with optimizer.moment_dtype='bfloat16'"),
        "paged_adamw": _is("adamw", note=_PAGED),
        "paged_adamw_32bit": _is("adamw", note=_PAGED),
        "adamw_bnb_8bit": _is("adamw_8bit"),
        "adamw_torch_8bit": _is("adamw_8bit"),
        "adamw8bit": _is("adamw_8bit"),
        "adam8bit": _is("adamw_8bit"),
        "paged_adamw_8bit": _is("adamw_8bit", note=_PAGED),
        "lion_32bit": _is("lion"),
        "lion_8bit": _is("lion", note=_LION_BITS),
        "paged_lion_32bit": _is("lion", note=_PAGED),
        "paged_lion_8bit": _is("lion", note=_LION_BITS),
        "adamw_torch_4bit": _none(_NO_OPTIMIZER),
        "adam_mini": _none(_NO_OPTIMIZER),
        "ademamix": _none(_NO_OPTIMIZER),
        "ademamix_8bit": _none(_NO_OPTIMIZER),
        "adagrad": _none(_NO_OPTIMIZER),
        "rmsprop": _none(_NO_OPTIMIZER),
        "galore_adamw": _none(_NO_OPTIMIZER),
        "galore_adamw_8bit": _none(_NO_OPTIMIZER),
        "galore_adafactor": _none(_NO_OPTIMIZER),
        "apollo_adamw": _none(_NO_OPTIMIZER),
        "lomo": _none(_NO_OPTIMIZER),
        "adalomo": _none(_NO_OPTIMIZER),
        "grokadamw": _none(_NO_OPTIMIZER),
        "schedule_free_adamw": _none(_NO_OPTIMIZER),
        "schedule_free_sgd": _none(_NO_OPTIMIZER),
        "stable_adamw": _none(_NO_OPTIMIZER),
    },
    ("optimizer.schedule",): {
        "cosine_with_restarts": _is(
            "cosine", note="what it is with one cycle, its default; nothing restarts here"
        ),
        "cosine_warmup_with_min_lr": _is("cosine_with_min_lr"),
        "cosine_annealing": _is("cosine"),
        "polynomial": _is("linear", note="the same but for its last rate (1e-7) with power 1, its default"),
        "wsd": _is("warmup_stable_decay"),
        "reduce_lr_on_plateau": _none(
            "rates depend on the step alone; train.early_stopping_patience ends a stage that no longer gets better"
        ),
        "greedy": _none("rates depend on the step alone"),
    },
    ("train.dtype", "train.frozen_dtype", "optimizer.moment_dtype"): {
        "bf16": _is("bfloat16"),
        "fp32": _is("float32"),
        "fp16": _none(_BFLOAT16),
        "float16": _none(_BFLOAT16),
        "half": _none(_BFLOAT16),
        "fp8": _none("bfloat16 is the shortest"),
    },
    ("export.dtype",): {
        "bf16": _is("bfloat16"),
        "fp16": _is("float16"),
        "fp32": _is("float32"),
    },
    ("train.report_to",): {
        name: _none("train.report_to knows tensorboard and wandb; metrics.jsonl is always written")
        for name in ("swanlab", "mlflow", "trackio", "comet_ml", "clearml", "all")
    },
    ("train.attention",): {
        "flash_attention_2": _is("auto", note=_FASTEST),
        "flash_attention_3": _is("auto", note=_FASTEST),
        "fa2": _is("auto", note=_FASTEST),
        "fa3": _is("auto", note=_FASTEST),
        "flash_attn": _is("auto", note=_FASTEST),
        "sdpa": _is("auto", note=_FASTEST),
        "xformers": _is("auto", note=_FASTEST),
        "eager": _is("reference", note="nothing fused: S x S scores exist"),
        "disabled": _is("reference", note="nothing fused: S x S scores exist"),
        "triton": _none(
            "attention is of JAX and Pallas; auto takes the kernel that docs/kernels.md lists for the platform"
        ),
    },
    ("train.remat",): {
        "True": _is("full", note="or dots, minimal, offload, auto"),
        "False": _is("none"),
        "unsloth": _is("offload"),
    },
    ("train.eval_steps",): {
        "epoch": _is("1 / train.num_epochs", note=f"as a number, 0.5 of two epochs; {_LAST_EVALUATED}"),
        "no": _none(f"leave it out; {_LAST_EVALUATED.partition(',')[0]}"),
        "steps": _none("the number itself says so"),
    },
    ("checkpoint.save_steps",): {
        "epoch": _is("1 / train.num_epochs", note=f"as a number, 0.5 of two epochs; {_LAST_SAVED}"),
        "no": _none("a number above the stage's steps saves the last step alone"),
        "steps": _none("the number itself says so"),
        "best": _none("train.load_best_model_at_end keeps the checkpoint of the best evaluation"),
    },
    ("sharding.zero",): {
        "zero1": _is("1"),
        "zero2": _is("2"),
        "zero3": _is("3"),
        "zero2_offload": _is("2", note=_OFFLOAD),
        "zero3_offload": _is("3", note=_OFFLOAD),
        "full_shard": _is("3"),
        "shard_grad_op": _is("2"),
        "hybrid_shard": _is("3", note="mesh.data copies of what mesh.fsdp splits"),
        "zero0": _none("mesh.fsdp=1 splits nothing"),
        "no_shard": _none("mesh.fsdp=1 splits nothing"),
    },
}


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


_COUNTERPARTS = {_plain(name): counterpart for names in TABLE.values() for name, counterpart in names.items()}
_VALUES = {
    (key, _plain(value)): counterpart
    for keys, values in VALUES.items()
    for key in keys
    for value, counterpart in values.items()
}
KNOWN_NAMES = tuple(_COUNTERPARTS)


def counterpart_of(name: str) -> Counterpart | None:
    """What a name is here, however its words are joined; None for a name that the table does not hold."""
    return _COUNTERPARTS.get(_plain(name))


def explain(name: str) -> str | None:
    """What a name is called here, in a sentence; None for a name that the table does not hold."""
    return _sentence(name, counterpart_of(name))


def explain_value(key: str, value: str) -> str | None:
    """What a setting's value is called here, in a sentence; None for a value that the table does not hold.

    `key` is the setting's full name, that of a stage (stages.NAME.KEY) or not.
    """
    return _sentence(value, _VALUES.get((re.sub(r"^stages\.[^.]+\.", "", key), _plain(value))))


def _sentence(name: str, counterpart: Counterpart | None) -> str | None:
    if counterpart is None:
        return None
    if counterpart.ours:
        names = " and ".join(f"`{own}`" for own in counterpart.ours)
        return f"`{name}` is {names} here{f': {counterpart.note}' if counterpart.note else ''}."
    return f"`{name}` has no counterpart here: {counterpart.note}."


def to_markdown() -> str:
    """The tables as a page of the documentation."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Names you may know"
    yield ""
    yield "Names of the original LLaVA, Hugging Face's trainer, TinyLLaVA Factory and LLaMA-Factory, and what they are"
    yield "called here; at the end, values of settings that are called otherwise there. A command that is given one of"
    yield "them answers with its row. This page is written by `python -m llava_jax.known_names > docs/names.md`."
    for heading, names in TABLE.items():
        yield from ("", f"## {heading}", *_rows(names))
    yield from ("", "## Values")
    for keys, values in VALUES.items():
        yield from ("", f"### {', '.join(f'`{key}`' for key in keys)}", *_rows(values))


def _rows(names: dict[str, Counterpart]) -> Iterator[str]:
    yield from ("", "| there | here | |", "|---|---|---|")
    for name, counterpart in names.items():
        ours = ", ".join(f"`{own}`" for own in counterpart.ours)
        yield f"| `{name}` | {ours or '-'} | {counterpart.note} |"


if __name__ == "__main__":
    print(to_markdown(), end="")
