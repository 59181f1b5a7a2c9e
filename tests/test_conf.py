"""Every YAML under conf/ composes, is valid, and trains at smoke size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from expt.config.compose import conf_dir
from expt.config.schema import Config
from expt.config.validate import validated
from expt.result import load_result
from expt.search.candidates import checker
from expt.search.space import Space

CONF = conf_dir()
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "local"
)
OF_THE_USER = (
    "metr_la",
    "pems_bay",
    "traffic",
    "video",
    "faces",
    "faceforensics",
    "celeb_df",
    "dfdc",
    "metaworld",
    "lerobot",
)
NEEDS_A_FILE = {("data", name) for name in OF_THE_USER}
# Three billion weights; tests/jobs/vla/test_plans.py has their plan.
NEEDS_A_FILE |= {("model", "vla_qwen"), ("experiment", "vla_qwen")}
# Seven and thirteen billion; tests/jobs/vision_language trains and plans small ones.
NEEDS_A_FILE |= {("model", "llava"), ("model", "llava_13b"), ("experiment", "llava")}
TINY_LLAVA = (
    "model=llava",
    "model.dtype=float32",
    "data.pixels=28",
    "data.tokens=8",
    "data.samples=16",
    "model.source.image_token_index=60",
    "model.source.text_config={hidden_size:32,intermediate_size:64,num_hidden_layers:2,"
    "num_attention_heads:2,num_key_value_heads:2,vocab_size:64,pad_token_id:2}",
    "model.source.vision_config={hidden_size:32,intermediate_size:64,num_hidden_layers:3,"
    "num_attention_heads:2,image_size:28,projection_dim:16}",
)
CLIPS, FACES = ("data.pixels=16", "data.frames=4"), ("data.pixels=32", "data.frames=2")
"""The smallest clips that what is trained here takes."""
PARTNERS = {
    # What an option of another job than the default's goes with, and sizes for a test.
    ("data", "manipulation"): ("model=r3d_small", *CLIPS),
    ("data", "tampered"): ("model=frame_sequence_small", *FACES),
    ("data", "metaworld_state"): ("model=vla",),
    ("experiment", "vla"): ("data.batch_size=16", "data.stride=160"),
    ("model", "vla"): ("data=metaworld_state",),
    ("data", "instructions"): TINY_LLAVA,
    ("model", "r3d"): ("data=manipulation", "model.width=8", *CLIPS),
    ("model", "r3d_small"): ("data=manipulation", *CLIPS),
    ("model", "frame_sequence"): ("data=tampered", "model.width=8", *FACES),
    ("model", "frame_sequence_small"): ("data=tampered", *FACES),
    ("experiment", "deepfake"): FACES,
    ("experiment", "video"): CLIPS,
}
NEEDS_A_PACKAGE = {("optimizer", "adamw_8bit"): "bitsandbytes"}
SMOKE = {
    # What makes an option small enough for a test, after its own settings.
    "experiment": (
        "trainer.epochs=1", "trainer.steps_per_epoch=2", "data.batch_size=8",
        "data.eval_batch_size=8",
    ),
    "debug": ("trainer.epochs=1",),
}  # fmt: skip
SMALL_MODEL = ("model.num_stages=1", "model.embed_dim=16")
"""Of the default model, where it is not what is tried."""
SMALL = ("trainer.eval_batches=1", "trainer.steps_per_epoch=2", "data.batch_size=4")


def choose(group: str, option: str) -> list[str]:
    """The override that picks an option; memory is added, not replaced."""
    return [f"{'+' if group == 'memory' else ''}{group}={option}"]


def require(group: str, option: str) -> None:
    """Skip an option whose optional package is not installed."""
    if package := NEEDS_A_PACKAGE.get((group, option)):
        pytest.importorskip(package)


def test_every_group_of_the_schema_has_a_folder():
    groups = {group for group, _ in OPTIONS}
    assert groups >= {"task", "model", "data", "optimizer", "trainer", "memory", "tracking"}
    assert len(OPTIONS) > 20


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_it_composes_and_is_valid(composed, group, option):
    require(group, option)
    cfg = composed(*choose(group, option))
    settings = validated(cfg)
    assert settings.trainer.epochs > 0
    assert set(cfg) == set(Config.__dataclass_fields__)


@pytest.mark.parametrize(
    ("group", "option"),
    [
        pair
        for pair in OPTIONS
        if pair not in NEEDS_A_FILE and pair[0] not in ("tracking", "task", "search")
    ],
)
def test_it_trains(expt, home, group, option):
    require(group, option)
    arguments = choose(group, option)
    if group not in ("debug", "experiment"):
        arguments += ["debug=smoke", "trainer.epochs=1", *SMALL]
    if group != "memory":
        arguments.append("memory=minimal")
    if group in SMOKE:
        arguments += [*SMOKE[group], "trainer.eval_batches=1"]
    if group != "model" and option != "profile":  # which compares with what was predicted
        arguments.append("memory.plan=false")
    arguments += PARTNERS.get((group, option), ())
    if group != "memory" and not any(one.startswith(("model", "experiment")) for one in arguments):
        arguments += SMALL_MODEL
    code, _, err = expt(
        *arguments, "tracking=none", "trainer.progress=false", "hydra.run.dir=run", small=False
    )
    assert code == 0, err
    result = load_result(home / "run")
    assert result.metrics[f"test/{result.monitor}"] is not None
    if option == "profile":
        assert (home / "run/profile.json").stat().st_size > 1000
        assert "Self CPU" in (home / "run/profile.txt").read_text()
        assert "| backward | 3 |" in (home / "run/profile_memory.md").read_text()
        memory = json.loads((home / "run/profile_memory.json").read_text())
        for name in ("measured_peak_bytes", "predicted_peak_bytes"):
            assert memory["peak_bytes"] == pytest.approx(memory[name], rel=0.01)
        assert (home / "run/plots/memory_timeline.png").stat().st_size > 1000


@pytest.mark.parametrize("name", [option for group, option in OPTIONS if group == "search"])
def test_a_search_varies_what_there_is_to_vary(composed, name):
    cfg = composed(f"search={name}")
    settings = OmegaConf.to_object(cfg.search)
    assert settings.problems() == []
    assert settings.study == name
    space = Space.parse(settings.space, checker(cfg))
    assert len(space.distributions) > 3


def test_presets_have_exactly_the_guides_sizes(composed):
    table = {
        "full": (32, 96, 4, 2, 3, [1, 2, 4], True),
        "lite": (16, 64, 4, 1, 2, [1, 2], False),
        "minimal": (8, 48, 4, 1, 2, [1], False),
    }
    for preset, sizes in table.items():
        cfg = composed(f"+memory={preset}")
        model = cfg.model
        assert (
            cfg.data.batch_size,
            model.embed_dim,
            model.num_heads,
            model.num_layers,
            model.num_stages,
            list(model.patch_sizes),
            model.cross_stage_attention,
        ) == sizes
    assert composed().model.embed_dim == 64, "no preset: the sizes of lite"


def test_precedence_is_command_line_then_experiment_then_preset(composed):
    assert composed("+memory=full").data.batch_size == 32
    assert composed("+memory=full", "experiment=stid").data.batch_size == 64
    assert composed("+memory=full", "experiment=stid", "data.batch_size=5").data.batch_size == 5


def test_local_settings_are_read_when_they_are_there(expt, home):
    (home / "mine/local").mkdir(parents=True)
    (home / "mine/local/default.yaml").write_text("# @package _global_\ntrainer:\n  epochs: 0\n")
    code, _, err = expt("--config-dir=mine", "memory=minimal", small=False)
    assert code == 2
    assert "trainer.epochs must be at least 1" in err


def test_the_examples_of_the_readme_run_as_they_stand(expt, home):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Your own model or data set")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.DOTALL)
    names = ("my_lab.py", "my_conf/model/mynet.yaml", "my_data.py", "my_conf/data/mine.yaml")
    for name, block in zip(names, blocks, strict=True):
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    speeds = np.random.default_rng(0).uniform(20, 70, (400, 3))
    np.savetxt(home / "speeds.txt", speeds)
    commands = [line.split()[3:] for line in section.splitlines() if line.startswith("    python")]
    assert len(commands) == 3
    for number, command in enumerate(commands):
        code, out, err = expt(*command, f"hydra.run.dir=run{number}")
        assert code == 0, err
    assert "data: 3 sensors, every 5 min, 400 steps" in out


def test_the_jobs_of_the_page_run_as_they_stand(expt, home):
    text = (Path(__file__).parents[1] / "docs/add-a-job.md").read_text(encoding="utf-8")
    written = []
    for block in re.findall(r"```(?:python|yaml)\n(# [\w./]+\n.*?)```", text, re.DOTALL):
        name, _, content = block.partition("\n")  # the first line only says which file it is
        path = home / name.removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        written.append(path.name)
    assert len(written) == 6
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for name in ("high", "low"):
            (home / f"recordings/{split}/{name}").mkdir(parents=True)
            for number in range(count):
                values = draw.normal(1.0 if name == "high" else -1.0, size=(3, 5))
                np.save(home / f"recordings/{split}/{name}/{number}.npy", values)
    commands = [line.split()[3:] for line in text.splitlines() if line.startswith("    python")]
    assert len(commands) == 3
    for number, command in enumerate(commands):
        run = (f"hydra.run.dir=run{number}", "tracking=none", "trainer.progress=false")
        code, out, err = expt(*command, *run, small=False)
        assert code == 0, err
        assert load_result(home / f"run{number}").metrics["test/accuracy"] > 0.6
        assert "predicted peak" in out


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def read(self): ...", ["my_data.Mine.read", "adjacency_path, where_to_get"]),
        ("def read(self, path, adjacency_path, where_to_get): ...", ["NoneType", "from_arrays"]),
    ],
)
def test_a_reader_of_the_wrong_form_is_one_message(expt, home, body, words):
    (home / "my_data.py").write_text(
        f"from expt.jobs.traffic.data import TrafficData\nclass Mine(TrafficData):\n    {body}\n"
    )
    code, _, err = expt("data._target_=my_data.Mine")
    assert code == 2
    assert "Traceback" not in err
    assert all(word in err for word in words), err


def test_a_yaml_without_the_common_settings_says_how_to_get_them(expt, home):
    (home / "mine/data").mkdir(parents=True)
    (home / "mine/data/own.yaml").write_text("_target_: expt.jobs.traffic.data.TrafficData\n")
    for given in ((), ("data.path=x.npz",)):
        code, _, err = expt("--config-dir=mine", "data=own", *given, small=False)
        assert code == 2
        assert "defaults: [NAME, _self_]" in err


def test_a_model_and_a_data_set_of_ones_own_take_a_class_and_a_yaml_each(expt, home):
    (home / "my_lab.py").write_text(
        """
