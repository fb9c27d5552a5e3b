"""This model and transformers' cohere2 are one model, in both directions."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch

from model import GPT, LAYERS, PRESETS, ModelConfig, UsageError

transformers = pytest.importorskip("transformers", reason="needs the hf extra")
from safetensors.torch import load_file, save_file  # noqa: E402


def cohere2(**change):
    """A random model of transformers' own class, with weights that make attention uneven."""
    settings = dict(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, max_position_embeddings=64,
        rope_parameters=dict(rope_type="default", rope_theta=5e4),
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.Cohere2ForCausalLM(transformers.Cohere2Config(**settings | change))
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    return theirs.eval()


base = functools.cache(cohere2)


def write_folder(folder, drop=(), weights=None, **change):
    """Save `base` with an edited config.json. weights: a function of its state dict."""
    base().save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    if weights:
        state = weights(load_file(folder / "model.safetensors"))
        save_file(state, folder / "model.safetensors", metadata=dict(format="pt"))
    return folder


def refusal(folder, **override):
    """What from_pretrained says: one line."""
    with pytest.raises(UsageError) as error:
        GPT.from_pretrained(folder, **override)
    line = str(error.value)
    assert "\n" not in line
    return line


# ---- Both ways ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {},
    dict(num_key_value_heads=4, sliding_window=3, logit_scale=0.25, layer_norm_eps=1e-3),
    dict(num_key_value_heads=1, num_hidden_layers=7, sliding_window=500),
    dict(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]),
], ids=["as it comes", "no GQA", "one key head", "layer types of its own"])  # fmt: skip
@torch.no_grad()
def test_logits_and_greedy_text_are_equal_both_ways(change, tmp_path):
    theirs = cohere2(**change)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1  # read from shards
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    idx = torch.randint(99, (2, 40), generator=torch.Generator().manual_seed(1))
    wanted = theirs(idx).logits
    torch.testing.assert_close(ours(idx)[0], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back(idx).logits, wanted, atol=1e-4, rtol=1e-4)
    text = theirs.generate(idx[:, :6], max_new_tokens=20, do_sample=False)
    assert ours.generate(idx[:, :6], 20, temperature=0).equal(text)
    assert back.generate(idx[:, :6], max_new_tokens=20, do_sample=False).equal(text)


def test_weights_have_the_names_of_cohere2():
    model = GPT(ModelConfig(vocab_size=99, n_layer=4, n_head=4, n_embd=64))
    assert model.state_dict().keys() == base().model.state_dict().keys()


def test_a_saved_folder_is_whole_and_says_theta_where_transformers_4_looks(tmp_path):
    model = GPT(ModelConfig(vocab_size=99, n_layer=4, n_head=4, n_embd=64, rope_theta=7e4))
    for _ in range(2):  # a second time over the first
        model.save_pretrained(tmp_path / "new" / "folder")
    files = {file.name for file in (tmp_path / "new" / "folder").iterdir()}
    assert {"config.json", "model.safetensors"} <= files
    assert not [name for name in files if name.startswith("tmp")]
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 7e4


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    ours = GPT.from_pretrained(write_folder(tmp_path))
    before = (tmp_path / "model.safetensors").read_bytes()

    def disk_full(self, folder):
        (Path(folder) / "model.safetensors").write_text("half of i")
        raise OSError("disk full")

    monkeypatch.setattr(transformers.Cohere2ForCausalLM, "save_pretrained", disk_full)
    with pytest.raises(OSError, match="disk full"):
        ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not [x for x in tmp_path.iterdir() if x.is_dir()]


