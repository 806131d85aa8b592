"""Checkpoints: every wrapping in use gives the same weights; what does not fit is named."""

import json
import resource
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_wan import CONFIG, tiny_inputs, tiny_model

from raven.checkpoint import (
    infer_config,
    load_checkpoint,
    load_metadata,
    load_model,
    normalize_state_dict,
    save_checkpoint,
)
from raven.repack import bidirectional_forward

DIFFUSERS = {
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "head.head.": "proj_out.",
    "head.modulation": "scale_shift_table",
    ".modulation": ".scale_shift_table",
    "self_attn.": "attn1.",
    "cross_attn.": "attn2.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".o.": ".to_out.0.",
    "norm3": "norm2",
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
}


def as_diffusers(name):
    for ours, theirs in DIFFUSERS.items():
        name = name.replace(ours, theirs)
    return name


def fsdp(name):
    first, _, rest = name.partition(".")
    if first == "blocks":
        number, _, rest = rest.partition(".")
        first = f"blocks.{number}._fsdp_wrapped_module._checkpoint_wrapped_module"
    return f"model._fsdp_wrapped_module.{first}.{rest}"


WRAPPINGS = {
    "plain": lambda sd: sd,
    "generator": lambda sd: {"generator": sd, "step": 3},
    "generator_ema": lambda sd: {"critic": {}, "generator": {}, "generator_ema": sd},
    "critic": lambda sd: {"critic": sd},
    "model": lambda sd: {"model": sd},
    "state_dict": lambda sd: {"state_dict": sd, "epoch": 1},
    "two levels": lambda sd: {"generator": {"model": sd}},
    "model.": lambda sd: {"model." + k: v for k, v in sd.items()},
    "net.": lambda sd: {"net." + k: v for k, v in sd.items()},
    "module.model.": lambda sd: {"module.model." + k: v for k, v in sd.items()},
    "compiled": lambda sd: {"_orig_mod." + k: v for k, v in sd.items()},
    "fsdp": lambda sd: {"generator": {fsdp(k): v for k, v in sd.items()}},
    "diffusers": lambda sd: {as_diffusers(k): v for k, v in sd.items()},
    "diffusers in a pipeline": lambda sd: {"transformer." + as_diffusers(k): v for k, v in sd.items()},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_every_wrapping(model, wrap):
    want = model.state_dict()
    found = normalize_state_dict(wrap(OrderedDict(want)), CONFIG)
    found.require_complete()
    assert list(found.state) == list(want)
    assert all(torch.equal(found.state[name], want[name]) for name in want)


def test_part_is_chosen_by_name(model):
    want = model.state_dict()
    other = {name: value + 1 for name, value in want.items()}
    both = {"generator": want, "critic": other}
    assert normalize_state_dict(both, CONFIG).part == "generator"
    found = normalize_state_dict(both, CONFIG, part="critic")
    assert found.part == "critic" and torch.equal(found.state["head.modulation"], other["head.modulation"])
    with pytest.raises(ValueError, match="part: got 'generator_ema', expected one of generator, critic"):
        normalize_state_dict(both, CONFIG, part="generator_ema")


def test_missing_and_unused_are_reported(model):
    state = dict(model.state_dict())
    del state["blocks.1.ffn.0.bias"]
    state["model.blocks.0.self_attn.rope"] = torch.zeros(1)
    state["step"] = 7
    found = normalize_state_dict(state, CONFIG)
    assert found.missing == ("blocks.1.ffn.0.bias",)
    assert set(found.unused) == {"model.blocks.0.self_attn.rope", "step"}
    with pytest.raises(ValueError, match=r"1 missing \(blocks.1.ffn.0.bias\) and 2 unused \(step, model.blocks.0"):
        found.require_complete()


def test_wrong_size_names_the_key_and_both_shapes(model):
    state = {"model." + name: value for name, value in model.state_dict().items()}
    message = r"model.blocks.0.ffn.0.weight: got shape \(48, 64\), expected \(56, 64\)"
    with pytest.raises(ValueError, match=message):
        normalize_state_dict(state, replace(CONFIG, ffn_dim=56))


def test_two_keys_for_one_name(model):
    state = {**model.state_dict(), "model.head.modulation": torch.zeros(1, 2, 64)}
    with pytest.raises(ValueError, match="got 'head.modulation' and 'model.head.modulation'"):
        normalize_state_dict(state, CONFIG)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"cross_attn_norm": False}, {"patch_size": (1, 4, 4)}])
