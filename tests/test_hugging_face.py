"""transformers' cohere2 and this model are one model, in both directions."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY  # noqa: F401  (one thread)

import model as m
import sample
from model import GPT, PRESETS, ModelConfig, UsageError
from train import load_run

hf = pytest.importorskip("transformers", reason="needs the hf extra")

SHAPES = {
    "the defaults": {},
    "GQA, short window, logit scale": dict(
        num_key_value_heads=2, sliding_window=7, logit_scale=0.25
    ),
    "a window larger than the text, theta": dict(
        sliding_window=500, rope_parameters=dict(rope_theta=5e4, rope_type="default")
    ),
    "layer types of its own": dict(
        num_hidden_layers=6, sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"] * 2,
    ),
    "one key head, seven layers": dict(num_key_value_heads=1, num_hidden_layers=7),
}  # fmt: skip


def cohere2(**shape):
    config = hf.Cohere2Config(
        **dict(
            vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, sliding_window=8, max_position_embeddings=64,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        ) | shape
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = hf.Cohere2ForCausalLM(config).eval()
    for p in theirs.parameters():  # large enough for attention to be far from uniform
        torch.nn.init.normal_(p, std=0.2)
    return theirs


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_greedy_text_are_equal_both_ways(shape, tmp_path):
    theirs, idx = cohere2(**shape), torch.randint(99, (2, 40))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")  # several shards
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = theirs(idx).logits
        assert torch.allclose(ours(idx)[0], wanted, atol=1e-4)
        assert torch.allclose(back(idx).logits, wanted, atol=1e-4)
    prompt = idx[:, :6]
    text = theirs.generate(prompt, max_new_tokens=30, do_sample=False)
    assert ours.generate(prompt, 30, temperature=0).equal(text)
    assert back.generate(prompt, max_new_tokens=30, do_sample=False).equal(text)


def test_a_run_of_ours_generates_the_same_text_in_transformers(fit, tmp_path):
    folder = fit(tmp_path / "run", "--max_iters=3")
    ours, _, _ = load_run(folder)
    ours.save_pretrained(tmp_path / "hf")
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = torch.arange(20)[None] + 60
    text = theirs.generate(prompt, max_new_tokens=40, do_sample=False)
    assert ours.generate(prompt, 40, temperature=0).equal(text)


@pytest.mark.parametrize("flags", [
    PRESETS["rope"], PRESETS["llama4"], dict(pattern="SW"), dict(log_scale=True),
    dict(qk_norm=True), dict(attn_scale=0.1),
], ids=str)  # fmt: skip
def test_what_the_format_cannot_say_is_refused_at_saving(flags, tmp_path):
    model = GPT(ModelConfig(vocab_size=64, n_layer=4, n_head=2, n_embd=16, **flags))
    with pytest.raises(UsageError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("change", "told"), [
    (dict(model_type="llama"), "model_type llama"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "scales its RoPE"),
    (dict(num_hidden_layers=8, layer_types=["sliding_attention"] * 8), "lacks the weights"),
    (dict(hidden_size=32), "contradict"),
    (dict(layer_types=["chunked_attention"] * 4), "each of sliding_attention, full_attention"),
    (dict(layer_types=["full_attention"] * 9), "each of sliding_attention, full_attention"),
    (dict(sliding_window=None), "does not say sliding_window"),
], ids=str)  # fmt: skip
def test_a_folder_of_another_model_is_refused_in_a_line(change, told, tmp_path):
    cohere2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=told):
        GPT.from_pretrained(tmp_path)


def test_a_copy_that_was_cut_off_is_refused_in_a_line(tmp_path):
    cohere2().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="model.safetensors is damaged"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="no readable config.json"):
        GPT.from_pretrained(tmp_path)


def test_what_a_config_leaves_open_may_be_given(tmp_path):
    cohere2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | dict(sliding_window=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert GPT.from_pretrained(tmp_path, window=16).config.window == 16
    n = config.pop("num_hidden_layers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert GPT.from_pretrained(tmp_path, window=16, n_layer=n).config.n_layer == n


def test_a_size_asked_for_is_named_where_the_weights_have_another(tmp_path):
    cohere2().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'ffn_dim': 8"):
        GPT.from_pretrained(tmp_path, ffn_dim=8)


def test_a_config_older_than_layer_types_is_read(tmp_path):
    theirs = cohere2()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_types"], config["rope_parameters"]
    (tmp_path / "config.json").write_text(
        json.dumps(config | dict(sliding_window_pattern=2, rope_theta=3e4))
    )
    ours = GPT.from_pretrained(tmp_path)
    assert (ours.config.pattern, ours.config.rope_theta) == ("SN", 3e4)


def test_the_probes_take_such_a_folder_with_its_own_tokenizer(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "red", "green", "blue"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    cohere2().save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    sample.main([str(tmp_path), "--prompt=red green", "--max_new_tokens=5"])
    assert capsys.readouterr().out.startswith("red green")
    sample.main([str(tmp_path), "--probe=cost", "--max_multiple=2", "--cost_rows=1"])
    assert "decoded tokens per second" in capsys.readouterr().out
    with pytest.raises(UsageError, match="names no text to score"):
        sample.main([str(tmp_path), "--probe=loss", "--max_multiple=1"])


def test_a_prompt_begins_as_the_folders_tokenizer_begins_it(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", "red", "green"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    begin = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.post_processor = begin
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>",
                                      eos_token="<eos>")
    fast.save_pretrained(tmp_path)
    enc = sample.hub_tokenizer(tmp_path)
    ids = sample.prepare_data.encode(enc, "red green")
    assert ids.tolist() == [1, 3, 4] and enc.decode(ids) == "red green"
    assert sample.prepare_data.encode(enc, "").tolist() == [1]


def test_a_folder_that_is_not_there_is_one_clear_line():
    with pytest.raises(UsageError, match="nowhere is no folder, and the hub does not give it"):
        GPT.from_pretrained("nowhere")


PUBLISHED = {  # preset: (config class, kinds of layer by index, over one period of the pattern)
    "rnope-swa": ("Cohere2Config", "sliding_attention", "full_attention"),
    "gemma3": ("Gemma3TextConfig", "sliding_attention", "full_attention"),
    "olmo3": ("Olmo3Config", "sliding_attention", "full_attention"),
    "gpt-oss": ("GptOssConfig", "sliding_attention", "full_attention"),
    "llama4": ("Llama4TextConfig", "chunked_attention", "full_attention"),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_neighbours_layers_are_those_of_its_published_config(preset):
    name, local, full = PUBLISHED[preset]
    published = getattr(hf, name)()
    plan = ModelConfig(**PRESETS[preset], n_layer=published.num_hidden_layers).layers
    spans = [local if m.LAYERS[x].span != "full" else full for x in plan]
    assert spans == list(published.layer_types)


def test_smollm3_and_llama4_leave_every_fourth_layer_without_positions():
    for preset, published in (("smollm3", hf.SmolLM3Config()), ("llama4", hf.Llama4TextConfig())):
        plan = ModelConfig(**PRESETS[preset], n_layer=published.num_hidden_layers).layers
        assert [m.LAYERS[x].rope for x in plan] == [bool(r) for r in published.no_rope_layers]


def test_gemma3_and_llama4_keep_their_published_constants():
    gemma, llama = hf.Gemma3TextConfig(), hf.Llama4TextConfig()
    ours = ModelConfig(**PRESETS["gemma3"])
    theta = gemma.rope_parameters
    assert theta["sliding_attention"]["rope_theta"] == ours.rope_theta
    assert theta["full_attention"]["rope_theta"] == ours.rope_theta_full
    assert np.isclose(llama.attn_scale, PRESETS["llama4"]["attn_scale"])


def test_a_folder_without_a_tokenizer_can_be_timed_only(tmp_path, capsys):
    cohere2().save_pretrained(tmp_path)
    sample.main([str(tmp_path), "--probe=cost", "--max_multiple=1", "--cost_rows=1"])
    assert "decoded tokens per second" in capsys.readouterr().out
    with pytest.raises(UsageError, match="has no tokenizer"):
        sample.main([str(tmp_path), "--prompt=def"])
