"""Any text and any cohere2 model in the probes, a second stage from one, and the way out again."""

import json
import math
import random
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import prepare_data
import sample
import train
from model import GPT, ModelConfig, UsageError
from sample import Run, SampleConfig

transformers = pytest.importorskip("transformers", reason="needs the hf extra")
from tokenizers import (  # noqa: E402
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402

T = 128  # of the models here
WORDS = ["def", "alpha(beta):", "return", "gamma", "café", "naïve", "☃", "<|end|>", "über\n"]
RNG = random.Random(0)
TEXT = " ".join(RNG.choices(WORDS, k=6000)) + " 20261126" * 99
ODD = ["", "é", "a\r\n\t \n\n  b", "I'll  it's 1234 x_1", "☃\U0001f600中文 e\u0301", "\x01\x7f\x00",
       "<|endoftext|><|end|>", *("".join(RNG.choices("ab é☃\n'9.\U0001f600", k=30)) for _ in "123")]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
PROBES = "loss,copy,needle,heatmap,attention"


def byte_level(vocab=None, merges=None):
    """A tokenizer of the kind that GPT-2 and Cohere have, trained on TEXT unless it is given."""
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if vocab is None:
        made.train_from_iterator([TEXT], trainers.BpeTrainer(
            vocab_size=360, special_tokens=["<|end|>"], initial_alphabet=ALPHABET,
            show_progress=False))  # fmt: skip
    return made


def sentencepiece():
    """One of the kind that Llama has: ▁ for a space, <0x0A> for a byte that no token holds."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<|end|>", *(f"<0x{n:02X}>" for n in range(256))]
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return made


def write_tokenizer(folder, made, eos="<|end|>", **special):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, **special)
    theirs.save_pretrained(folder)
    return theirs


def write_model(folder, dtype=torch.float32, **change):
    """A random cohere2 model in folder, whose attention is uneven."""
    settings = dict(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, max_position_embeddings=T,
        rope_parameters=dict(rope_type="default", rope_theta=5e4),
        pad_token_id=None, bos_token_id=None, eos_token_id=0, logit_scale=8.0,
    )  # fmt: skip
    theirs = transformers.Cohere2ForCausalLM(transformers.Cohere2Config(**settings | change))
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    theirs.to(dtype).save_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder with a model and a tokenizer that transformers has written."""
    folder = tmp_path_factory.mktemp("theirs")
    write_model(folder)
    write_tokenizer(folder, byte_level())
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    monkeypatch.setattr(sample, "draw", lambda *what: None)  # it takes a second


@pytest.fixture
def copied(theirs, tmp_path):
    """A copy of the folder, to write into."""
    return shutil.copytree(theirs, tmp_path / "copied")


@pytest.fixture
def opened(theirs, text):
    """opened(folder, **flags): a small Run on the text."""

    def make(folder=theirs, **flags):
        small = dict(text=(str(text),), device="cpu", samples=3, max_multiple=2, needles=1)
        return Run(folder, SampleConfig(**small | dict(digits=2) | flags))

    return make


def ask(folder, *flags):
    """sample.main, small enough for a test. Returns what it wrote to probe.json."""
    small = ["--device=cpu", "--max_multiple=2", "--samples=2", "--needles=1", "--digits=2"]
    sample.main([str(folder), *small, *flags])
    return json.loads(Path(folder, "probe.json").read_text())


def their_logits(folder, rows):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.from_numpy(rows[:, :-1].astype(np.int64))).logits


# ---- The numbers are those of transformers ------------------------------------------------------