def test_config_from_shapes(changes):
    config = replace(CONFIG, **changes)
    state = tiny_model(config=config).state_dict()
    assert infer_config(state, head_dim=config.head_dim, text_len=config.text_len) == config
    with pytest.raises(ValueError, match=r"patch_embedding.weight: got shape .* expected \[n x 128"):
        infer_config(state)
    with pytest.raises(ValueError, match="got no 'head.head.weight'"):
        infer_config({name: value for name, value in state.items() if name != "head.head.weight"})


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_save_and_load(tmp_path, model, dtype):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, dtype, {"levels": "[1.0, 0.625]"})
    assert load_metadata(path)["levels"] == "[1.0, 0.625]"
    loaded = load_model(path, dtype=torch.float32)
    assert loaded.config == CONFIG and loaded.dtype == torch.float32
    assert all(w.requires_grad for w in loaded.parameters())
    x, _, t, context = tiny_inputs(2)
    want = bidirectional_forward(model if dtype is None else tiny_model(dtype).float(), x, t, context)
    assert torch.equal(bidirectional_forward(loaded, x, t, context), want)
    assert load_model(path).dtype == (dtype or torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_saved_file_can_be_read_by_whom_the_umask_lets(tmp_path, model):
    save_checkpoint(tmp_path / "model.safetensors", model)
    (tmp_path / "plain").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("model.safetensors", "plain")]
    assert modes[0] == modes[1]


def test_failed_save_leaves_the_old_file(tmp_path, model):
    path = tmp_path / "model.safetensors"
    path.mkdir()
    (path / "kept").write_text("old")
    with pytest.raises(OSError, match="model.safetensors"):
        save_checkpoint(path, model)
    assert (path / "kept").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_full_disk_leaves_the_old_file(tmp_path, model):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write .*model.safetensors"):
            save_checkpoint(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("text, message", [("{", "is not a JSON file"), ("3", "holds a JSON int")])
def test_unreadable_config_beside_a_checkpoint_is_named(tmp_path, model, text, message):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        load_model(tmp_path)


def test_torch_file_and_folder_with_config(tmp_path, model):
    torch.save({"generator_ema": {"model." + k: v for k, v in model.state_dict().items()}}, tmp_path / "model.pt")
    CONFIG.to_json(tmp_path / "config.json")
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    torch.save(model.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert load_model(tmp_path / "legacy.pt").config == CONFIG
    with pytest.raises(ValueError, match="holds legacy.pt, model.pt, expected one checkpoint"):
        load_model(tmp_path)


def test_shards(tmp_path, model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = list(state)
    index = {}
    for i, part in enumerate((names[:20], names[20:])):
        save_file({name: state[name] for name in part}, tmp_path / f"part-{i}.safetensors")
        index.update(dict.fromkeys(part, f"part-{i}.safetensors"))
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    loaded = load_model(path, CONFIG)
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in names)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-1.safetensors"):
        load_model(path, CONFIG)


class Payload:
    """What must never run: an object whose unpickling calls a function."""

    def __reduce__(self):
        return (print, ("executed",))


def test_unreadable_files(tmp_path, capsys):
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.zeros(1000)}, whole)
    cases = {
        "empty.pt": b"",
        "noise.pt": b"\x80\x02not a checkpoint" * 9,
        "text.pt": b"hello world",
        "truncated.pt": whole.read_bytes()[:500],
        "empty.safetensors": b"",
        "noise.safetensors": b"\xff" * 64,
        "bad.safetensors.index.json": b"{",
        "other.safetensors.index.json": b"{}",
        "list.safetensors.index.json": b"[]",
        "self.safetensors.index.json": b'{"weight_map": {"a": "self.safetensors.index.json"}}',
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a checkpoint"):
            load_checkpoint(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a checkpoint"):
            load_model(tmp_path / name)
    torch.save({"state_dict": Payload()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="code.pt cannot be read as a checkpoint of weights"):
        load_checkpoint(tmp_path / "code.pt")
    assert "executed" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds a list"):
        load_checkpoint(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        load_model(tmp_path / "absent.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .safetensors"):
        load_model(tmp_path / "folder")
