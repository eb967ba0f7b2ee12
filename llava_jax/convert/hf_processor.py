"""The tokenizer, image processor and chat template of an exported llava-hf directory."""

import json
import logging
import shutil
import tempfile
from pathlib import Path

from llava_jax.config import SIGLIP, ModelConfig
from llava_jax.convert.chat_template import chat_template
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.json_files import read_json
from llava_jax.convert.model_configs import SpecialTokens
from llava_jax.convert.tokenizer_files import copy_tokenizer, is_legacy
from llava_jax.data.conversation import render
from llava_jax.data.templates import TEMPLATES, Template
from llava_jax.data.tokenizer import Tokenizer

IMAGE, PAD = "<image>", "<pad>"


def write_tokenizer(directory: Path, tokenizer_path: str, model: ModelConfig) -> tuple[SpecialTokens, str]:
    """Writes tokenizer.json with `<image>` and `<pad>` appended -> the special ids, and an image in a prompt.

    Plain text gets the ids of sentencepiece and a leading BOS, except that transformers' tokenizer merges
    runs of spaces differently. A tokenizer.model is kept beside, for software that reads it. Without a
    tokenizer nothing is written.
    """
    base = model.text.vocab_size
    if not tokenizer_path:
        written = f"<im_start>{IMAGE}<im_end>\n" if model.use_im_start_end else IMAGE + "\n"
        return SpecialTokens(image=base, pad=base + 1, bos=1, eos=2), written
    from transformers import AddedToken

    tokenizer = _load_tokenizer(directory, tokenizer_path, model.extra_tokens)
    own = [token for token in (IMAGE, PAD) if token not in tokenizer.get_vocab()]
    if len(tokenizer) > base + 2 - len(own):
        raise ConversionError(
            f"The tokenizer in {tokenizer_path} has {len(tokenizer)} tokens, more than the {base} "
            "of the model's vocabulary; it belongs to another model."
        )
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
    tokenizer.model_max_length = model.text.max_position_embeddings
    tokenizer.save_pretrained(directory)
    if (directory / "tokenizer.model").exists():
        settings = read_json(directory / "tokenizer_config.json") | {"legacy": tokenizer.legacy}
        _write_json(directory / "tokenizer_config.json", settings)
    tokens = SpecialTokens(
        image=tokenizer.convert_tokens_to_ids(IMAGE),
        pad=tokenizer.pad_token_id,
        bos=1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos=2 if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    )
    if model.use_im_start_end:  # what follows an image is a token that no space belongs in front of
        return tokens, f"<im_start>{IMAGE}<im_end>\n"
    return tokens, _image_in_prompt(tokenizer)


def _load_tokenizer(directory: Path, tokenizer_path: str, extra_tokens: tuple[str, ...]):
    """transformers' tokenizer for `tokenizer_path`; a tokenizer.model is copied to `directory` too."""
    from transformers import AutoTokenizer, LlamaTokenizer

    with tempfile.TemporaryDirectory() as copied:
        copy_tokenizer(tokenizer_path, Path(copied), extra_tokens)
        vocabulary = Path(copied) / "tokenizer.model"
        if not vocabulary.exists():
            return AutoTokenizer.from_pretrained(copied)
        tokenizer = LlamaTokenizer.from_pretrained(
            copied, legacy=is_legacy(Path(copied)), add_bos_token=True, add_eos_token=False
        )
        _check_ids(tokenizer, tokenizer_path, vocabulary)
        shutil.copyfile(vocabulary, directory / "tokenizer.model")
        return tokenizer


def _image_in_prompt(tokenizer) -> str:
    """The placeholder and the newline behind it, spelled so that their ids are those of training.

    The original tokenizes the text behind an image on its own, with the space that starts every text. Where
    transformers' tokenizer adds none in the middle of a text, one is written.
    """
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    spaced = tokenizer(IMAGE + " \n", add_special_tokens=False).input_ids
    return IMAGE + (" \n" if spaced[1:] == newline else "\n")


