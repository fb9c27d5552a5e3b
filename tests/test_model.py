"""What the paper claims of its layers, then each part of model.py against its definition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as m
from model import GPT, LAYERS, PRESETS, ModelConfig, UsageError, attend, visible

SHAPE = dict(vocab_size=64, block_size=32, n_layer=6, n_head=4, n_kv_head=2, n_embd=32, window=5)
CLOSE = dict(atol=1e-4, rtol=1e-4)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
for_all_presets = pytest.mark.parametrize("preset", PRESETS)


def build(scale=8, **flags):
    """A GPT whose weights are so large that each visible token matters to each logit."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE | flags)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale)
            else:
                p.add_(torch.randn_like(p) / 4)
    return model


def tokens(B, T, seed=0):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


def changed(idx, *places):
    """idx with other tokens at these places."""
    other = idx.clone()
    for place in places:
        other[:, place] = (other[:, place] + 1) % 64
    return other


@torch.no_grad()
def logits(model, idx):
    return model(idx)[0]


def last_logits(model, idx):
    return logits(model, idx)[:, -1]


@torch.no_grad()
def cached_logits(model, idx, prompt, slice=4096):
    """Logits of idx from the last of `prompt` tokens on: these at once, then one at a time."""
    caches = model.new_caches(len(idx), idx.size(1))
    found = [model.head(model.prefill(idx[:, :prompt], caches, at_once=slice))]
    for t in range(prompt, idx.size(1)):
        state = model.read(idx[:, t : t + 1], caches, torch.tensor([t], device=idx.device))
        found.append(model.head(state))
    return torch.stack(found, 1)


# ---- The paper's claims -------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["S", "W"])
@pytest.mark.parametrize("n_layer, window", [(1, 5), (3, 4), (2, 1)])
def test_a_local_stack_forgets_tokens_beyond_its_reach(pattern, n_layer, window):
    """The last token hears n_layer * (window - 1) others, and not one more."""
    model = build(pattern=pattern, n_layer=n_layer, window=window)
    idx = tokens(1, 20)
    before = last_logits(model, idx)
    heard = [back for back in range(20)
             if not last_logits(model, changed(idx, 19 - back)).equal(before)]  # fmt: skip
    assert heard == list(range(n_layer * (window - 1) + 1))


def test_one_full_layer_hears_the_first_token():
    model = build(pattern="SSSN", n_layer=4, window=2)
    idx = tokens(1, 30)
    assert (last_logits(model, changed(idx, 0)) - last_logits(model, idx)).abs().max() > 1e-3


def effect_of_order(**flags):
    """How far the last logits move when the tokens before the last change places."""
    model = build(**flags)
    idx = tokens(2, 20)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(3))
    shuffled = torch.cat((idx[:, order], idx[:, -1:]), 1)
    return (last_logits(model, shuffled) - last_logits(model, idx)).abs().max()


def test_one_nope_layer_cannot_tell_token_order():
    assert effect_of_order(pattern="N", n_layer=1) < 1e-4


def test_two_nope_layers_can_because_the_causal_mask_leaks_order():
    assert effect_of_order(pattern="N", n_layer=2) > 0.1


def test_one_rope_layer_can():
    assert effect_of_order(pattern="R", n_layer=1) > 0.1


@pytest.mark.parametrize("pattern", ["R", "S", "SSSN"])
@torch.no_grad()
def test_rope_knows_only_relative_distance(pattern):
    model = build(pattern=pattern)
    idx = tokens(2, 20)
    positions = torch.arange(20) + 3000
    tables = {x: m.rotary(positions, 8, theta) for x, theta in model.thetas.items()}
    there = model.run_layers(idx, positions, tables, 0, [None] * 6)
    torch.testing.assert_close(there, model.hidden(idx), atol=2e-3, rtol=2e-3)


def test_chunked_layers_never_look_across_a_boundary():
    model = build(pattern="C", window=8)
    idx = tokens(1, 30)
    before = logits(model, idx)
    other = logits(model, changed(idx, *range(16)))
    torch.testing.assert_close(other[:, 16:], before[:, 16:])
    other = logits(model, changed(idx, 16))  # the first of a chunk
    assert (other[:, 23] - before[:, 23]).abs().max() > 1e-3  # its last hears it
    torch.testing.assert_close(other[:, 24:], before[:, 24:])


def test_windowed_layers_stop_growing_the_cache():
    def sizes(pattern, T):
        caches = build(pattern=pattern, n_layer=4).new_caches(1, T)
        return [cache.k.size(2) for cache in caches]

    assert sizes("SWCS", 3) == [3, 3, 3, 3]
    assert sizes("SWCS", 5) == sizes("SWCS", 10_000) == [5, 5, 5, 5]
    assert sizes("SSSN", 10_000) == [5, 5, 5, 10_000]
    assert sizes("R", 10_000) == [10_000] * 4
    for cache in build().new_caches(3, 7):
        assert cache.v.shape == cache.k.shape == (3, 2, cache.size, 8)
        assert not cache.k.any() and not cache.v.any()  # 0 times nan is nan


