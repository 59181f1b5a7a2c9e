"""Which trials a peak cannot tell apart, and that a prediction is found again only for those."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from expt.config.compose import compose_lines
from expt.search import plan_cache, program
from expt.search.candidates import TrialJobs
from expt.search.plan_cache import UnknownStateError, plain, signs, tree
from expt.search.predicting import Composer, predict

SMALL = (
    "search=debug", "memory=minimal", "tracking=none", "data=metr_la_29", "model.embed_dim=8",
    "model.num_heads=2", "model.num_stages=1", "data.batch_size=4",
)  # fmt: skip


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Let no file of an earlier test count as seen."""
    monkeypatch.setattr(program, "code", program.Code())


def found(folder, *lines):
    return predict([*SMALL, *lines], None, folder)


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("optimizer.lr=0.01", True),
        ("optimizer.weight_decay=0.02", True),
        ("model.dropout=0.25", True),
        ("trainer.seed=7", True),
        ("trainer.schedule=constant", True),
        ("optimizer.weight_decay=0", False),
        ("model.dropout=0.0", False),
        ("model.sensor_dropout=0.1", False),  # an attribute of its own class: not looked through
        ("model.embed_dim=16", False),
        ("data.batch_size=8", False),
        ("memory.activation_checkpointing=true", False),
        ("trainer.gradient_clip_norm=null", False),
        ("trainer.ema_decay=0.9", False),
        ("optimizer=sgd", False),
    ],
)
def test_what_a_peak_depends_on(home, line, same):
    first = found(home / "known")
    again = found(home / "known", line)
    assert not first.recalled
    assert again.recalled is same
    real = found(None, line)
    assert again.peak_bytes == real.peak_bytes
    assert again.interval_bytes == real.interval_bytes
    assert found(home / "known", line).recalled, "the second time in any case"


def test_what_is_found_again_is_what_a_plan_says(home):
    """By chance points of a space; every plan that is taken over is made as well."""
    draw = random.Random(0)
    recalled = 0
    for _ in range(12):
        lines = [
            f"model.embed_dim={draw.choice([8, 16])}", f"optimizer.lr={draw.uniform(1e-4, 1e-2)}",
            f"model.dropout={draw.uniform(0.01, 0.3)}", f"trainer.seed={draw.randrange(100)}",
            f"memory.activation_checkpointing={draw.choice(['true', 'false'])}",
        ]  # fmt: skip
        one = found(home / "known", *lines)
        recalled += one.recalled
        if one.recalled:
            plan, real = dict(one.plan), dict(found(None, *lines).plan)
            plan["seconds"] = real["seconds"] = 0.0
            assert json.loads(json.dumps(plan)) == json.loads(json.dumps(real))
    assert recalled >= 6


def test_another_worker_finds_it_and_refuses_only_what_it_planned_itself(home):
    lines = [*SMALL, "search.trial=1"]
    first = TrialJobs([], None, home, None)
    known = first.predict(lines)
    first.worker.close()
    second = TrialJobs([], None, home, known.peak_bytes * 2)
    try:
        fits = second.predict([*lines, "optimizer.lr=0.02"])
        assert fits.recalled and fits.peak_bytes == known.peak_bytes
        second.budget_bytes = known.peak_bytes // 2
        over = second.predict([*lines, "optimizer.lr=0.02"])
        assert over.exceeds(second.budget_bytes) and not over.recalled
    finally:
        second.worker.close()


def test_a_changed_program_finds_nothing(home, monkeypatch):
    found(home / "known")
    monkeypatch.setattr(program, "installed", lambda: "another version of a package")
    assert not found(home / "known").recalled


def test_what_the_allocator_may_take_is_part_of_the_key(home, monkeypatch):
    found(home / "known")
    monkeypatch.setattr(plan_cache, "allocator_limit", lambda memory, target: 2**30)
    assert not found(home / "known").recalled


MODEL = """
from expt.jobs.traffic.alternating import Alternating

class Mine(Alternating):
    pass
"""


def test_a_file_that_changes_after_its_import_ends_the_keeping(home, monkeypatch):
    """The process still runs what it imported; another one runs what is there now."""
    monkeypatch.syspath_prepend(str(home))
    path = home / "model_of_mine.py"
    path.write_text(MODEL)
    line = "model._target_=model_of_mine.Mine"
    found(home / "known", line)
    assert found(home / "known", line).recalled
    (name,) = (home / "known").iterdir()
    path.write_text(f"{MODEL}# another\n")
    assert not found(home / "known", line).recalled
    assert not found(home / "known", line, "data.batch_size=8").recalled
    assert list((home / "known").iterdir()) == [name], "and nothing is kept"
    monkeypatch.setattr(program, "code", program.Code())  # as in a new process
    assert not found(home / "known", line).recalled
    assert len(list((home / "known").iterdir())) == 2
    sys.modules.pop("model_of_mine")


