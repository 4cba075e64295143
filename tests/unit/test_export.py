"""A checkpoint becomes a Hugging Face folder that holds the weights it was trained to."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hybridflow.checkpoint import export
from hybridflow.checkpoint.export import export_checkpoint
from hybridflow.checkpoint.sharded import save_sharded
from hybridflow.checkpoint.store import CheckpointStore, RunState
from hybridflow.errors import CheckpointError, ModelError
from hybridflow.export import main
from hybridflow.ops.losses import PolicyLoss, ValueLoss
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.critic import CriticWorker
from tests.every_model import make_every
from tests.toy import make_tiny_model
from tests.training_rows import context_of, random_batch, training_config, whole_weights


def trained(source: str) -> PreTrainedModel:
    """The model of `source` with every weight moved, as training would."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def checkpoint_of(run: Path, source: str, weights: dict[str, torch.Tensor], *, role: str = "actor", **model: object) -> Path:
    """A checkpoint as a training worker writes it."""
    store = CheckpointStore(run)
    with store.writing(5) as folder:
        save_sharded(str(folder / role), {"model": weights, "optimizer": {"step": 5}}, None)
        store.write_state(
            folder, RunState(step=5, config={"model": {"path": source, "tokenizer": None, **model}, role: {"path": None}})
        )
    return run / "checkpoints" / "step_000005"


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def adapted(weights: dict[str, torch.Tensor], layer: str, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` as peft names them, with `adapter` beside those of `layer`."""
    saved = {name.replace(f"{layer}.", f"{layer}.base_layer."): weight for name, weight in weights.items()}
    return saved | {f"{layer}.{name}": factor for name, factor in adapter.items()}


def factors(num_in: int, num_out: int) -> dict[str, torch.Tensor]:
    return {"lora_A.default.weight": torch.randn(2, num_in), "lora_B.default.weight": torch.randn(num_out, 2)}


def assert_same_weights(model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> None:
    found = weights_of(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_the_exported_model_has_exactly_the_trained_weights(tmp_path: Path, tiny_model: str):
    weights = weights_of(trained(tiny_model))
    folder = export_checkpoint(checkpoint_of(tmp_path / "run", tiny_model, weights), tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32
    assert_same_weights(model, weights)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_an_actor_saved_is_exported_as_the_weights_it_computes_with(tmp_path: Path, tiny_model: str, lora_rank: int):
    config = training_config(tiny_model, model={"lora_rank": lora_rank, "lora_alpha": 8.0})
    actor = ActorWorker(config, context_of("actor"))
    actor.begin_step(1, 1)
    actor.update(random_batch([(3, 5), (4, 9)]), loss=PolicyLoss())
    store = CheckpointStore(tmp_path)
    with store.writing(1) as folder:
        actor.save(str(folder / "actor"))
        store.write_state(folder, RunState(step=1, config=asdict(config)))
    exported = export_checkpoint(tmp_path, tmp_path / "out", dtype="float32")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(exported), whole_weights(actor.named_tensors()))


def test_what_a_critic_saved_is_exported_with_its_head(tmp_path: Path, tiny_model: str):
    config = training_config(tiny_model)
    critic = CriticWorker(config, context_of("critic"))
    critic.begin_step(1, 1)
    critic.update(random_batch([(3, 5), (4, 9)]), loss=ValueLoss())
    store = CheckpointStore(tmp_path)
    with store.writing(1) as folder:
        critic.save(str(folder / "critic"))
        store.write_state(folder, RunState(step=1, config=asdict(config)))
    exported = export_checkpoint(tmp_path, tmp_path / "out", role="critic", dtype="float32")
    weights = whole_weights(critic.core.named_tensors())
    assert torch.equal(load_file(exported / "value_head.safetensors")["weight"], weights.pop("value_head.weight"))
    del weights["value_head.bias"]
    backbone = {name.removeprefix("model."): weight for name, weight in weights.items()}
    assert_same_weights(AutoModel.from_pretrained(exported), backbone)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_critic_starts_from_an_exported_one_with_its_values(tmp_path: Path, tiny_model: str, lora_rank: int):
    config = training_config(tiny_model, model={"lora_rank": lora_rank})
    critic, rows = CriticWorker(config, context_of("critic")), random_batch([(3, 5), (4, 9)])
    critic.begin_step(1, 1)
    critic.update(rows, loss=ValueLoss())
    store = CheckpointStore(tmp_path)
    with store.writing(1) as folder:
        critic.save(str(folder / "critic"))
        store.write_state(folder, RunState(step=1, config=asdict(config)))
    exported = export_checkpoint(tmp_path, tmp_path / "out", role="critic", dtype="float32")
    again = CriticWorker(training_config(str(exported)), context_of("critic"))
    values = critic.values(rows).tokens("values").values
    assert np.abs(values).max() > 1e-4, "a head that was not read begins at zero"
    assert again.values(rows).tokens("values").values == pytest.approx(values, rel=1e-5, abs=1e-7)


def test_a_value_head_of_another_model_is_refused(tmp_path: Path, tiny_model: str):
    model = tmp_path / "critic"
    shutil.copytree(tiny_model, model)
    save_file({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, model / "value_head.safetensors")
    with pytest.raises(ModelError, match=r"value_head.safetensors does not load as the value head of this model"):
        CriticWorker(training_config(str(model)), context_of("critic"))


def test_the_exported_folder_generates_from_text(tmp_path: Path, tiny_model: str):
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, weights_of(trained(tiny_model)))
    folder = export_checkpoint(checkpoint, tmp_path / "out", dtype="float32")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    prompt = tokenizer("1+1=", return_tensors="pt")
    assert (
        model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == prompt.input_ids.shape[1] + 3
    )


def test_weights_are_rounded_once_to_the_dtype_asked_for(tmp_path: Path, tiny_model: str):
    weights = weights_of(trained(tiny_model))
    folder = export_checkpoint(checkpoint_of(tmp_path / "run", tiny_model, weights), tmp_path / "out", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert_same_weights(model, {name: weight.to(torch.bfloat16) for name, weight in weights.items()})


def test_the_dtype_is_that_of_the_source_unless_told_otherwise(tmp_path: Path, tiny_model: str):
    source = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(source)
    folder = export_checkpoint(checkpoint_of(tmp_path / "run", str(source), weights_of(trained(tiny_model))), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("saved_twice", [False, True])
def test_tied_weights_stay_tied_and_are_written_once(tmp_path: Path, saved_twice: bool):
    source = make_tiny_model(tmp_path / "source", tie_word_embeddings=True)
    weights = weights_of(trained(source))
    saved = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]} if saved_twice else weights
    folder = export_checkpoint(checkpoint_of(tmp_path / "run", source, saved), tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_weights(model, weights)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_large_models_are_written_in_several_indexed_files(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "FILE_BYTES", 50_000)
    weights = weights_of(trained(tiny_model))
    folder = export_checkpoint(checkpoint_of(tmp_path / "run", tiny_model, weights), tmp_path / "out", dtype="float32")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), weights)


def test_adapters_are_merged(tmp_path: Path, tiny_model: str):
    weights = weights_of(trained(tiny_model))
    layer = "model.layers.1.self_attn.q_proj"
    low, high = (pair := factors(64, 64)).values()
    saved = adapted(weights, layer, pair)
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, saved, lora_rank=2, lora_alpha=6.0)
    folder = export_checkpoint(checkpoint, tmp_path / "out", dtype="float32")
    # W + alpha / rank * B A, and alpha / rank = 3.
    expected = {**weights, f"{layer}.weight": weights[f"{layer}.weight"] + 3.0 * (high @ low)}
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), expected)


def assert_adapter_is_refused(run: Path, source: str, saved: dict[str, torch.Tensor], *, first: str) -> None:
    checkpoint = checkpoint_of(run, source, saved, lora_rank=2, lora_alpha=6.0)
    with pytest.raises(
        CheckpointError, match=rf"has adapters on 1 layers, and those of 1 cannot be merged, the first of {first}:"
    ):
        export_checkpoint(checkpoint, run.with_name("out"))


def test_an_adapter_of_an_embedding_is_refused(tmp_path: Path, tiny_model: str):
    pair = {"lora_embedding_A.default": torch.randn(2, 66), "lora_embedding_B.default": torch.randn(64, 2)}
    saved = adapted(weights_of(trained(tiny_model)), "model.embed_tokens", pair)
    assert_adapter_is_refused(tmp_path / "run", tiny_model, saved, first=r"model\.embed_tokens \(Embedding\)")


def test_an_adapter_of_a_transposed_weight_is_refused_although_its_shapes_fit(tmp_path: Path):
    source = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(source)
    layer = "transformer.h.0.attn.c_proj"
    saved = adapted(weights_of(trained(str(source))), layer, factors(32, 32))
    assert_adapter_is_refused(tmp_path / "run", str(source), saved, first=r"transformer\.h\.0\.attn\.c_proj \(Conv1D\)")


@pytest.mark.parametrize("missing", ["base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"])
def test_an_adapter_of_which_a_part_is_missing_is_refused(tmp_path: Path, tiny_model: str, missing: str):
    layer = "model.layers.1.self_attn.q_proj"
    saved = adapted(weights_of(trained(tiny_model)), layer, factors(64, 64))
    del saved[f"{layer}.{missing}"]
    assert_adapter_is_refused(tmp_path / "run", tiny_model, saved, first=r"model\.layers\.1\.self_attn\.q_proj \(Linear\)")


def test_an_adapter_with_more_than_two_factors_is_refused(tmp_path: Path, tiny_model: str):
    layer = "model.layers.1.self_attn.q_proj"
    more = {"lora_magnitude_vector.default.weight": torch.randn(64)}
    saved = adapted(weights_of(trained(tiny_model)), layer, factors(64, 64) | more)
    assert_adapter_is_refused(tmp_path / "run", tiny_model, saved, first=r"model\.layers\.1\.self_attn\.q_proj \(Linear\)")


def test_an_adapter_of_an_output_layer_that_shares_the_embedding_is_refused(tmp_path: Path):
    source = make_tiny_model(tmp_path / "source", tie_word_embeddings=True)
    weights = weights_of(trained(source))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    saved = adapted(weights, "lm_head", factors(64, 66))
    assert_adapter_is_refused(tmp_path / "run", source, saved, first=r"lm_head \(Linear\)")


def test_a_critic_gives_its_backbone_and_its_value_head(tmp_path: Path, tiny_model: str):
    weights = {name: weight for name, weight in weights_of(trained(tiny_model)).items() if name.startswith("model.")}
    head = {"value_head.weight": torch.randn(1, 64), "value_head.bias": torch.randn(1)}
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, {**weights, **head}, role="critic")
    folder = export_checkpoint(checkpoint, tmp_path / "out", role="critic", dtype="float32")
    backbone, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_same_weights(backbone, {name.removeprefix("model."): weight for name, weight in weights.items()})
    values = load_file(folder / "value_head.safetensors")
    assert torch.equal(values["weight"], head["value_head.weight"]) and torch.equal(values["bias"], head["value_head.bias"])


def test_a_checkpoint_of_another_model_is_refused_by_the_first_weight(tmp_path: Path, tiny_model: str):
    weights = weights_of(trained(tiny_model))
    del weights["model.layers.1.mlp.up_proj.weight"]
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, weights)
    with pytest.raises(
        CheckpointError, match=r"first is model\.layers\.1\.mlp\.up_proj\.weight: the checkpoint has none, the model shape"
    ):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, tiny_model: str):
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, weights_of(trained(tiny_model)))
    shard = next((checkpoint / "actor").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="has the checksum"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_a_role_without_weights_is_answered_with_those_that_have_some(tmp_path: Path, tiny_model: str):
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, weights_of(trained(tiny_model)))
    with pytest.raises(CheckpointError, match=r"no weights of role 'critic'\. It has those of: actor"):
        export_checkpoint(checkpoint, tmp_path / "out", role="critic")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, tiny_model: str):
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, weights_of(trained(tiny_model)))
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_checkpoint(checkpoint, tmp_path / "run")


def test_the_command_takes_a_run_and_a_source_that_was_moved(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    weights = weights_of(trained(tiny_model))
    checkpoint_of(tmp_path / "run", "/moved/away", weights)
    command = [str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float32"]
    assert main(command) == 1
    assert "/moved/away" in capsys.readouterr().err
    assert main([*command, "--source", tiny_model]) == 0
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), weights)


def with_generation_settings(source: str, **settings: object) -> bytes:
    path = Path(source) / "generation_config.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**written, **settings}))
    return path.read_bytes()


@pytest.mark.parametrize("settings", [{"temperature": 0.9, "top_p": 0.6}, {"an unknown key": [1]}, {"num_beams": -1}])
def test_generation_settings_are_copied_as_they_are(tmp_path: Path, settings: dict[str, object]):
    source = make_tiny_model(tmp_path / "model")
    content = with_generation_settings(source, **settings)
    folder = export_checkpoint(checkpoint_of(tmp_path / "run", source, weights_of(trained(source))), tmp_path / "out")
    assert (folder / "generation_config.json").read_bytes() == content


def with_code(folder: str, marker: Path) -> str:
    """Let the model of a folder be one that brings its own code, which leaves a file behind when it runs."""
    path = Path(folder) / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    own = "from transformers import Qwen2Config\nclass OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
    (Path(folder) / "own.py").write_text(f"open({str(marker)!r}, 'w')\n{own}")
    return folder


@pytest.mark.parametrize("was_trusted", [True, False])
def test_code_that_a_checkpoint_names_runs_only_where_whoever_exports_says_so(
    tmp_path: Path, was_trusted: bool, capsys: pytest.CaptureFixture[str]
):
    source = make_tiny_model(tmp_path / "model")
    checkpoint = checkpoint_of(tmp_path / "run", source, weights_of(trained(source)), trust_remote_code=was_trusted)
    with_code(source, tmp_path / "ran")
    assert main([str(checkpoint), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    assert ("--trust-remote-code" in capsys.readouterr().err) or not was_trusted
    main([str(checkpoint), str(tmp_path / "out"), "--trust-remote-code"])
    assert (tmp_path / "ran").exists() == was_trusted, "what the run was not allowed to, its export is not either"


@pytest.mark.parametrize("role", ["../other/actor", "..", ".", "/tmp", "", "actor/", "actor/../actor", "*"])
def test_a_role_cannot_leave_the_checkpoint(tmp_path: Path, tiny_model: str, role: str):
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, weights_of(trained(tiny_model)))
    shutil.copytree(checkpoint, checkpoint.with_name("other"))
    with pytest.raises(CheckpointError, match=r"has no weights of role .*It has those of: actor"):
        export_checkpoint(checkpoint, tmp_path / "out", role=role)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"])
def test_mixtures_of_experts_keep_the_tensor_names_of_their_source(tmp_path: Path, model_type: str):
    source = make_every(model_type, tmp_path / "source")
    assert source is not None
    model = trained(source)
    folder = export_checkpoint(checkpoint_of(tmp_path / "run", source, weights_of(model)), tmp_path / "out", dtype="float32")
    names = [set(load_file(Path(at) / "model.safetensors")) for at in (source, folder)]
    assert names[0] == names[1]
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert_same_weights(exported, weights_of(model))
    for (name, buffer), (_, expected) in zip(exported.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_what_is_fixed_in_a_model_comes_from_its_source(tmp_path: Path):
    source = make_every("glm4_moe", tmp_path / "source")
    assert source is not None
    file, name = Path(source) / "model.safetensors", "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(file)
    tensors[name] = torch.arange(4.0)
    save_file(tensors, file, metadata={"format": "pt"})
    weights = weights_of(trained(source))
    folder = export_checkpoint(checkpoint_of(tmp_path / "run", source, weights), tmp_path / "out")
    assert torch.equal(load_file(folder / "model.safetensors")[name], torch.arange(4.0))


@pytest.mark.parametrize(
    ("number", "advised"),
    [
        (errno.ENOSPC, "Make room at"),
        (errno.EACCES, "correct its permissions"),
        (errno.EIO, "see that it works"),
        (errno.ENAMETOOLONG, "Export elsewhere"),
        (None, "Export elsewhere"),
    ],
)
def test_what_is_advised_when_an_export_cannot_be_written_is_of_its_cause(
    number: int | None, advised: str, tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = checkpoint_of(tmp_path / "run", tiny_model, weights_of(trained(tiny_model)))

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "cannot") if number is not None else SafetensorError("cannot")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(export, "save_file", fails)
        export_checkpoint(checkpoint, tmp_path / "out")
    advice = str(caught.value).rpartition("cannot")[2]
    assert advised in advice and ("room" in advice) == (number == errno.ENOSPC)
    assert "lsewhere" in advice and export_checkpoint(checkpoint, tmp_path / "elsewhere").is_dir()
    assert not (tmp_path / "out").exists()