@pytest.mark.parametrize("flags", [
    PRESETS["rope"], PRESETS["llama4"], dict(pattern="SW"), dict(log_scale=True),
    dict(qk_norm=True), dict(attn_scale=0.1),
], ids=str)  # fmt: skip
def test_what_the_format_cannot_say_is_refused_at_saving(flags, tmp_path):
    model = GPT(ModelConfig(vocab_size=64, n_layer=4, n_head=2, n_embd=16, **flags))
    with pytest.raises(UsageError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


# ---- What is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("drop, change, expected", [
    (["rope_parameters"], dict(rope_theta=30000), dict(rope_theta=30000)),
    (["layer_types"], dict(sliding_window_pattern=2), dict(pattern="SNSN")),
    (["layer_types"], {}, dict(pattern="SSSN")),
    ([], {}, dict(rope_theta=5e4, n_kv_head=2, window=8, block_size=64, logit_scale=0.0625)),
], ids=str)  # fmt: skip
def test_older_configs_are_read(drop, change, expected, tmp_path):
    config = GPT.from_pretrained(write_folder(tmp_path, drop, **change)).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_null_number_of_key_heads_means_as_many_as_query_heads(tmp_path):
    def no_gqa(state):
        wide = ("k_proj.weight", "v_proj.weight")
        return {k: v.repeat(2, 1) if k.endswith(wide) else v for k, v in state.items()}

    folder = write_folder(tmp_path, weights=no_gqa, num_key_value_heads=None)
    assert GPT.from_pretrained(folder).config.n_kv_head == 4