def test_a_class_is_told_by_its_file_wherever_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "layers_of_another.py"
    path.write_text("class Layer: pass")
    import layers_of_another

    first = program.hash_of_classes({layers_of_another.Layer, nn.Linear})
    assert first == program.hash_of_classes({layers_of_another.Layer})
    assert first != program.hash_of_classes({nn.Linear})
    path.write_text("class Layer: x = 1")
    with pytest.raises(program.ChangedCodeError):
        program.hash_of_classes({layers_of_another.Layer})
    monkeypatch.setattr(program, "code", program.Code())
    assert program.hash_of_classes({layers_of_another.Layer}) != first
    sys.modules.pop("layers_of_another")


def test_a_setting_that_cannot_be_written_down_costs_no_prediction(home, monkeypatch):
    def refuse(*given):
        raise UnknownStateError("a set of objects")

    monkeypatch.setattr(plan_cache, "find", refuse)
    monkeypatch.setattr(plan_cache, "keep", refuse)
    assert found(home / "known").peak_bytes > 0


def test_a_damaged_file_is_a_plan_to_be_made(home):
    found(home / "known")
    (path,) = (home / "known").glob("*.json")
    path.write_text('[{"read"')
    assert not found(home / "known").recalled
    assert found(home / "known").recalled


def test_a_disk_that_is_full_costs_no_prediction(home):
    (home / "known").write_text("a file where the folder should be")
    assert found(home / "known").peak_bytes > 0


class Odd(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)


def test_a_model_is_told_by_all_that_it_holds():
    def of(*layers):
        return tree(nn.Sequential(*layers))

    assert of(nn.Linear(2, 3), nn.Dropout(0.1)) == of(nn.Linear(2, 3), nn.Dropout(0.2))
    assert of(nn.Dropout(0.1)) != of(nn.Dropout(0.0)) != of(nn.Dropout(1.0))
    assert of(nn.Linear(2, 3)) != of(nn.Linear(3, 2))
    assert of(nn.Linear(2, 2)) != of(nn.Linear(2, 2).requires_grad_(False))
    assert of(Odd(rate=0.1)) != of(Odd(rate=0.2)), "what it does with it is not known"
    assert of(Odd(rate=1)) != of(Odd(rate=1.0)) != of(Odd(rate=True))
    one = nn.Linear(2, 2)
    assert of(one, one) != of(nn.Linear(2, 2), nn.Linear(2, 2)), "weights that are shared"


def test_what_cannot_be_written_down_is_not_guessed():
    rate = 0.1
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *given: None)
    buffered = Odd()
    buffered.register_buffer("mask", torch.ones(2))
    for one in (Odd(scale=torch.ones(1)), Odd(act=lambda x: x * rate), Odd(x=object()), hooked,
                buffered):  # fmt: skip
        with pytest.raises(UnknownStateError):
            tree(one)
    assert plain(torch.relu) and plain(nn.functional.gelu) and plain({"a": (1, [None])})


def test_the_sign_is_what_counts_for_optimizers_of_torch_alone():
    one = {"_target_": "torch.optim.AdamW", "lr": 0.1, "groups": {"head": {"lr": 0.2}}}
    assert signs(one) == signs({**one, "lr": 0.3, "groups": {"head": {"lr": 0.5}}})
    assert signs(one) != signs({**one, "groups": {"head": {"lr": 0.0}}})
    assert signs(one) != signs({**one, "betas": [0.9, 0.9]})
    own = {**one, "_target_": "my.AdamW"}
    assert signs(own) != signs({**own, "lr": 0.3})


@pytest.mark.parametrize(
    "lines",
    [
        [*SMALL, "optimizer.lr=0.02", "model.patch_sizes=[1,2]", "trainer.eval_batches=null"],
        ["model.dropout=0.2", "optimizer=sgd", "+memory=lite", "optimizer.lr=0.3"],
        [*SMALL, "+optimizer.maximize=true", "model.dropout=0.2"],
    ],
)
def test_a_configuration_is_what_hydra_composes(home, lines):
    composer = Composer()
    composer.compose([*lines[:-1], f"{lines[-1].partition('=')[0]}=null"], None)
    for _ in range(2):  # what was composed once stays as it is
        made = OmegaConf.to_container(composer.compose(lines, None), resolve=False)
        assert made == OmegaConf.to_container(compose_lines(lines, None), resolve=False)


def test_a_file_that_changed_is_composed_anew(home):
    own = home / "own/model/mine.yaml"
    own.parent.mkdir(parents=True)
    composer = Composer()
    for width in (8, 1024):
        own.write_text(f"defaults:\n  - alternating\nembed_dim: {width}\n")
        lines = [*SMALL[:4], "model=mine", "optimizer.lr=0.02"]
        assert composer.compose(lines, str(home / "own")).model.embed_dim == width
