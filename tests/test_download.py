"""A repository of the hub is fetched once, without duplicates; the hub here is a small server of our own."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest

from llava_jax.config import Config, ConfigError, InitConfig, ModelConfig
from llava_jax.convert.download import LOCAL, fetch
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.opening import open_model, open_parts
from llava_jax.weights import find_tokenizer, initial_weights
from tests.tiny_models import ROOT, as_original, assert_same_leaves, save_clip, save_llava

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(http.server.ThreadingHTTPServer):
    """Serves {repository: {file: bytes}}, and notes which files were asked for."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.fetched = []


class Handler(http.server.BaseHTTPRequestHandler):
    """The three requests that the hub's client makes: a revision's commit, its files, and a file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        found = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path
        )
        repository, what, revision, file = found.groups()
        if repository == "org/gated":
            return self.answer(b"{}", status=403, headers={"X-Error-Code": "GatedRepo"})
        if repository not in self.server.repositories:
            return self.answer(b"{}", status=404, headers={"X-Error-Code": "RepoNotFound"})
        if repository == "org/broken":
            return self.answer(b"{}", status=418)
        commit = COMMITS.get(revision or "main", revision)
        if commit not in COMMITS.values():
            return self.answer(b"{}", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        files = self.server.repositories[repository]
        if what == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.answer(json.dumps(entries).encode())
        if what == "resolve":
            if self.command == "GET":
                self.server.fetched.append(file)
            etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
            return self.answer(files[file], headers={"ETag": etag, "X-Repo-Commit": commit})
        return self.answer(json.dumps({"id": repository, "sha": commit, "siblings": []}).encode())

    def answer(self, body: bytes, status: int = 200, headers: dict | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextlib.contextmanager
def serving(repositories):
    hub = Hub(repositories)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def fetch_all(names, endpoint: str, cache: Path) -> tuple[list[str], str]:
    """What `fetch` gives for each name, a path or an error, and what it prints, in a new process."""
    script = """
import sys
from llava_jax.config import ModelConfig
from llava_jax.convert.download import fetch
from llava_jax.convert.errors import ConversionError
for name in sys.argv[1:]:
    try:
        print(fetch(name))
    except ConversionError as error:
        print(error)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script, *names], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines(), run.stderr


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def files(*names: str) -> dict[str, bytes]:
    return {name: name.encode() for name in names}


def test_repositories_are_fetched_once_and_without_duplicates(tmp_path):
    model = contents(save_llava(tmp_path / "model"))
    junk = files("README.md", "modeling.py", "onnx/model.onnx", "flax_model.msgpack", "tf_model.h5")
    junk |= files("fp16/model.safetensors", "checkpoint-5/pytorch_model.bin", "training_args.bin")
    pickled = files("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    pickled |= files("pytorch_model.bin.index.json", "mm_projector.bin")
    pickled |= files("config.json", "tokenizer.model", "chat_template.jinja")
    components = files("config.json", "language_model/config.json", "connector/pytorch_model.bin")
    repositories = {
        "org/both": model | junk | files("pytorch_model.bin"),
        "org/pickled": pickled | junk,
        "org/components": components | junk,
    }
    with serving(repositories) as hub:
        endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
        names = ["org/both", "org/pickled", "org/components@old"]
        paths, printed = fetch_all(names, endpoint, tmp_path / "cache")
        assert [Path(path).name for path in paths] == [COMMITS["main"], COMMITS["main"], COMMITS["old"]]
        assert printed.startswith(f"org/both is at commit {COMMITS['main']}, in {paths[0]}\n")
        expected = [model, pickled, components]
        assert [contents(Path(path)) for path in paths] == expected
        assert len(hub.fetched) == sum(map(len, expected))
        assert fetch_all(names, endpoint, tmp_path / "cache")[0] == paths
        assert len(hub.fetched) == sum(map(len, expected))
    offline = fetch_all(["org/both", "org/pickled", "org/other"], endpoint, tmp_path / "cache")[0]
    assert offline[:2] == paths[:2]
    assert re.match(
        r"org/other does not exist here, .* the hub cannot be reached \(.+\)\. Connect,", offline[2]
    )
    assert_same_leaves(open_model(paths[0]), open_model(tmp_path / "model"))


def test_every_refusal_of_the_hub_is_one_paragraph_with_the_fix(tmp_path):
    names = ["org/gated", "org/missing", "org/model@nowhere", "org/broken", "a--b/c"]
    with serving({"org/model": {"config.json": b"{}"}, "org/broken": {}}) as hub:
        lines, _ = fetch_all(names, f"http://127.0.0.1:{hub.server_address[1]}", tmp_path / "cache")
    for line, message in zip(
        lines,
        (
            r"org/gated is given only .* accept them on https://huggingface\.co/org/gated, then log in",
            r"org/missing does not exist here, and the Hugging Face hub has no model of that name .*; check the spelling",
            r"org/model on the Hugging Face hub has no branch, tag or commit 'nowhere'; https://",
            r"org/broken does not exist here, .*(cannot be reached|could not be fetched).*418",
            r"a--b/c does not exist here, and could not be fetched .*Cannot have -- or \.\.",
        ),
        strict=True,
    ):
        assert re.match(message, line), line


@pytest.mark.parametrize(
    "error, message",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"disk is full before all of org/name.*HF_HOME.*goes on",
        ),
        (
            OSError(errno.EACCES, "Permission denied"),
            r"org/name does not exist here, and could not be fetched .*Permission denied",
        ),
        (
            RuntimeError("Data processing error"),
            r"org/name does not exist here, and could not be fetched .*Data processing error",
        ),
        (
            TimeoutError(),
            r"org/name does not exist here, and could not be fetched .*TimeoutError.*run the same command again",
        ),
    ],
)
def test_what_stops_a_download_is_named(error, message, monkeypatch):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    with pytest.raises(ConversionError, match=message):
        fetch("org/name")