def test_fields_may_be_overridden(tmp_path):
    folder = write_folder(tmp_path, sliding_window=None)
    assert "window" in refusal(folder)
    config = GPT.from_pretrained(folder, block_size=128, window=5, log_scale=True).config
    assert (config.block_size, config.window, config.log_scale) == (128, 5, True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        GPT.from_pretrained(folder, window=5, ffn_dim=8)


@pytest.mark.parametrize("dtype, expected", [
    ("bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16), ("auto", torch.float32),
    (torch.float32, torch.float32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("part", ["mlp", "norm", "nothing"])
def test_loaded_weights_have_one_dtype(dtype, expected, part, tmp_path):
    def mix(state):
        return {k: v.bfloat16() if part in k else v for k, v in state.items()}

    model = GPT.from_pretrained(write_folder(tmp_path, weights=mix), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not model.training
    assert model(torch.tensor([[1, 2, 3]]))[0].isfinite().all()


def test_bin_weights_are_read(tmp_path):
    write_folder(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    state = GPT.from_pretrained(tmp_path).state_dict()
    assert all(state[name].equal(value) for name, value in base().model.state_dict().items())


# ---- What is refused, in one line ---------------------------------------------------------------

NO_ROPE = ["rope_parameters"]


@pytest.mark.parametrize("drop, change, told", [
    ([], dict(model_type="llama"), "model_type llama"),
    ([], dict(model_type="cohere"), "model_type cohere"),
    ([], dict(model_type="unheard-of"), "unheard-of"),
    ([], dict(attention_bias=True), "attention_bias"),
    ([], dict(hidden_act="gelu"), "hidden_act gelu"),
    ([], dict(tie_word_embeddings=False), "tie_word_embeddings"),
    ([], dict(quantization_config=dict(quant_method="fp8")), "quantization_config"),
    ([], dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)), "RoPE"),
    (NO_ROPE, dict(rope_theta=1e4, rope_scaling=dict(rope_type="linear", factor=2.0)), "RoPE"),
    (NO_ROPE, dict(rope_theta=1e4, rope_scaling=dict(type="dynamic", factor=2.0)), "RoPE"),
    ([], dict(rope_parameters=dict(rope_type="default")), "rope_theta"),
    ([], dict(rope_parameters=dict(rope_type="default", rope_theta=None)), "rope_theta"),
    (NO_ROPE, {}, "rope_theta"),
    (NO_ROPE, dict(rope_theta=None), "rope_theta"),
    ([], dict(num_hidden_layers="4"), "num_hidden_layers"),
    ([], dict(hidden_size="64"), "hidden_size"),
    ([], dict(layer_types=["chunked_attention"] * 4), "chunked_attention"),
    ([], dict(layer_types=["full_attention"] * 9), "layer_types"),
    ([], dict(num_hidden_layers=8, layer_types=["full_attention"] * 8), "missing_keys .*layers.4"),
    ([], dict(num_hidden_layers=2, layer_types=["full_attention"] * 2), "unexpected_keys"),
    ([], dict(hidden_size=32), "heads of"),
    ([], dict(head_dim=32), "heads of 32"),
], ids=str)  # fmt: skip
def test_a_config_that_says_what_gpt_does_not_do(drop, change, told, tmp_path):
    line = refusal(write_folder(tmp_path, drop, **change))
    assert re.search(told, line), line


@pytest.mark.parametrize("name, told", [
    ("model.layers.0.self_attn.q_proj.bias", "unexpected_keys"),
    ("model.layers.0.self_attn.q_norm.weight", "unexpected_keys"),
    ("model.layers.0.self_attn.q_proj.weight_scale", "unexpected_keys"),
    ("lm_head.weight", "only tied weights"),
])  # fmt: skip
def test_weights_that_gpt_has_no_place_for(name, told, tmp_path):
    folder = write_folder(tmp_path, weights=lambda state: state | {name: torch.randn(99, 64)})
    assert told in refusal(folder)


def test_weights_that_are_missing(tmp_path):
    lost = "model.layers.1.mlp.up_proj.weight"
    folder = write_folder(tmp_path / "a", weights=lambda s: {k: s[k] for k in s if k != lost})
    assert lost in refusal(folder)
    base().save_pretrained(tmp_path / "b", max_shard_size="50KB")
    next((tmp_path / "b").glob("*00002*")).unlink()
    assert "00002" in refusal(tmp_path / "b")


def test_damaged_files(tmp_path):
    weights = write_folder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(tmp_path) in refusal(tmp_path)
    weights.unlink()
    assert "model.safetensors" in refusal(tmp_path)
    for text in ("[1]", "{", ""):
        (tmp_path / "config.json").write_text(text)
        assert str(tmp_path) in refusal(tmp_path)


def test_a_folder_that_is_not_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nowhere", "nobody/nothing", "a/b/c"):
        assert refusal(name).startswith(f"{name} cannot be read")


# ---- Presets are the published models -----------------------------------------------------------

PUBLISHED = {
    "rnope-swa": "Cohere2Config",
    "exaone4": "Exaone4Config",
    "gemma3": "Gemma3TextConfig",
    "olmo3": "Olmo3Config",
    "gpt-oss": "GptOssConfig",
    "llama4": "Llama4TextConfig",
    "smollm3": "SmolLM3Config",
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_layers_of_its_published_config(preset):
    published = getattr(transformers, PUBLISHED[preset])()
    layers = ModelConfig(**PRESETS[preset], n_layer=published.num_hidden_layers).layers
    local = [LAYERS[x][1] != "full" for x in layers]
    assert local == [x != "full_attention" for x in published.layer_types]
    if hasattr(published, "no_rope_layers"):  # theirs is 1 where there is RoPE
        rotated = [LAYERS[x][0] == "rope" for x in layers]
        assert rotated == [bool(x) for x in published.no_rope_layers]


def test_presets_have_the_published_constants():
    gemma = transformers.Gemma3TextConfig().rope_parameters
    ours = ModelConfig(**PRESETS["gemma3"], n_layer=6)
    assert ours.rope_theta == gemma["sliding_attention"]["rope_theta"]
    assert ours.rope_theta_full == gemma["full_attention"]["rope_theta"]
    llama = transformers.Llama4TextConfig()
    assert PRESETS["llama4"]["attn_scale"] == pytest.approx(llama.attn_scale)
    assert PRESETS["llama4"]["rope_theta"] == llama.rope_parameters["rope_theta"]
    gpt_oss = transformers.GptOssConfig().rope_parameters
    assert PRESETS["gpt-oss"]["rope_theta"] == gpt_oss["rope_theta"]