@for_all_presets
def test_cached_generation_equals_uncached_past_the_window(preset):
    model = build(scale=4, **PRESETS[preset])
    idx = tokens(2, 4)
    generated = model.generate(idx, 30, temperature=0)
    for _ in range(30):
        idx = torch.cat((idx, last_logits(model, idx).argmax(-1, keepdim=True)), 1)
    assert generated.equal(idx)


@for_all_presets
def test_no_logit_depends_on_a_later_token(preset):
    model = build(**PRESETS[preset])
    idx = tokens(1, 41)
    difference = (logits(model, changed(idx, *range(20, 41))) - logits(model, idx)).abs().amax(-1)
    assert difference[:, :20].max() < 1e-4
    assert difference[:, 20:].min() > 1e-2


def test_a_model_runs_far_beyond_its_training_length():
    model = build(pattern="SSSN", n_layer=4, block_size=8, log_scale=True)
    assert logits(model, tokens(1, 400)).isfinite().all()
    longer = GPT(replace(model.config, block_size=4096))
    longer.load_state_dict(model.state_dict())  # the weights hold no table of positions


# ---- The mask rule ------------------------------------------------------------------------------


def sees(i, j, window, chunked):
    """The rule once more, one query and one key at a time."""
    if j > i:
        return False
    if window is None:
        return True
    if chunked:
        return i // window == j // window
    return i - j < window


def rule(T, S, window, chunked):
    """Who sees whom, as a (T, S) array: the queries are the last T of S positions."""
    return np.array([[sees(i, j, window, chunked) for j in range(S)] for i in range(S - T, S)])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 30])
def test_visible_is_the_rule(window, chunked):
    i = torch.arange(23)
    seen = visible(i[:, None], i, window, chunked)
    assert (seen.numpy() == rule(23, 23, window, chunked)).all()
    if window and not chunked:
        assert seen.sum(1).tolist() == [min(t + 1, window) for t in range(23)]  # itself included


# ---- Every path is the definition ---------------------------------------------------------------