def bits(folder, rows, n):
    """Bits per byte of the last n tokens, by transformers' model and tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    targets = torch.from_numpy(rows[:, -n:].astype(np.int64))
    logits = their_logits(folder, rows)[:, -n:, : len(tokenizer)]
    nats = F.cross_entropy(logits.mT, targets, reduction="sum").item()
    ends = (targets == tokenizer.eos_token_id).sum().item()  # each counts as a byte
    told = "".join(tokenizer.decode(row[row != tokenizer.eos_token_id]) for row in targets)
    assert "\ufffd" not in told  # no character of this text is cut
    return nats / math.log(2) / (ends + len(told.encode()))


@pytest.mark.parametrize("length", [T, 2 * T])
def test_loss_and_copy_are_those_of_transformers(theirs, opened, length):
    run = opened()
    ids = transformers.AutoTokenizer.from_pretrained(theirs).encode(
        TEXT, split_special_tokens=True, add_special_tokens=False
    )
    assert run.text.tolist() == [*ids, 0]  # <|end|> in the text is text, at its end a token
    rows = run.rows(length)
    assert rows.shape == (3, length + 1)
    found = sample.probe_loss(run, length)["bits_per_byte"]
    assert found == pytest.approx(bits(theirs, rows, T // 4), rel=1e-4)
    found = sample.probe_copy(run, length)
    assert found["first"] == pytest.approx(bits(theirs, rows, T // 4), rel=1e-4)
    train.plant_passage(rows, T // 4, train.stream("copy", run.cfg.seed).random(3))
    assert found["again"] == pytest.approx(bits(theirs, rows, T // 4), rel=1e-4)
    assert found["again"] != pytest.approx(found["first"], rel=3e-4)


def test_attention_is_that_of_transformers(theirs, opened):
    run = opened()
    row, n, _ = sample.plant(run, run.rows(2 * T)[0], 0)
    found = []
    sample.watch_attention(run, row, n, lambda letter, weights: found.append(weights))
    eager = transformers.AutoModelForCausalLM.from_pretrained(theirs, attn_implementation="eager")
    with torch.no_grad():
        out = eager(torch.from_numpy(row[None, :-1].astype(np.int64)), output_attentions=True)
    for ours, wanted in zip(found, out.attentions, strict=True):
        torch.testing.assert_close(ours, wanted[0, :, -n:], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("right", [True, False])
def test_a_question_counts_if_transformers_would_answer_it(theirs, opened, monkeypatch, right):
    run = opened(samples=2)
    row, n, cuts = sample.plant(run, run.rows(T)[0], 0)
    for _ in range(n):  # each time, one more token has the right ones before it
        logits = their_logits(theirs, row[None])[0, -n:, : run.enc.n_vocab]
        row[-n:] = logits.argmax(-1).numpy()
    row[-1] += not right
    monkeypatch.setattr(sample, "plant_all", lambda *x: [(row, n, cuts)] * 2)
    assert sample.probe_needle(run, T)["answered"] == right


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("odd", [*ODD, TEXT[:2000]], ids=range(len(ODD) + 1))
def test_tokens_are_counted_as_the_bytes_of_their_text(make, odd, tmp_path):
    write_tokenizer(tmp_path, make())
    enc = prepare_data.encoding(f"{tmp_path}/")
    ids = prepare_data.encode(enc, odd)
    assert enc.eot_token not in ids
    for stop in range(len(ids) + 1):
        before = enc.decode(ids[:stop])
        if "\ufffd" not in before:  # or a character is cut there
            assert odd.startswith(before)
            assert prepare_data.count_bytes(enc, ids[:stop]) == len(before.encode())
    assert before == odd


def test_added_tokens_are_counted_as_they_are_spelled(tmp_path):
    theirs = write_tokenizer(tmp_path, byte_level())
    theirs.add_tokens(["école", "é"])
    theirs.save_pretrained(tmp_path)
    text = "une école, été"
    enc = prepare_data.encoding(f"{tmp_path}/")
    assert prepare_data.count_bytes(enc, prepare_data.encode(enc, text)) == len(text.encode())


@pytest.mark.parametrize("lossy", [False, True])
def test_a_tokenizer_that_loses_bytes_is_told(tmp_path, text, capsys, lossy):
    made = byte_level()
    if lossy:
        made.normalizer = normalizers.Replace(" ", "")
    write_tokenizer(tmp_path, made)
    flags = [f"--dataset={text}", f"--tokenizer={tmp_path}", f"--data_dir={tmp_path}/data"]
    prepare_data.main(flags)
    assert ("so bits per byte are not exact" in capsys.readouterr().err) == lossy


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_every_probe_runs_in_every_dtype(tmp_path, text, theirs, stored, dtype, opened):
    write_model(tmp_path, stored)
    write_tokenizer(tmp_path, byte_level())
    found = ask(tmp_path, f"--text={text}", f"--probe={PROBES}", f"--dtype={dtype}")
    assert set(PROBES.split(",")) <= found.keys()
    half = "bfloat16" if dtype == "bfloat16" or (dtype, stored) == ("auto", torch.bfloat16) else ""
    assert found["device"] == f"cpu {torch.bfloat16 if half else torch.float32}"
    run = opened(tmp_path, dtype=dtype)  # in bfloat16, autocast rounds what is float32
    assert (run.model.dtype == torch.bfloat16) == bool(half and stored == torch.bfloat16)
    for length in (T, 2 * T):
        exact = sample.probe_loss(opened(samples=2), length)["bits_per_byte"]
        told = found["loss"][str(length)]["bits_per_byte"]
        assert told == pytest.approx(exact, rel=0.02)
        assert (told == exact) == (not half and stored == torch.float32)
        shares = [found["attention"][str(length)][f"N {x}"] for x in ("begin", "needle", "qc")]
        assert 0 < sum(shares) < 1


def test_the_context_is_the_model_s_unless_block_size_is_given(opened):
    assert opened().lengths == [T, 2 * T]
    run = opened(block_size=60, factor=3, max_multiple=9)
    assert run.lengths == [60, 180, 540]
    assert run.rows(180).shape == (3, 181)
    assert sample.probe_loss(run, 60)["bits_per_byte"] > 0


class Largest(TorchDispatchMode):
    """The most numbers that one tensor holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("probe", ["loss", "copy", "needle", "attention"])
