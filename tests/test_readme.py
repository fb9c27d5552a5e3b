"""What the README says is what the code does."""

import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT, TINY

import model
import prepare_data
import sample
import train
from model import LAYERS, PRESETS, ModelConfig
from prepare_data import DataConfig, parse_flags
from sample import SampleConfig
from train import TrainConfig

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [
    line.split(" #")[0].strip()
    for kind, block in BLOCKS
    for line in block.splitlines()
    if kind == "sh"
]
RUN = [command for command in COMMANDS if command.startswith("python ")]
CONFIGS = {
    "train.py": {"model": ModelConfig, "training": TrainConfig},
    "sample.py": {"sampling": SampleConfig},
    "prepare_data.py": {"data": DataConfig},
}
MODULES = {"train.py": train, "sample.py": sample, "prepare_data.py": prepare_data}


def script_and_flags(command):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place], words[place + 1 :]


def test_it_is_short():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("|"))
    assert len(README.splitlines()) <= 170
    assert len(prose) <= 9000


def test_the_table_of_presets_is_the_presets():
    rows = re.findall(r"^\| `([\w-]+)` \| `(.*?)` \|", README, re.M)
    said = {name: dict(pair.split("=") for pair in flags.split()) for name, flags in rows}
    assert said == {
        name: {key: str(value) for key, value in flags.items()} for name, flags in PRESETS.items()
    }


def test_every_letter_is_explained():
    assert set(re.findall(r"\*\*([A-Z])\*\*", README)) == set(LAYERS)


def test_every_file_that_is_named_exists():
    linked = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named = re.findall(r"`((?:tests/|results/)?\w+\.py)`", README)
    assert linked and named
    for name in (*linked, *named):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name, module", [
    ("LAYERS", model), ("visible", model), ("attend", model), ("Attention.qkv", model),
    ("Cache", model), ("repeat_spans", train), ("learning_rate", train), ("train_loop", train),
])  # fmt: skip
def test_the_places_to_read_are_there(name, module):
    assert f"`{name}`" in README
    for part in name.split("."):
        module = getattr(module, part)


def test_every_flag_that_is_named_exists():
    configs = [config for group in CONFIGS.values() for config in group.values()]
    known = {name for config in configs for name in config.__annotations__}
    named = set(re.findall(r"--(?:no-)?(\w+)", README)) - {"help", "standalone", "nproc_per_node"}
    assert len(named) > 15
    assert named <= known


@pytest.mark.parametrize("command", [command for command in COMMANDS if ".py" in command])
def test_a_command_is_understood(command):
    script, flags = script_and_flags(command)
    assert parse_flags(CONFIGS[script], flags, "") is not None


@pytest.mark.parametrize("command", [command for command in RUN if "train.py" in command])
def test_a_training_command_fits_the_scale_of_a_gpu(command):
    given = parse_flags(CONFIGS["train.py"], script_and_flags(command)[1], "")
    cfg, config = train.make_configs(given | dict(scale="gpu"))
    train.check_rows(cfg, config.block_size, 1)
    assert config.block_size == 1024


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command, tmp_path, monkeypatch, data_dir, tiny_run):
    for name in ("tiny", "mine"):
        shutil.copytree(data_dir / "tiny", tmp_path / "data" / name)
    for name in {"rnope-swa", *re.findall(r"(?<!--out_dir=)out/([\w-]+)", command)}:
        shutil.copytree(tiny_run, tmp_path / "out" / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    for name in ("tests", "results"):
        shutil.copytree(ROOT / "tests", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    script, flags = script_and_flags(command)
    small = []
    if script == "sample.py":
        small = ["--max_multiple=2", "--samples=2", "--max_new_tokens=3"]
        small += ["--needles=1", "--digits=2"]
    if script == "prepare_data.py":
        small = ["--data_dir=other"]
    if "--resume" in flags:
        shutil.copytree(tiny_run, tmp_path / "out" / "mine")
    elif script == "train.py":
        small = [*TINY, "--data_dir=data", "--max_iters=2", "--n_layer=8"]
        small += ["--dataset=mine"] if "--dataset=mine" in flags else ["--dataset=tiny"]
        small += ["--n_layer=4"] if "--init_from" in command else []
        small += ["--long_rows=128"] if "--long_rows" in command else []
    MODULES[script].main([*flags, *small])
    if script == "train.py":
        assert list((tmp_path / "out").glob("*/ckpt.pt"))


def cells(table, row):
    """The numbers of a row of the table whose header holds `table`."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and table in line)
    line = next(line for line in lines[start:] if line.startswith(f"| {row} "))
    return [float(x) for x in re.findall(r"\d+\.\d+", line)]


@pytest.mark.parametrize("name", ["cpu", "frontier"])
def test_the_tables_are_those_of_results(name):
    """Each row of a table is the mean over the seeds of what results/NAME.json holds."""
    found = json.loads((ROOT / f"results/{name}.json").read_text())
    assert found["rows"]
    for row in found["rows"]:
        numbers = [sum(seeds) / len(seeds) for seeds in row["values"]]
        assert cells(found["table"], row["name"]) == pytest.approx(numbers, abs=0.0051)
