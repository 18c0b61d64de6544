"""A damaged or foreign checkpoint: the error names the file and the tensor, and nothing is loaded by halves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimoflash.checkpoint import load as load_module
from mimoflash.checkpoint import load_model, save_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, make_model):
    save_model(make_model(hidden_size=144), tmp_path / "m", dtype="fp8", max_shard_bytes=150_000)
    return tmp_path / "m"


def edit(folder, name, change):
    """Applies `change` to the tensors of the shard that holds `name`, and to the index what follows from it."""
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    kept = {k: v for k, v in index["weight_map"].items() if v != file.name}
    (folder / INDEX).write_text(json.dumps({"weight_map": kept | dict.fromkeys(tensors, file.name)}))
    return file.name


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_missing_tensor(folder):
    edit(folder, NAME, lambda tensors: (tensors.pop(NAME), tensors.pop(f"{NAME}_scale_inv")))
    with pytest.raises(ValueError, match=rf"{NAME} is missing"):
        load_model(folder)


def test_extra_tensor(folder):
    extra = "model.layers.1.self_attn.q_norm.weight"
    file = edit(folder, NAME, lambda tensors: tensors.update({extra: torch.ones(4)}))
    with pytest.raises(ValueError, match=rf"{file}: {extra} has no place"):
        load_model(folder)


def test_towers_of_other_senses_are_passed_over_aloud(folder):
    edit(folder, NAME, lambda tensors: tensors.update({"visual.blocks.0.weight": torch.ones(4)}))
    with pytest.warns(UserWarning, match=r"visual\.blocks\.0\.weight is no part of the language model"):
        load_model(folder)


def test_misshapen_tensor(folder):
    file = edit(folder, NAME, lambda tensors: tensors.update({NAME: tensors[NAME][:-1].clone()}))
    with pytest.raises(ValueError, match=rf"{file}: {NAME} is \(31, 144\), but config\.json makes it \(32, 144\)"):
        load_model(folder)


def test_missing_scale(folder):
    file = edit(folder, NAME, lambda tensors: tensors.pop(f"{NAME}_scale_inv"))
    with pytest.raises(ValueError, match=rf"{file}: {NAME} is FP8 but its {NAME}_scale_inv is missing"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_not_finite(folder, value):
    file = edit(folder, NAME, lambda tensors: tensors[f"{NAME}_scale_inv"].fill_(value))
    with pytest.raises(ValueError, match=rf"{file}: {NAME}: weight_scale_inv .* not finite"):
        load_model(folder)


def test_misshapen_scale(folder):
    scale = f"{NAME}_scale_inv"
    file = edit(folder, NAME, lambda tensors: tensors.update({scale: tensors[scale].repeat(2, 1)}))
    with pytest.raises(ValueError, match=rf"{file}: {NAME}: weight_scale_inv is \(2, 2\)"):
        load_model(folder)


def test_a_scale_in_another_shard_is_found(folder, make_model):
    scale = load_file(folder / json.loads((folder / INDEX).read_text())["weight_map"][NAME])[f"{NAME}_scale_inv"]
    edit(folder, NAME, lambda tensors: tensors.pop(f"{NAME}_scale_inv"))
    edit(folder, "model.norm.weight", lambda tensors: tensors.update({f"{NAME}_scale_inv": scale}))
    up = load_model(folder, dtype="float32").model.layers[1].mlp.experts.gate_up_proj[3, 32:]
    assert (up - make_model(hidden_size=144).model.layers[1].mlp.experts.gate_up_proj[3, 32:]).abs().max() < 0.02


@pytest.mark.parametrize("kept", [4, 500, -1])
def test_truncated_file(folder, kept):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{file.name}: cut off or not a safetensors file"):
        load_model(folder)


def test_index_names_a_missing_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=rf"{INDEX}: names {file.name}, which is missing"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 5, ".."])
def test_index_that_leaves_the_folder(folder, name):
    save_file({"x": torch.ones(1)}, folder.parent / "other.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NAME] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is not the plain name of a \.safetensors file"):
        load_model(folder)


def test_index_that_says_another_shard(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NAME] = index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"holds {NAME}, which it does not"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_index_that_is_none(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX}: not an index"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(tmp_path, make_model, name):
    (tmp_path / "m").mkdir()
    make_model().config.save(tmp_path / "m")
    torch.save({}, tmp_path / "m" / name)
    for path in (tmp_path / "m", tmp_path / "m" / name):
        with pytest.raises(ValueError, match=rf"{name}: pickled weights can run code .* convert them"):
            load_model(path)


def test_folders_that_are_no_model(tmp_path, make_model):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)
    make_model().config.save(tmp_path)
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(ValueError, match="give the model's folder"):
        load_model(tmp_path / "config.json")
    with pytest.raises(ValueError, match="dtype 'int3' is not one of"):
        load_model(tmp_path, dtype="int3")


def test_head_that_is_tied_and_another(tmp_path, make_model):
    save_model(make_model(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"ties the head .* lm_head\.weight is not equal"):
        load_model(tmp_path / "m")


def test_the_hub_is_asked_for_an_id_and_its_failure_explained(tmp_path, make_model, monkeypatch):
    import huggingface_hub

    save_model(make_model(), tmp_path / "m")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **_: str(tmp_path / "m"))
    assert load_module.resolve("owner/name") == tmp_path / "m"

    def no_network(hub_id, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(ValueError, match=r"owner/name: .* could not be fetched from the hub \(no route to host\)"):
        load_model("owner/name")