def test_no_tensor_grows_faster_than_the_context(opened, probe):
    sizes = []
    for length in (8 * T, 32 * T):
        with Largest() as largest:
            sample.PROBES[probe](opened(samples=1, max_multiple=32), length)
        sizes.append(largest.numbers)
    assert sizes[1] < 4.5 * sizes[0]


# ---- Any text -----------------------------------------------------------------------------------


def test_files_and_folders_are_read_without_prepare_data(tiny_run, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "short.txt").write_text("short é")
    (tmp_path / "long.txt").write_text("a longer text")
    (tmp_path / "meta.json").write_text('{"of": "something else"}')
    (tmp_path / "picture").write_bytes(bytes(99))
    end = "<|endoftext|>"
    expected = f'{{"of": "something else"}}{end}a longer text{end}short é{end}'
    for twice in ([], [str(tmp_path / "sub" / "short.txt")]):  # a file comes once
        run = Run(tiny_run, SampleConfig(text=(str(tmp_path), *twice), device="cpu"))
        assert run.enc.decode(run.text.tolist()) == expected
    assert {path.name for path in tmp_path.iterdir()} == {
        "sub", "long.txt", "meta.json", "picture"
    }  # fmt: skip


def test_a_dataset_among_several_texts_is_not_taken_alone(tiny_run):
    run = Run(tiny_run, SampleConfig(text=("tiny", "nowhere"), device="cpu"))
    with pytest.raises(UsageError, match="is no file"):
        run.text  # noqa: B018


# ---- A second stage -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_data(theirs, text, tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    flags = [f"--dataset={text}", f"--data_dir={made}", "--name=bpe", "--val_frac=0.3"]
    prepare_data.main([*flags, f"--tokenizer={theirs}"])
    return made


def second_stage(folder, theirs, their_data, *flags):
    train.main([
        f"--init_from={theirs}", f"--data_dir={their_data}", "--dataset=bpe", "--device=cpu",
        f"--out_dir={folder}", "--batch_size=4", "--warmup_iters=0", "--eval_iters=1",
        *flags])  # fmt: skip
    return folder


def test_a_second_stage_starts_from_their_weights(theirs, their_data, tmp_path, records):
    flags = "--learning_rate=0", "--max_iters=1"
    still = second_stage(tmp_path / "still", theirs, their_data, *flags)
    state = train.load_checkpoint(still)
    wanted = train.load_model(theirs)["model"]
    assert all(state["model"][name].equal(wanted[name]) for name in wanted)
    assert (state["stage"], state["model_config"].vocab_size) == (1, 384)
    flags = "--learning_rate=2e-2", "--max_iters=20", "--log_interval=1"
    folder = second_stage(tmp_path / "run", theirs, their_data, *flags)
    loss = list(records(folder).values())
    assert loss[-1] < loss[0] - 0.2


