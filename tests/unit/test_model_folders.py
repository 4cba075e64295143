"""A fault in any file of a model's folder is told in words that name the folder, or it changes nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridflow.config.schema import Config, RolloutConfig
from hybridflow.errors import HybridflowError
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from hybridflow.workers.data import DataWorker
from hybridflow.workers.rollout import RolloutWorker
from tests.training_rows import context_of, training_config

Fault = Callable[[Path], object]
WEIGHTS = "model.safetensors"
JUNK: list[object] = [None, -1, 0, 10**9, 1e400, "many", "", [], [[]], {}, True]


def with_settings(name: str, **settings: object) -> Fault:
    def fault(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**content, **settings}))

    return fault


def with_text(name: str, text: str | bytes) -> Fault:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Fault:
    def fault(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return fault


def without(name: str, instead: Fault = lambda folder: None) -> Fault:
    def fault(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        instead(folder)

    return fault


def one_of_two_files(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, folder / first, metadata={"format": "pt"})
    places = {name: first if name in names[:5] else second for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WEIGHTS).unlink()


def random_fault(seed: int) -> Fault:
    """A setting of a JSON file, at any depth, with junk in its place; or bytes of a file that are others, or missing."""

    def fault(folder: Path) -> None:
        chance = random.Random(seed)
        path = chance.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        if path.suffix == ".json" and chance.random() < 0.7:
            content = json.loads(path.read_text())
            node = content
            while isinstance(node, dict) and (deeper := [v for v in node.values() if isinstance(v, dict) and v]):
                if chance.random() < 0.5:
                    break
                node = chance.choice(deeper)
            node[chance.choice(sorted(node))] = chance.choice(JUNK)
            path.write_text(json.dumps(content))
            return
        data = bytearray(path.read_bytes())
        cut = chance.randrange(len(data))
        if chance.random() < 0.5:
            del data[cut:]
        else:
            data[cut] ^= 1 << chance.randrange(8)
        path.write_bytes(data)

    return fault


REFUSED: dict[str, Fault] = {
    "more layers": with_settings("config.json", num_hidden_layers=9),
    "a size in words": with_settings("config.json", vocab_size="many"),
    "an unknown dtype": with_settings("config.json", dtype="float99", torch_dtype="float99"),
    "an unknown type": with_settings("config.json", model_type="nonesuch"),
    "an encoder": with_settings("config.json", model_type="bert", architectures=["BertModel"]),
    "another size": with_settings("config.json", hidden_size=128),
    "a quantization that nobody has": with_settings("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "a configuration that is a list": with_text("config.json", "[]"),
    "half a configuration": with_text("config.json", "{"),
    "a pointer of git-lfs": with_text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"),
    "no weights": without(WEIGHTS),
    "a link to nowhere": without(WEIGHTS, lambda folder: (folder / WEIGHTS).symlink_to("/nowhere")),
    "a folder in place of weights": without(WEIGHTS, lambda folder: (folder / WEIGHTS).mkdir()),
    "one of two files": one_of_two_files,
    "one weight missing": with_weights(lambda tensors: tensors.pop(sorted(tensors)[3])),
    "other names": with_weights(lambda tensors: [tensors.update({f"m.{name}": tensors.pop(name)}) for name in list(tensors)]),
    "integers": with_weights(lambda tensors: tensors.update({name: each.to(torch.int8) for name, each in tensors.items()})),
    "one weight of integers": with_weights(
        lambda tensors: tensors.update({max(tensors): tensors[max(tensors)].to(torch.int8)})
    ),
    "settings of the tokenizer that are a list": with_text("tokenizer_config.json", "[]"),
    "half a tokenizer": with_text("tokenizer.json", "{"),
    "a template that never closes": with_text("chat_template.jinja", "{% for m in messages %}"),
    "a template that asks for too much": with_text("chat_template.jinja", "{% for i in range(10**7) %}a{% endfor %}"),
    "a template that divides by zero": with_text("chat_template.jinja", "{{ 1 // 0 }}"),
    "a template of bytes": with_text("chat_template.jinja", b"\xff\xfe\x00"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.parquet"
    message = [{"role": "user", "content": "1+1="}]
    row = {"prompt": message, "reward_model": {"ground_truth": "2"}, "data_source": "openai/gsm8k"}
    pq.write_table(pa.Table.from_pylist([row] * 3), file)
    return file


def built(folder: Path, data: Path) -> list[str]:
    """What each role says of the model; nothing where it is built."""
    config: Config = replace(training_config(str(folder)), rollout=RolloutConfig(engine="torch", dtype="float32"))
    limits = {"max_prompt_tokens": 64, "max_response_tokens": 8}
    config = replace(config, data=replace(config.data, train_files=(str(data),), prompts_per_step=1, **limits))
    makes: list[Callable[[], Worker]] = [
        lambda: DataWorker(config, context_of("data")),
        lambda: ActorWorker(config, context_of("actor")),
        lambda: RolloutWorker(config, context_of("rollout")),
    ]
    said = []
    for make in makes:
        try:
            worker = make()
            if isinstance(worker, DataWorker):
                worker.open("prompts")
        except HybridflowError as error:
            said.append(str(error))
    return said


def test_without_a_fault_every_role_is_built(tiny_model: str, data: Path) -> None:
    assert not built(Path(tiny_model), data)


def test_files_beside_those_of_the_model_are_not_read(tiny_model: str, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    with_text("consolidated.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")(folder)
    assert not built(folder, data)


def test_integers_are_found_in_each_file_that_an_index_names(tiny_model: str, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    last = max(tensors)
    parts = {"a.safetensors": {**tensors}, "b.safetensors": {last: tensors[last].to(torch.int8)}}
    del parts["a.safetensors"][last]
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    with_settings(f"{WEIGHTS}.index.json", metadata={}, weight_map=places)(folder)
    assert all("holds 1 weight(s) as integers" in words for words in built(folder, data)[-2:])


@pytest.mark.parametrize("fault", REFUSED.values(), ids=REFUSED)
def test_what_no_role_can_use_is_refused_by_name(tiny_model: str, data: Path, tmp_path: Path, fault: Fault) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    fault(folder)
    said = built(folder, data)
    assert said and all("model'" in words or "chat template" in words for words in said), said


@pytest.mark.parametrize("seed", range(60))
def test_a_random_fault_is_told_as_an_error_of_the_package_or_changes_nothing(
    tiny_model: str, data: Path, tmp_path: Path, seed: int
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    random_fault(seed)(folder)
    built(folder, data)