def _check_ids(tokenizer, tokenizer_path: str, vocabulary: Path) -> None:
    """transformers takes every sentencepiece model for a BPE with Llama's settings; others would go wrong."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    text = "A chat between a curious user and an assistant: 12 cats, 3 caf\u00e9s."
    expected = [processor.bos_id(), *processor.encode(text)]
    if tokenizer(text).input_ids != expected:
        raise ConversionError(
            f"transformers would tokenize with {tokenizer_path} differently than sentencepiece; it can "
            "only read BPE models with Llama's settings. Export with --layout=llava, which keeps it as it is."
        )


def write_slow_tokenizer_config(directory: Path) -> None:
    """Beside a bare tokenizer.model, the settings of Vicuna's, without which older software guesses."""
    if not (directory / "tokenizer.model").exists() or (directory / "tokenizer_config.json").exists():
        return
    fields = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "right",
    }
    _write_json(directory / "tokenizer_config.json", fields)


def write_decoder_template(directory: Path, template: str, tokenizer: Tokenizer) -> None:
    """Adds the chat template of a decoder alone to the settings of its tokenizer, which lies in `directory`.

    transformers and vLLM tokenize what it writes without adding anything, so that it writes the BOS too.
    """
    if template not in TEMPLATES:
        _warn_of_template(template)
        return
    file = directory / "tokenizer_config.json"
    text = _beginning(directory, TEMPLATES[template], tokenizer) + chat_template(TEMPLATES[template], None)
    _write_json(file, (read_json(file) if file.exists() else {}) | {"chat_template": text})


def _beginning(directory: Path, template: Template, tokenizer: Tokenizer) -> str:
    """What stands before a chat in jinja, so that its ids are those of training.

    Llama's tokenizer puts a space before a text, but with `legacy` false not behind a BOS that is part of it: there one is
    written.
    """
    if tokenizer.bos_id is None:
        return ""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    text = "a"
    if not template.caption_only:
        text = "".join(span.text for span in render([("human", "a"), ("gpt", "b")], template, num_images=0))
    spaced = theirs(f"{theirs.bos_token} {text}", add_special_tokens=False).input_ids
    as_in_training = [tokenizer.bos_id, *tokenizer.encode(text)]
    # Few ids are enough: later ones may differ where a text has runs of spaces.
    return "{{- bos_token + ' ' -}}\n" if spaced[:3] == as_in_training[:3] else "{{- bos_token -}}\n"


def _warn_of_template(template: str) -> None:
    logging.getLogger(__name__).warning(
        "No chat template is written: conversation template %r is none of ours.", template
    )


def write_processor(
    directory: Path, model: ModelConfig, *, template: str, image_aspect_ratio: str, image_in_prompt: str
) -> None:
    """Writes the image processor's and the processor's settings, and the chat template where there is one.

    With "pad" the image processor pads to a square in the mean color before it resizes, as in training. Where
    transformers resizes through torchvision instead of PIL, pixels differ from training by a level or two.
    """
    tiled = bool(model.image_grid_pinpoints)
    kind = "LlavaNextProcessor" if tiled else "LlavaProcessor"
    processor = {
        "processor_class": kind,
        "image_token": IMAGE,
        "num_additional_image_tokens": model.vision.num_positions - model.vision.num_patches,
        "patch_size": model.vision.patch_size,
        "vision_feature_select_strategy": "default" if model.select_feature == "patch" else "full",
    }
    pixels = _image_processor(model, image_aspect_ratio) | {"processor_class": kind}
    _write_json(directory / "preprocessor_config.json", pixels)
    _write_json(directory / "processor_config.json", processor)
    if template in TEMPLATES:
        behind_image = image_in_prompt.removesuffix("\n")
        text = chat_template(TEMPLATES[template], behind_image)
        (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
        return
    _warn_of_template(template)


def _image_processor(model: ModelConfig, image_aspect_ratio: str) -> dict:
    """The settings of transformers' image processor that treats pictures as our pipeline does."""
    side = model.vision.image_size
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.vision.image_mean),
        "image_std": list(model.vision.image_std),
    }
    if model.image_grid_pinpoints:
        grid = [[height, width] for width, height in model.image_grid_pinpoints]
        tiles = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": grid}
        return settings | tiles | {"do_pad": True}
    if image_aspect_ratio == "pad":
        return settings | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if model.vision.model_type == SIGLIP:
        whole = {"image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}
        return settings | whole | {"do_center_crop": False, "crop_size": None}
    return settings


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2), encoding="utf-8")