@pytest.mark.parametrize(
    "name",
    ["./org/name", "../name", "/org/name", "~/org", ".hidden/name", "name", "a/b/c", "org/name@", "a b/c"],
)
def test_paths_are_never_looked_up(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ConversionError, match=r"does not exist\. Give the path of a model, or ORG/NAME"):
        fetch(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("runs/quickstrt", r"because runs/ is where local files are kept\. Correct the path"),
        (
            "checkpoints/vicuna-7b-v1.5",
            r"because checkpoints/ is .* hf download ORG/NAME --local-dir=checkpoints",
        ),
        ("mine/model@main", r"because there is a directory mine here\."),
    ],
)
def test_a_misspelled_path_is_never_looked_up(name, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConversionError, match=f"^{name} does not exist.*{reason}"):
        fetch(name)


def test_the_local_directories_of_recipes_and_documents_are_never_looked_up():
    texts = [file.read_text() for folder in ("configs", "docs") for file in (ROOT / folder).glob("*.[pm]*")]
    named = {
        part for text in texts for part in re.findall(r"""(?:init\.\w+|--model) ?= ?f?["']?(\w+)/""", text)
    }
    assert {"checkpoints", "runs"} <= named <= {*LOCAL, "openai"}


def test_training_names_all_that_is_missing_and_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    clip, lora = tmp_path / "clip", tmp_path / "lora"
    clip.mkdir()
    init = {"language_model": "lmsys/vicuna@v1", "projector": "/none.bin", "adapters": f"{clip},{lora}"}
    with pytest.raises(ConfigError) as raised:
        initial_weights(Config(init=InitConfig(vision_tower=str(clip), **init)))
    assert str(raised.value) == (
        f"init.language_model=lmsys/vicuna@v1 and init.projector=/none.bin and init.adapters={tmp_path}/lora do not exist; "
        "set --config.init.language_model and --config.init.projector and --config.init.adapters to where they lie. "
        "Training fetches nothing from the Hugging Face hub, since every process reads these files whenever the run is "
        "continued. Fetch them once, and name that directory: "
        "hf download lmsys/vicuna --revision=v1 --local-dir=checkpoints/vicuna"
    )
    with pytest.raises(
        ConfigError, match=r"^init\.language_model=org/llm does not exist; .*hf download org/llm"
    ):
        find_tokenizer(InitConfig(language_model="org/llm"))


def test_the_published_tower_that_an_original_names_is_fetched(tmp_path, monkeypatch):
    clip = save_clip(tmp_path / "clip", save_llava(tmp_path / "model"))
    name = "openai/clip-vit-large-patch14-336"
    original = as_original(tmp_path / "model", tmp_path / "original", tower=False, mm_vision_tower=name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ConversionError, match=r"holds no CLIP tower, .* Fetching it failed: openai/clip"):
        open_model(original)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda found, **_: {name: str(clip)}[found])
    assert_same_leaves(open_model(original), open_model(original, vision_tower=clip))


def test_what_is_here_is_never_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org/name").mkdir(parents=True)
    assert fetch("org/name") == Path("org/name")
    assert fetch("~/org/name") == tmp_path / "org/name"
    assert fetch(tmp_path / "org") == tmp_path / "org"


def test_models_and_towers_may_be_named_by_repository(tmp_path, monkeypatch):
    clip = save_clip(tmp_path / "clip", save_llava(tmp_path / "model"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path / name[4:]))
    assert_same_leaves(open_model("org/model"), open_model(tmp_path / "model"))
    assert_same_leaves(
        open_parts(ModelConfig(), vision_tower="org/clip"), open_parts(ModelConfig(), vision_tower=clip)
    )
    original = as_original(
        tmp_path / "model", tmp_path / "original", tower=False, mm_vision_tower="elsewhere"
    )
    assert_same_leaves(open_model(original, vision_tower="org/clip"), open_model(original, vision_tower=clip))