def test_its_checkpoint_is_a_run_with_their_tokenizer(theirs, their_data, tmp_path, capsys):
    folder = second_stage(tmp_path / "run", theirs, their_data, "--max_iters=1")
    found = ask(folder, "--max_multiple=1", "--probe=loss")
    run = Run(folder, SampleConfig(device="cpu", samples=2, max_multiple=1))
    assert run.enc.name == str(theirs)
    assert run.rows(T)[0].tobytes() in prepare_data.load_data(their_data / "bpe").val.tobytes()
    told = found["loss"][str(T)]["bits_per_byte"]
    exported = tmp_path / "out"
    sample.main([str(folder), "--device=cpu", f"--export={exported}"])
    assert told == pytest.approx(bits(exported, run.rows(T), T // 4), rel=1e-4)


def test_data_of_other_tokens_is_refused_for_a_second_stage(theirs, data_dir, tmp_path):
    with pytest.raises(UsageError, match=f"in its own tokens.*--tokenizer={theirs}"):
        train.main([f"--init_from={theirs}", f"--data_dir={data_dir}", "--dataset=tiny",
                    "--device=cpu", f"--out_dir={tmp_path}/run"])  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_ids_beyond_65_535_are_stored_and_read_back(text, tmp_path):
    vocab = {x: n for n, x in enumerate(sorted(ALPHABET))}
    vocab |= {f"unused{n}": n for n in range(256, 70000)}
    vocab |= {"al": 70000, "be": 70001, "<|end|>": 70002}
    write_tokenizer(tmp_path / "large", byte_level(vocab, [("a", "l"), ("b", "e")]))
    flags = [f"--dataset={text}", f"--data_dir={tmp_path}/data", "--name=large"]
    prepare_data.main([*flags, f"--tokenizer={tmp_path}/large"])
    data = prepare_data.load_data(tmp_path / "data" / "large")
    assert data.meta["dtype"] == data.train.dtype == "uint32"
    assert data.meta["vocab_size"] == 70003
    enc = prepare_data.encoding(data.meta["tokenizer"])
    ids = np.concatenate([data.train[:-1], data.val[:-1]])  # an end stands after each
    assert {70000, 70001} <= set(ids.tolist())
    assert enc.decode(ids) == TEXT
    assert data.train[-1] == data.val[-1] == 70002
    assert data.meta["train_bytes"] + data.meta["val_bytes"] == len(TEXT.encode()) + 2
    rows = data.rows(data.train, [0, 5], 50)
    assert rows[1, 0] == ids[5]
    held = prepare_data.encode_files([str(text)], enc, tmp_path / "data")
    assert held.train.tolist() == [*ids, 70002]


def test_a_folder_may_be_called_as_a_tokenizer_of_ours(text, tmp_path, monkeypatch):
    (tmp_path / "byte").mkdir()
    monkeypatch.chdir(tmp_path)
    prepare_data.main([f"--dataset={text}", "--name=bytes"])
    assert prepare_data.load_data("data/bytes").meta["tokenizer"] == "byte"


# ---- Out again ----------------------------------------------------------------------------------


def gpt2():
    """GPT-2's way to cut text, with fewer merges: its own vocabulary needs the network."""
    bytes_of = {x: n for n, x in bytes_to_unicode().items()}
    vocab = byte_level().get_vocab()
    del vocab["<|end|>"]
    ranks = {bytes(map(bytes_of.get, x)): n - 1 for x, n in vocab.items()}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_an_exported_tokenizer_gives_our_ids(name, tmp_path):
    enc = gpt2() if name == "gpt2" else prepare_data.encoding(name)
    prepare_data.pretrained_tokenizer(enc).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == enc.n_vocab
    assert tokenizer.eos_token_id == enc.eot_token
    back = prepare_data.encoding(f"{tmp_path}/")
    assert np.array_equal(prepare_data.token_sizes(back), prepare_data.token_sizes(enc))
    for odd in [*ODD, TEXT, string.printable]:
        ids = prepare_data.encode(enc, odd).tolist()
        assert prepare_data.encode(back, odd).tolist() == ids
        assert tokenizer.decode(ids) == enc.decode(ids) == odd
        if "<|endoftext|>" not in odd:  # which transformers takes for a token
            assert tokenizer(odd).input_ids == ids


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "run"
    sample.main([str(tiny_run), "--device=cpu", f"--export={folder}"])
    return folder


def test_an_exported_run_gives_the_very_same_numbers(tiny_run, exported, text, tmp_path):
    own = shutil.copytree(tiny_run, tmp_path / "own")
    flags = [f"--text={text}", f"--probe={PROBES}", "--max_multiple=4", "--block_size=128"]
    before = ask(own, *flags)
    after = ask(exported, *flags)
    for probe in PROBES.split(","):
        assert before[probe] == after[probe]


@pytest.mark.parametrize("which", ["tiny_run", "theirs"])
def test_transformers_writes_the_text_that_sample_writes(which, tmp_path, capsys, request):
    """Though there the embedding has rows for which the tokenizer has no token."""
    run = request.getfixturevalue(which)
    folder = tmp_path / "exported"
    sample.main([str(run), "--device=cpu", f"--export={folder}"])
    prompt = "def alpha(beta):\n    return "
    flags = ["--temperature=0", "--max_new_tokens=40", "--device=cpu"]
    capsys.readouterr()
    sample.main([str(run), f"--prompt={prompt}", *flags])
    written = capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0]
    assert tokenizer.decode(out[out != tokenizer.eos_token_id]) + "\n" == written
    assert len(out) > ids.input_ids.size(1)


def test_the_text_is_that_of_the_run_itself(tiny_run, exported, capsys):
    texts = []
    for folder in (tiny_run, exported):
        sample.main([str(folder), "--prompt=def ", "--device=cpu", "--max_new_tokens=60"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_changed_run_is_exported_as_changed(tiny_run, tmp_path):
    flags = "--device=cpu", "--block_size=96", "--window=9"
    sample.main([str(tiny_run), f"--export={tmp_path}/out", *flags])
    config = GPT.from_pretrained(tmp_path / "out").config
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 256
    assert (config.block_size, config.window, config.vocab_size) == (96, 9, 257)


def test_lm_eval_finds_our_bits_per_byte(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm_eval's model of transformers needs it")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    docs = ["def alpha(beta):\n    return gamma + 123\n", "é☃ " * 8, "import self\n" * 5]
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps(dict(text=doc)) + "\n" for doc in docs))
    task = dict(
        task="ours", dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(file))),
        test_split="test", output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[dict(metric="byte_perplexity")],
    )  # fmt: skip
    found = simple_evaluate(
        model="hf", model_args=dict(pretrained=str(exported)), tasks=[task], device="cpu",
        batch_size=1, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    run = Run(exported, SampleConfig(device="cpu"))
    bits = 0.0
    for doc in docs:  # lm_eval begins each with an end of document
        ids = prepare_data.encode(run.enc, doc)
        assert len(ids) <= run.T
        row = np.concatenate([[run.enc.eot_token], ids])[None]
        bits += sample.bits_of_last(run, row, len(ids)) * len(doc.encode())
    ours = 2 ** (bits / len("".join(docs).encode()))
    assert found["results"]["ours"]["byte_perplexity,none"] == pytest.approx(ours, rel=1e-3)


# ---- Where a token looks ------------------------------------------------------------------------


@pytest.fixture
def looking(tmp_path):
    """looking(asking, wanted): a folder of a model in which bytes `asking` look at `wanted`."""

    def make(asking, wanted, signs=(1, -1)):  # the N layer of sign 1 is surer
        config = ModelConfig(
            vocab_size=257, n_layer=3, n_head=1, n_embd=258, block_size=T, pattern="SNN", window=4
        )
        model = GPT(config)
        with torch.no_grad():
            for block in model.layers:  # they change nothing, they look
                for matrix in (block.self_attn.o_proj, block.mlp.down_proj):
                    matrix.weight.zero_()
                block.self_attn.q_proj.weight.zero_()  # everywhere alike
            model.embed_tokens.weight.copy_(torch.eye(257, 258))
            h = model.layers[0].input_layernorm(model.embed_tokens.weight)
            for block, sign in zip(model.layers[1:], signs, strict=True):
                block.self_attn.k_proj.weight.zero_()
                block.self_attn.q_proj.weight[1] = 0.05 * h[list(asking)].sum(0)
                block.self_attn.k_proj.weight[1] = 0.05 * h[list(wanted)].sum(0) * sign
        model.save_pretrained(tmp_path / "m", prepare_data.pretrained_tokenizer(
            prepare_data.encoding("byte")))  # fmt: skip
        return tmp_path / "m"

    return make


def shown(capsys, *flags):
    """{letter: lines} of --show_attention, and the line above them."""
    capsys.readouterr()
    sample.main(["--device=cpu", "--show_attention", *map(str, flags)])
    head, *layers = capsys.readouterr().out.split("\n\n")
    return {part[0]: part.splitlines()[1:] for part in layers}, head


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1)])
def test_show_attention_points_at_the_token_that_is_looked_at(looking, capsys, signs):
    folder = looking(b"?", b"X", signs)
    layers, head = shown(capsys, folder, "--prompt=one X two\nthree four?")
    assert "after …one X two⏎three four? the model expects" in head
    assert set(layers) == {"S", "N"}
    share, distance, where = layers["N"][0].split(maxsplit=2)
    assert float(share.strip("%")) > 90
    assert int(distance) == len(" two\nthree four?")
    assert where == "tokens back  …one [X] two⏎three …"
    assert len(layers["N"]) == 10
    assert len(layers["S"]) == 4  # it sees no more
    assert [line.split()[0] for line in layers["S"]] == ["25.00%"] * 4
    assert sorted(int(line.split()[1]) for line in layers["S"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", [1337, 10])  # an answer of two tokens, and of one
def test_without_a_prompt_it_shows_where_an_answer_looks(looking, tmp_path, capsys, seed):
    file = tmp_path / "words"
    file.write_text("nothing to see here, as plain as it gets; " * 200)  # no digit
    small = dict(needles=1, digits=1, max_multiple=4, samples=2, seed=seed)
    folder = looking(range(32, 127), b"0123456789")
    flags = [f"--{name}={number}" for name, number in small.items()]
    layers, head = shown(capsys, folder, f"--text={file}", *flags)
    run = Run(folder, SampleConfig(text=(str(file),), device="cpu", **small))
    row, n, _ = sample.plant(run, run.rows(4 * T)[0], 0, depth=0.5)
    assert n == (2 if seed == 1337 else 1)
    last = len(row) - 2  # of what is shown: the answer's first token, or the question's last one
    assert f"(right: {run.enc.decode(row[last + 1 :].tolist())!r})" in head
    told = run.enc.decode(row[last - 20 : last + 1].tolist()).replace("\n", "⏎")
    assert f"{told} the model expects" in head
    [place] = np.flatnonzero((row[:last] >= ord("0")) & (row[:last] <= ord("9")))
    assert 1.5 * T < place < 2.5 * T  # in the middle of the longest context
    line = next(x for x in layers["N"][:2] if f"{last - place} tokens back" in x)
    assert f"[{chr(row[place])}]" in line


# ---- What cannot be done, in one line -----------------------------------------------------------


def refusal(function, *args):
    with pytest.raises(UsageError) as error:
        function(*args)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_tokens_added_beyond_the_embedding_are_told(copied, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(copied)
    room = 384 - len(tokenizer)
    tokenizer.add_tokens([f"new{n}" for n in range(room)])
    tokenizer.save_pretrained(copied)
    ask(copied, f"--text={text}", "--probe=loss")  # there is room for these
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(copied)
    line = refusal(ask, copied, f"--text={text}")
    assert f"the tokenizer of {copied} has 385 tokens, its embedding 384: remove" in line


def test_rows_begin_as_the_texts_of_their_tokenizer_do(copied, opened):
    assert opened(copied).begin == []
    made = byte_level()
    template = dict(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    made.post_processor = processors.TemplateProcessing(**template)
    write_tokenizer(copied, made)
    run = opened(copied)
    seen = []
    hook = run.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows = run.rows(T)
    sample.bits_of_last(run, rows, 4)
    sample.show_attention(run, "a prompt")
    hook.remove()
    assert all((idx[:, 0] == 0).all() for idx in seen)
    assert (seen[0][:, 1:] == torch.from_numpy(rows[:, 1:-1].astype(int))).all()
    assert (rows[:, 0] != 0).any()  # the caller's rows are as before
    for row, _, (start, stop, _) in sample.plant_all(run, T, depth=0):  # no fact is overwritten
        assert start == 1
        assert run.enc.decode(row[start:stop].tolist()).startswith("\n")


def test_a_tokenizer_without_an_end_of_document_is_told(copied, text):
    write_tokenizer(copied, byte_level(), eos=None)
    assert "names no end-of-document token: set its eos_token" in refusal(ask, copied)
    flags = [f"--dataset={text}", f"--tokenizer={copied}", f"--data_dir={copied}/data"]
    assert "eos_token" in refusal(prepare_data.main, flags)
    assert not (copied / "data").exists() or not list((copied / "data").iterdir())


def test_a_model_without_a_tokenizer_is_told(tmp_path, text):
    write_model(tmp_path)
    assert f"{tmp_path} has no tokenizer" in refusal(ask, tmp_path, f"--text={text}")
    (tmp_path / "tokenizer.json").write_text("{")
    assert f"{tmp_path} has no tokenizer" in refusal(ask, tmp_path, f"--text={text}")


def test_a_model_too_large_for_the_card_is_told(theirs, monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr(GPT, "to", lambda self, *x: full(self) if "cpu" not in x else self)
    assert "is too large for cpu: add --device=cpu" in refusal(ask, theirs)


def test_a_model_without_a_text_is_told(theirs):
    for flags in ([], ["--show_attention"]):
        assert "is no run of train.py: name a text with --text" in refusal(ask, theirs, *flags)


def test_a_text_or_a_context_that_is_too_short_is_told(theirs, tmp_path, text):
    (tmp_path / "a").write_text("short")
    line = refusal(ask, theirs, f"--text={tmp_path}/a")
    assert "the text is shorter than a row: name a longer one with --text" in line
    line = refusal(ask, theirs, f"--text={text}", "--block_size=3", "--probe=loss")
    assert "use 4 or more" in line


def test_an_export_that_would_lose_something_is_refused(tiny_run, theirs, tmp_path):
    before = (tiny_run / "config.json").read_bytes()
    line = refusal(sample.main, [str(theirs), f"--export={tiny_run}", "--device=cpu"])
    assert "exists: name a new folder" in line
    assert (tiny_run / "config.json").read_bytes() == before
    line = refusal(
        sample.main, [str(theirs), str(tiny_run), f"--export={tmp_path}/x", "--device=cpu"]
    )
    assert "--export writes one run" in line
    for sharper in ("--log_scale", "--attn_scale=0.1"):
        changed = f"--export={tmp_path}/x", sharper, "--device=cpu"
        line = refusal(sample.main, [str(tiny_run), *changed])
        assert "add --no-log_scale --attn_scale=0" in line
    assert not (tmp_path / "x").exists()


def test_an_export_that_fails_leaves_nothing(tiny_run, tmp_path, monkeypatch):
    def full(self, folder):
        Path(folder, "half").write_text("")
        raise OSError("no space left")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        sample.main([str(tiny_run), f"--export={tmp_path}/x", "--device=cpu"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, why", [
    ("exaone4", "norms stand after"), ("afmoe", "gates its attention"),
    ("smollm3", "after attention, not beside it"), ("llama", "model_type llama"),
])  # fmt: skip
def test_a_model_of_another_block_is_refused_with_the_reason(copied, kind, why, text):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | dict(model_type=kind)))
    line = refusal(ask, copied, f"--text={text}")
    assert line.startswith(f"{copied} cannot be read as a cohere2 model")
    assert kind in line and why in line


@pytest.mark.parametrize("name, whether", [
    ("organisation/name", True), ("out/rnope-swa", False), ("a/b/c", False), ("name", False),
    ("/nowhere/name", False), ("tests/name", False),
])  # fmt: skip
def test_what_can_only_be_on_the_hub_is_asked_for_there(name, whether, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert train.is_pretrained(name) is whether


def test_a_run_to_resume_is_not_asked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(train.GPT, "from_pretrained", None)
    line = refusal(train.main, ["--resume", "--out_dir=organisation/name"])
    assert "organisation/name is no run" in line


def test_a_prepared_dataset_may_be_named_by_its_path(tiny_run, data_dir):
    folder = data_dir / "tiny"
    line = refusal(sample.main, [str(tiny_run), f"--text={folder}", "--device=cpu"])
    assert "was trained on it" in line  # so it was not read as a folder of texts