import numpy as np
from torch import nn
from expt.jobs.traffic.series import Series
from expt.jobs.traffic.data import TrafficData


class Net(nn.Module):
    def __init__(self, num_sensors: int, input_steps: int, horizon: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_steps, width), nn.Linear(width, horizon))

    def forward(self, speed, observed, time_of_day, day_of_week):
        return self.layers(speed.transpose(1, 2)).transpose(1, 2)


class Waves(TrafficData):
    def read(self, path, adjacency_path, where_to_get):
        steps = np.arange(600)
        values = 40 + 10 * np.sin(steps[:, None] / 20 + np.arange(3))
        start = np.datetime64("2020-01-06T00:00:00", "s")
        return Series(
            values=values.astype(np.float32),
            timestamps=start + 300 * steps,
            sensor_ids=("a", "b", "c"),
            adjacency=None,
            locations=None,
        )
"""
    )
    for group, text in {
        "model": "_target_: my_lab.Net\nwidth: 7\n",
        "data": "defaults: [traffic, _self_]\n_target_: my_lab.Waves\n",
    }.items():
        folder: Path = home / "mine" / group
        folder.mkdir(parents=True)
        (folder / "own.yaml").write_text(text)
    code, _, err = expt(
        "--config-dir=mine", "model=own", "data=own", "debug=smoke", "tracking=none",
        "model.width=5", "hydra.run.dir=run", small=False,
    )  # fmt: skip
    assert code == 0, err
    assert load_result(home / "run").parameters == 12 * 5 + 5 + 5 * 12 + 12