def qkv(T, S, G=2, H=4, B=2, D=8):
    generator = torch.Generator().manual_seed(1000 * T + S)

    def draw(heads, length):
        x = torch.randn(B, heads, length, D, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    return draw(H, T), draw(G, S), draw(G, S)


def numpy_attention(q, k, v, window, chunked):
    """Softmax attention written out: q (B, H, T, D), k and v (B, G, S, D)."""
    heads = np.arange(q.shape[1]) * k.shape[1] // q.shape[1]
    scores = q @ k[:, heads].swapaxes(2, 3) / math.sqrt(q.shape[3])
    scores = np.where(rule(q.shape[2], k.shape[2], window, chunked), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v[:, heads]


@pytest.mark.parametrize("window, chunked", [(None, False), (5, False), (5, True), (1, False)])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_the_definition_equals_numpy(window, chunked, G):
    for T, S in [(1, 1), (1, 9), (5, 5), (7, 13), (23, 23)]:
        inputs = qkv(T, S, G)
        y = attend(*inputs, window, chunked, path="mask")
        expected = numpy_attention(*(x.detach().numpy() for x in inputs), window, chunked)
        torch.testing.assert_close(y.detach(), torch.from_numpy(expected))


LENGTHS = [(1, 1), (3, 3), (14, 14), (129, 129), (262, 262)]  # also whole chunks of 2, 7, 131
EARLIER = [(1, 40), (9, 12), (130, 141), (260, 300)]  # fewer queries than keys
CHUNKS_EARLIER = [(1, 6), (3, 8), (9, 30), (130, 200)]  # also from before the queries' own chunk


def with_gradients(run, inputs, up):
    y = run(*inputs)
    return [y, *torch.autograd.grad(y, inputs, up)]


@pytest.mark.parametrize("path", ["auto", "blocks"])
@pytest.mark.parametrize("window, chunked", [
    (None, False), *((window, chunked) for window in (1, 2, 7, 128, 131, 1000)
                     for chunked in (False, True)),
])  # fmt: skip
def test_every_path_equals_the_definition_with_its_gradients(path, window, chunked):
    lengths = LENGTHS + (CHUNKS_EARLIER if chunked else EARLIER)
    for n, (T, S) in enumerate(lengths):
        inputs = qkv(T, S, G=[1, 2, 4][n % 3], B=1)
        up = torch.randn_like(inputs[0])
        expected = with_gradients(lambda *x: attend(*x, window, chunked, "mask"), inputs, up)
        found = with_gradients(lambda *x: attend(*x, window, chunked, path), inputs, up)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, at=(T, S): f"{at}: {text}")


@pytest.mark.parametrize("window", [None, 1, 7, 131])
def test_flash_asks_varlen_attn_for_the_rule(window, monkeypatch):
    """varlen_attn is played by what its documentation says; a GPU test runs the kernel."""
    from torch.nn.attention import varlen

    def played(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
        left, right = window_size
        assert right == 0 and max_q == int(cu_q[1]) and max_k == int(cu_k[1])
        rows = []
        for b in range(len(cu_q) - 1):
            ends = ((q, cu_q), (k, cu_k), (v, cu_k))
            part = [x[end[b] : end[b + 1]].transpose(0, 1) for x, end in ends]
            i = torch.arange(max_k)[-max_q:, None]
            j = torch.arange(max_k)
            mask = (j <= i) & ((left < 0) | (j >= i - left))
            rows.append(F.scaled_dot_product_attention(*part, mask).transpose(0, 1))
        return torch.cat(rows)

    monkeypatch.setattr(varlen, "varlen_attn", played)
    monkeypatch.setattr(m, "choose_path", lambda path, *_: path)
    for T, S in [(5, 5), (3, 9), (140, 140)]:
        inputs = qkv(T, S)
        expected = attend(*inputs, window, path="mask")
        torch.testing.assert_close(attend(*inputs, window, path="flash"), expected)


@pytest.mark.parametrize("path, T, S, chunked, kernel", [
    ("flash", 9, 9, False, "flash"),
    ("flash", 3, 9, False, "flash"),
    ("flash", 9, 9, True, "blocks"),
    ("blocks", 9, 9, False, "blocks"),
    ("flash", 10, 10, True, "chunks"),
    ("blocks", 10, 10, True, "chunks"),  # whole chunks are rows of their own
])  # fmt: skip
def test_each_path_goes_to_its_kernel(path, T, S, chunked, kernel, monkeypatch):
    monkeypatch.setattr(m, "choose_path", lambda path, *_: path)
    for name in ("flash", "chunks", "blocks"):
        monkeypatch.setattr(m, f"attend_{name}", lambda *_, name=name: name)
    assert attend(*qkv(T, S), 5, chunked, path) == kernel


@pytest.mark.parametrize("capability, hip, built, dtype, head_dim, path", [
    ((7, 5), None, True, torch.bfloat16, 64, "blocks"),  # a T4
    ((8, 0), None, True, torch.bfloat16, 64, "flash"),
    ((9, 0), None, True, torch.float16, 256, "flash"),
    ((9, 0), "6.4", True, torch.bfloat16, 64, "blocks"),  # ROCm counts differently
    ((9, 0), None, False, torch.bfloat16, 64, "blocks"),
    ((9, 0), None, True, torch.float32, 64, "blocks"),
    ((9, 0), None, True, torch.bfloat16, 264, "blocks"),
    ((9, 0), None, True, torch.bfloat16, 36, "blocks"),
])  # fmt: skip
def test_auto_asks_what_the_card_can_do(capability, hip, built, dtype, head_dim, path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.version, "hip", hip)
    card = torch.device("cuda")
    assert m.choose_path("auto", card, dtype, head_dim) == path
    assert m.choose_path("mask", card, dtype, head_dim) == "mask"
    if path == "flash":
        assert m.choose_path("flash", card, dtype, head_dim) == "flash"
        return
    with pytest.raises(UsageError, match="--attention=flash"):
        m.choose_path("flash", card, dtype, head_dim)


def test_flash_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="--attention=flash.*use --attention=auto"):
        logits(build(attention="flash"), tokens(1, 8))
    assert m.choose_path("auto", torch.device("cpu"), torch.bfloat16, 64) == "blocks"


@for_all_presets
def test_the_path_changes_no_logit(preset):
    expected = logits(build(**PRESETS[preset], attention="mask"), tokens(2, 37))
    for path in ("blocks", "auto"):
        found = logits(build(**PRESETS[preset], attention=path), tokens(2, 37))
        torch.testing.assert_close(found, expected, **CLOSE)


# ---- Positions ----------------------------------------------------------------------------------


def numpy_rotate(x, positions, theta):
    """A pair of channels is a complex number, an angle turns it. x (..., T, D)."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    frequencies = theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    pairs = pairs * np.exp(1j * positions[:, None] * frequencies)
    return np.stack((pairs.real, pairs.imag), -1).reshape(x.shape)


@pytest.mark.parametrize("start, atol", [(0, 1e-6), (1000, 2e-4), (200_000, 0.05)])
@pytest.mark.parametrize("theta", [500.0, 1e4, 1e6])
def test_rope_turns_neighbouring_pairs_by_position_times_frequency(start, atol, theta):
    x = torch.randn(2, 3, 7, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7) + start
    y = m.rotate(x.transpose(1, 2), m.rotary(positions, 32, theta)).transpose(1, 2)
    expected = numpy_rotate(x.double().numpy(), positions.numpy(), theta)
    torch.testing.assert_close(y.double(), torch.from_numpy(expected), atol=atol, rtol=1e-5)


def test_positions_stay_exact_in_a_half_precision_model():
    """In bfloat16, position 200,001 would be 199,680. Two channels turn at frequency 1."""
    x = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    for position in (200_001, 10_000_001):
        y = m.rotate(x, m.rotary(torch.tensor([position]), 2, 1e4))
        assert y.dtype == torch.bfloat16
        expected = numpy_rotate(np.ones((1, 2)), np.array([position]), 1e4)
        torch.testing.assert_close(y[0, 0].double(), torch.from_numpy(expected), atol=0.02, rtol=0)


def test_a_bfloat16_model_computes_positions_in_fp32():
    model = build(scale=2, pattern="SSSR", n_layer=4).bfloat16()
    exact = build(scale=2, pattern="SSSR", n_layer=4)
    found = logits(model, tokens(1, 600))
    expected = logits(exact, tokens(1, 600))
    assert found.dtype == torch.float32
    assert (found - expected)[:, 500:].norm() < 0.1 * expected[:, 500:].norm()


# ---- The model, written again -------------------------------------------------------------------


def numpy_norm(x, weight, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def numpy_model(model, idx):
    """Logits by the glossary and the table of letters, in float64 and without model.py."""
    c = model.config
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    position = np.arange(idx.shape[1])

    def heads(x):
        return x.reshape(*x.shape[:2], -1, c.head_dim).swapaxes(1, 2)

    x = weights["embed_tokens.weight"][idx.numpy()]
    for n, letter in enumerate(c.layers):

        def weight(name, n=n):
            return weights[f"layers.{n}.{name}.weight"]

        h = numpy_norm(x, weight("input_layernorm"), c.norm_eps)
        q, k, v = (heads(h @ weight(f"self_attn.{y}_proj").T) for y in "qkv")
        if c.qk_norm:
            q = numpy_norm(q, weight("self_attn.q_norm"), c.norm_eps)
            k = numpy_norm(k, weight("self_attn.k_norm"), c.norm_eps)
        if letter in "RSC":
            theta = c.rope_theta_full if letter == "R" and c.rope_theta_full else c.rope_theta
            q = numpy_rotate(q, position, theta)
            k = numpy_rotate(k, position, theta)
        if letter == "N" and c.log_scale:
            q = q * np.maximum(1, np.log(position + 1) / np.log(c.block_size))[:, None]
        if letter == "N":
            q = q * (1 + c.attn_scale * np.log(1 + (position + 1) // c.block_size))[:, None]
        y = numpy_attention(q, k, v, None if letter in "RN" else c.window, letter == "C")
        gate = h @ weight("mlp.gate_proj").T
        ffn = gate / (1 + np.exp(-gate)) * (h @ weight("mlp.up_proj").T)
        y = y.swapaxes(1, 2).reshape(x.shape)
        x = x + y @ weight("self_attn.o_proj").T + ffn @ weight("mlp.down_proj").T
    x = numpy_norm(x, weights["norm.weight"], c.norm_eps)
    return x @ weights["embed_tokens.weight"].T * c.logit_scale


@for_all_presets
def test_the_model_equals_its_architecture_in_numpy(preset):
    model = build(scale=5, **PRESETS[preset], block_size=8, logit_scale=0.25, norm_eps=1e-3)
    idx = tokens(2, 21)
    expected = torch.from_numpy(numpy_model(model, idx)).float()
    torch.testing.assert_close(logits(model, idx), expected, **CLOSE)


@for_all_presets
@torch.no_grad()
def test_the_last_states_alone_are_those_of_the_whole_row(preset):
    model = build(scale=4, **PRESETS[preset])
    idx = tokens(2, 40)
    whole = model.hidden(idx)
    for first in (0, 1, 7, 33, 39):
        torch.testing.assert_close(model.hidden(idx, first=first), whole[:, first:], **CLOSE)


# ---- Settings of a layer ------------------------------------------------------------------------


def with_larger_queries(model, factor):
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight *= factor
    return model


@pytest.mark.parametrize("letter", LAYERS)
def test_qk_norm_takes_the_size_of_queries_away_on_every_layer(letter):
    flags = dict(pattern=letter, n_layer=1, qk_norm=True)
    before = logits(build(**flags), tokens(1, 20))
    after = logits(with_larger_queries(build(**flags), 3), tokens(1, 20))
    assert torch.allclose(after, before, atol=1e-3)
    flags["qk_norm"] = False
    without = logits(with_larger_queries(build(**flags), 3), tokens(1, 20))
    assert not torch.allclose(without, logits(build(**flags), tokens(1, 20)), atol=1e-3)


def test_log_scale_sharpens_beyond_the_training_length_only():
    flags = dict(pattern="N", n_layer=1, block_size=8)
    idx = tokens(1, 64)
    on = logits(build(**flags, log_scale=True), idx)
    off = logits(build(**flags), idx)
    torch.testing.assert_close(on[:, :8], off[:, :8])
    twice = logits(with_larger_queries(build(**flags), 2), idx)  # ln(64) is twice ln(8)
    torch.testing.assert_close(on[:, -1], twice[:, -1], **CLOSE)
    assert (on - off)[:, 9:].abs().amax(-1).min() > 1e-5


def test_attn_scale_is_llama_4s_factor():
    flags = dict(pattern="N", n_layer=1, block_size=8)
    idx = tokens(1, 60)
    on = logits(build(**flags, attn_scale=0.1), idx)
    torch.testing.assert_close(on[:, :7], logits(build(**flags), idx)[:, :7])
    factor = 1 + 0.1 * math.log(1 + 60 // 8)
    larger = logits(with_larger_queries(build(**flags), factor), idx)
    torch.testing.assert_close(on[:, -1], larger[:, -1], **CLOSE)


@pytest.mark.parametrize("letter", LAYERS)
@pytest.mark.parametrize("flags, letters", [
    (dict(log_scale=True), "N"),
    (dict(attn_scale=0.1), "N"),
    (dict(rope_theta_full=1e6), "R"),
    (dict(rope_theta=1e6), "RSC"),
], ids=str)  # fmt: skip
def test_a_setting_touches_its_own_letters_alone(letter, flags, letters):
    without = logits(build(pattern=letter), tokens(1, 80))
    found = logits(build(pattern=letter, **flags), tokens(1, 80))
    assert found.equal(without) == (letter not in letters)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_log_scale_is_finite_at_any_block_size(block_size):
    model = build(pattern="SN", block_size=block_size, log_scale=True)
    assert logits(model, tokens(1, 9)).isfinite().all()


PUBLISHED = {  # twelve layers, and what else is set
    "rnope-swa": ("SSSNSSSNSSSN", {}),
    "rnope-swa-log": ("SSSNSSSNSSSN", dict(log_scale=True)),
    "rope": ("RRRRRRRRRRRR", {}),
    "nope": ("NNNNNNNNNNNN", {}),
    "qk-norm": ("RRRRRRRRRRRR", dict(qk_norm=True)),
    "rnope": ("RNRNRNRNRNRN", {}),
    "swa": ("SSSSSSSSSSSS", {}),
    "smollm3": ("RRRNRRRNRRRN", {}),
    "llama4": ("CCCNCCCNCCCN", dict(rope_theta=5e5, attn_scale=0.1)),
    "exaone4": ("SSSNSSSNSSSN", dict(qk_norm=True)),
    "gemma3": ("SSSSSRSSSSSR", dict(rope_theta=1e4, rope_theta_full=1e6, qk_norm=True)),
    "olmo3": ("SSSRSSSRSSSR", dict(rope_theta=5e5, qk_norm=True)),
    "gpt-oss": ("SRSRSRSRSRSR", dict(rope_theta=1.5e5)),
    "swan": ("NSSSNSSSNSSS", dict(log_scale=True)),
}


def test_presets_are_the_published_hybrids():
    assert PRESETS.keys() == PUBLISHED.keys()
    for name, (layers, settings) in PUBLISHED.items():
        assert ModelConfig(n_layer=12, **PRESETS[name]).layers == layers, name
        assert PRESETS[name] == settings | dict(pattern=PRESETS[name]["pattern"]), name


def test_the_plan_names_each_layer():
    assert build(pattern="SSSN", n_layer=4, window=7).plan() == (
        "0 S rope window=7 | 1 S rope window=7 | 2 S rope window=7 | 3 N nope full"
    )
    scaled = build(pattern="SSSN", n_layer=4, log_scale=True, attn_scale=0.1)
    assert scaled.plan().endswith("3 N nope full log_scale attn_scale")
    assert build(pattern="RWC", n_layer=3).plan() == (
        "0 R rope full | 1 W nope window=5 | 2 C rope chunk=5"
    )


@pytest.mark.parametrize("name, value", [
    ("vocab_size", 0), ("block_size", 0), ("n_layer", 0), ("n_head", 0), ("n_kv_head", -1),
    ("n_embd", 0), ("ffn_dim", -1), ("window", 0), ("window", -3), ("rope_theta", 0.0),
    ("rope_theta", math.nan), ("rope_theta", math.inf), ("rope_theta_full", -1.0),
    ("attn_scale", -0.1), ("attn_scale", math.nan), ("logit_scale", 0.0), ("norm_eps", 0.0),
    ("attention", "flsh"), ("pattern", ""), ("pattern", "SSXN"), ("n_embd", 33), ("n_embd", 12),
    ("n_head", 5), ("n_kv_head", 3),
])  # fmt: skip
def test_a_bad_value_is_one_line_that_names_its_flag(name, value):
    with pytest.raises(UsageError, match=name) as error:
        ModelConfig(**SHAPE | {name: value})
    assert "\n" not in str(error.value)


def test_a_letter_that_is_never_built_is_refused():
    with pytest.raises(UsageError, match=r"'N'.*--n_layer=4.*--pattern"):
        ModelConfig(pattern="SSSN", n_layer=3)
    assert ModelConfig(pattern="SSNS", n_layer=3).layers == "SSN"


def test_sizes_left_at_0_are_filled_in():
    config = ModelConfig(n_embd=512, n_head=8)
    assert (config.n_kv_head, config.ffn_dim, config.head_dim) == (8, 1408, 64)


# ---- Loss, weights and counts -------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_once", [1, 7, 100])
@pytest.mark.parametrize("ignored", [0, 5, 17])
def test_the_sliced_loss_is_the_cross_entropy(monkeypatch, rows_at_once, ignored):
    monkeypatch.setattr(m, "LOSS_SLICE", 11 * rows_at_once)
    torch.manual_seed(0)
    x = torch.randn(17, 8, requires_grad=True)
    w = torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(11, (17,))
    targets[torch.randperm(17)[:ignored]] = -100
    exact = F.cross_entropy(x.double() @ w.double().T, targets, reduction="sum")
    expected = 3 * exact.float() / max(1, 17 - ignored)  # 3: whatever is made of the loss
    found = 3 * m.LinearCrossEntropy.apply(x, w, targets)
    torch.testing.assert_close(found, expected)
    expected_gradients = torch.autograd.grad(expected, (x, w))
    torch.testing.assert_close(torch.autograd.grad(found, (x, w)), expected_gradients)


@pytest.mark.parametrize("rows_at_once", [4, 1000])
@pytest.mark.parametrize("grad", [True, False])
def test_the_models_loss_is_the_cross_entropy_of_its_logits(monkeypatch, rows_at_once, grad):
    monkeypatch.setattr(m, "LOSS_SLICE", 64 * rows_at_once)
    model = build(scale=3, logit_scale=0.25)
    targets = tokens(2, 15, seed=1)
    targets[0, :6] = -100
    with torch.set_grad_enabled(grad):
        nothing, loss = model(tokens(2, 15), targets)
    assert nothing is None and loss.requires_grad == grad
    expected = F.cross_entropy(logits(model, tokens(2, 15)).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("compiling, cuda, grad", [
    (True, True, True), (False, True, True), (True, False, True), (True, True, False),
])  # fmt: skip
def test_the_sliced_loss_is_for_compiled_training_on_cuda(monkeypatch, compiling, cuda, grad):
    class Sliced:
        apply = staticmethod(lambda *_: "sliced")

    monkeypatch.setattr(m, "LinearCrossEntropy", Sliced)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.randn(3, 32)
    with torch.set_grad_enabled(grad):
        loss = build().loss(x.as_subclass(OnCuda) if cuda else x, torch.tensor([1, 2, 3]))
    assert isinstance(loss, str) == (compiling and cuda and grad)


def test_init_is_that_of_gpt2():
    model = GPT(ModelConfig(vocab_size=512, n_embd=128, n_layer=8, n_head=4, qk_norm=True))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        deep = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert p.std().item() == pytest.approx(0.02 / 4 if deep else 0.02, rel=0.05), name
    _, loss = model(torch.randint(512, (4, 64)), torch.randint(512, (4, 64)))
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)


@pytest.mark.parametrize("letter", LAYERS)
def test_every_weight_has_a_gradient_and_none_is_a_bias(letter):
    model = build(pattern=letter, qk_norm=True)
    model(tokens(2, 9), tokens(2, 9, seed=1))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name
        assert name.endswith(".weight")


def test_parameters_and_flops_equal_a_count_by_hand():
    model = build(n_layer=3, ffn_dim=64, pattern="SRC", window=4)
    matrices = 64 * 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # embedding, 4 and 3 a layer
    assert model.num_params() == matrices + 4 * 32
    window = 1 + 2 + 3 + 4 * 6
    full = sum(range(1, 10))
    chunk = 2 * (1 + 2 + 3 + 4) + 1
    keys = (window + full + chunk) / 9
    forward = 2 * matrices + 2 * 2 * 32 * keys  # q k and p v
    assert model.flops_per_token(9) == pytest.approx(3 * forward)


# ---- The cache ----------------------------------------------------------------------------------


@for_all_presets
@pytest.mark.parametrize("prompt", [1, 4, 5, 6, 36])  # the window is 5, block_size 32
def test_cached_logits_equal_uncached(preset, prompt):
    model = build(scale=4, **PRESETS[preset])
    idx = tokens(2, 40)
    expected = logits(model, idx)[:, prompt - 1 :]
    torch.testing.assert_close(cached_logits(model, idx, prompt), expected, **CLOSE)


@pytest.mark.parametrize("preset", ["rnope-swa-log", "llama4", "swan", "gpt-oss"])
@pytest.mark.parametrize("slice", [1, 2, 4, 5, 7, 11, 29])
def test_a_prompt_may_be_read_in_slices_of_any_size(preset, slice):
    model = build(scale=4, **PRESETS[preset])
    idx = tokens(2, 33)
    expected = logits(model, idx)[:, 28:]
    torch.testing.assert_close(cached_logits(model, idx, 29, slice), expected, **CLOSE)


@pytest.mark.parametrize("preset", ["rnope-swa", "llama4"])
@pytest.mark.parametrize("begun", [2, 5, 7, 13])
@torch.no_grad()
def test_reading_on_after_generating_equals_uncached(preset, begun):
    """As in a conversation: a prompt, one token of an answer, a second prompt."""
    model = build(scale=4, **PRESETS[preset])
    idx = tokens(2, 33)
    caches = model.new_caches(2, 33)
    model.prefill(idx[:, :begun], caches)
    model.read(idx[:, begun : begun + 1], caches, torch.tensor([begun]))
    state = model.read(idx[:, begun + 1 :], caches, torch.arange(begun + 1, 33))
    torch.testing.assert_close(model.head(state), last_logits(model, idx), **CLOSE)


class Watch(TorchDispatchMode):
    """Notes the operations that run, and the size of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.operations = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.operations.add(func.overloadpacket.__name__)
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return made


@for_all_presets
def test_a_one_token_read_asks_the_device_for_nothing(preset):
    """So that a CUDA graph can capture it."""
    model = build(**PRESETS[preset])
    caches = model.new_caches(2, 20)
    with Watch() as many:
        model.prefill(tokens(2, 9), caches)
    with Watch() as one:
        model.head(model.read(tokens(2, 1), caches, torch.tensor([9])))
    host_reads = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal"}
    assert one.operations and not one.operations & host_reads
    assert many.operations & host_reads  # the watch works


@pytest.mark.parametrize("preset", ["rnope-swa", "llama4", "swa"])
def test_the_memory_of_a_prefill_is_linear_in_the_prompt(preset):
    model = build(**PRESETS[preset])

    def largest(T, slice):
        with Watch() as watch:
            model.prefill(tokens(1, T), model.new_caches(1, T), at_once=slice)
        return watch.largest

    assert largest(2048, 64) <= 2 * largest(1024, 64)
    assert largest(2048, 64) < largest(2048, 2048)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="empty prompt"):
        build().generate(tokens(1, 0), 5)


# ---- Generating ---------------------------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_likeliest_token_alone_is_greedy():
    model = build(scale=4)
    idx = tokens(2, 7)
    greedy = model.generate(idx, 20, temperature=0)
    assert greedy.shape == (2, 27) and greedy[:, :7].equal(idx)
    for how in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-4)):
        assert model.generate(idx, 20, **how).equal(greedy)
    assert not model.generate(idx, 20, temperature=9.0, generator=seeded()).equal(greedy)
    assert model.generate(idx, 0).equal(idx)


def test_the_same_seed_gives_the_same_text():
    first, same, other = (
        build(scale=2).generate(tokens(2, 7), 20, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert first.equal(same) and not first.equal(other)


@pytest.mark.parametrize("how, expected", [
    (dict(), [0.5, 0.3, 0.15, 0.05]),
    (dict(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),
    (dict(top_k=2), [0.625, 0.375, 0, 0]),
    (dict(top_k=9), [0.5, 0.3, 0.15, 0.05]),
    (dict(top_p=0.5), [1, 0, 0, 0]),
    (dict(top_p=0.7), [0.625, 0.375, 0, 0]),
    (dict(top_p=0.81), [0.5263, 0.3158, 0.1579, 0]),
    (dict(top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
], ids=str)  # fmt: skip
def test_sampling_follows_the_probabilities(how, expected):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    order = torch.tensor([2, 0, 3, 1])  # so that ids are not in the order of their probability
    found = m.sample_token(p[order].log().expand(20_000, 4), generator=seeded(), **how)
    share = torch.bincount(found[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor(expected)[order].float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("how", [dict(temperature=0), dict(), dict(top_k=60), dict(top_p=0.99)])
def test_ids_without_a_token_are_never_produced(how):
    model = build()
    with torch.no_grad():
        model.embed_tokens.weight[50:] *= 20  # the largest logits of all
    free = model.generate(tokens(4, 5) % 50, 20, generator=seeded(), **how)
    assert (free[:, 5:] >= 50).any()
    kept = model.generate(tokens(4, 5) % 50, 20, generator=seeded(), n_vocab=50, **how)
    assert kept.shape == (4, 25) and (kept < 50).all()


def test_a_stop_token_ends_the_text_when_all_rows_have_it():
    model = build(scale=4)
    free = model.generate(tokens(2, 7), 20, temperature=0)
    stop = next(t for t in free[0, 7:].tolist() if t not in free[1, 7:])
    first = 7 + free[0, 7:].tolist().index(stop)
    alone = model.generate(tokens(2, 7)[:1], 20, temperature=0, stop=stop)
    assert alone.equal(free[:1, : first + 1])
    both = model.generate(tokens(2, 7), 20, temperature=0, stop=stop)
    assert both[1].equal(free[1])
    assert both[0, :first].equal(free[0, :first]) and (both[0, first:] == stop).all()


# ---- Compiled, and on a GPU ---------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["rnope-swa-log", "gemma3", "llama4"])
def test_a_training_step_compiles_whole_and_changes_nothing(preset):
    """fullgraph: a graph break is an error. aot_eager traces for any device and runs here."""
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model = build(scale=3, **PRESETS[preset], n_layer=len(PRESETS[preset]["pattern"]))
        run = model
        if compiled:
            run = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        loss = run(tokens(2, 37), tokens(2, 37, seed=1))[1]
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def check_in_bfloat16(run, inputs, window, chunked=False):
    """Values and gradients of run on CUDA, row by row, against the definition in float32."""
    half = [x.detach().cuda().bfloat16().requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in half]
    up = torch.randn(half[0].shape, generator=torch.Generator().manual_seed(1)).to(half[0])
    expected = with_gradients(lambda *x: attend(*x, window, chunked, "mask"), exact, up.float())
    found = with_gradients(lambda *x: run(*x, window, chunked), half, up)
    for a, b in zip(found, expected, strict=True):
        size = b.norm(dim=-1)  # rounding moves a row by 1 %, one key more or less by 28 %
        assert ((a.float() - b).norm(dim=-1) <= 0.05 * (size + size.mean()) + 0.05).all()


@needs_cuda
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("window, chunked", [(None, False), (7, False), (131, False), (7, True)])
def test_flash_equals_the_definition(G, window, chunked):
    for T, S in LENGTHS + (CHUNKS_EARLIER if chunked else EARLIER):
        inputs = qkv(T, S, G, D=64)
        check_in_bfloat16(lambda *x: attend(*x, path="flash"), inputs, window, chunked)


@needs_cuda
@for_all_presets
def test_cached_logits_equal_uncached_in_bfloat16(preset):
    model = build(scale=1, **PRESETS[preset] | dict(n_embd=128)).cuda()
    idx = tokens(2, 33).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        for prompt in (1, 5, 23):
            expected = logits(model, idx)[:, prompt - 1 :]
            found = cached_logits(model, idx, prompt)
            assert (found - expected).norm() < 2e-2 * expected.norm()


@needs_cuda
@pytest.mark.parametrize("attention", ["auto", "blocks", "mask"])
def test_float32_with_gqa_works_on_cuda(attention):
    model = build(scale=4, n_embd=128, attention=attention)
    expected = logits(model, tokens(2, 33))
    text = model.generate(tokens(2, 33), 9, temperature=0)
    model.cuda()
    found = logits(model, tokens(2, 33).cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    cached = cached_logits(model, tokens(2, 33).cuda(), 23).cpu()
    torch.testing.assert_close(cached, expected[:, 22:], atol=1e-2, rtol=1e-2)
    prompt = tokens(2, 33).cuda()
    assert model.generate(prompt, 9, temperature=0).cpu().equal(text)
    assert prompt.cpu().equal(tokens(2, 33))  # the graph of a token writes elsewhere


@needs_cuda
@pytest.mark.parametrize("position", [0, 1000, 131_071])
@torch.no_grad()
def test_one_query_over_a_long_cache_equals_the_definition(position):
    config = ModelConfig(pattern="N", n_layer=1, n_head=8, n_kv_head=2, n_embd=512)
    like = dict(dtype=torch.bfloat16, device="cuda")
    cache = m.Cache(2, 131_072, m.Attention(config, "N"), config, like)
    cache.k.normal_()
    cache.v.normal_()
    q = torch.randn(2, 8, 1, 64, **like)
    k = torch.randn(2, 2, 1, 64, **like)
    v = torch.randn(2, 2, 1, 64, **like)
    y = cache.attend_one(q, k, v, torch.tensor([position], device="cuda"))
    held = slice(0, position + 1)
    assert cache.k[:, :, position].equal(k[:, :, 0])
    exact = attend(q.float(), cache.k[:, :, held].float(), cache.v[:, :, held].float(), path="mask")
    assert (y.float() - exact).norm() < 2e-2 * exact.norm() + 1e-3


@needs_cuda
def test_a_compiled_training_step_on_cuda_equals_an_eager_one(monkeypatch):
    """It takes the sliced loss, here in slices of 30 rows."""
    monkeypatch.setattr(m, "LOSS_SLICE", 64 * 30)
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model = build(scale=3, pattern="SSSN", n_layer=4).cuda()
        run = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        loss = run(tokens(2, 40).cuda(), tokens(2, 40, seed=1).cuda())[1]
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-2)


@needs_cuda
@torch.no_grad()
def test_a_cuda_graph_captures_a_one_token_read():
    model = build(scale=4, pattern="SSSN", n_layer=4).cuda()
    idx = tokens(2, 20).cuda()
    expected = cached_logits(model, idx, 9)
    caches = model.new_caches(2, 20)
    model.prefill(idx[:, :9], caches)
    token = idx[:, 9:10].clone()
    position = torch.tensor([9], device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        model.read(token, caches, position)  # warm up; it stores the same token again
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = model.read(token, caches, position)
    for t in range(9, 20):
        token.copy_(idx[:, t : t + 1])
        position.fill_(t)
        graph.replay()
        torch.testing.assert_close(model.head(state), expected[:, t - 8], atol=1e-3, rtol=1e-3)


def test_log_scale_and_attn_scale_multiply():
    positions = torch.arange(300)

    def scale(**flags):
        return build(pattern="N", n_layer=1, **flags).query_scale(positions)

    both = scale(log_scale=True, attn_scale=0.1)
    assert both.equal(scale(log_scale=True) * scale(attn_scale=0.1))
    assert not both.equal(scale(log_scale=True))


def test_odd_ways_of_sampling_are_refused_or_mean_what_they_say():
    model = build()
    with pytest.raises(UsageError, match="temperature=-1"):
        model.generate(tokens(1, 5), 3, temperature=-1)
    greedy = model.generate(tokens(1, 5), 9, temperature=0)
    assert model.generate(tokens(1, 5), 9, top_p=0.0).equal(greedy)
