"""A training begins with the weights of another run, and says which."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expt.errors import ConfigError
from expt.run.start import start_from
from expt.training import checkpoint


def saved(folder, weights) -> str:
    path = folder / checkpoint.FOLDER / checkpoint.BEST
    path.parent.mkdir(parents=True)
    torch.save({"model": weights, "step": 7, "val": 1.0, "epoch": 1}, path)
    return str(folder)


class Grown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)


def test_weights_of_the_same_name_are_taken_and_the_rest_is_said(tmp_path) -> None:
    run = saved(
        tmp_path,
        {"first.weight": torch.ones(2, 2), "first.bias": torch.ones(2), "gone": torch.ones(1)},
    )
    model = Grown()
    before = model.second.weight.clone()
    said = start_from(model, run)
    assert said.endswith(
        "step 7: 2 of 4 trained weights; 2 are new; 1 of its weights have no place here"
    )
    assert torch.equal(model.first.weight, torch.ones(2, 2))
    assert torch.equal(model.second.weight, before)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"other": torch.ones(1)}, "none of its 1 weights has a name of this model's"),
        ({"first.bias": torch.ones(3)}, r"first.bias is \[3\] there and \[2\] here"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, weights, words) -> None:
    with pytest.raises(ConfigError, match=words):
        start_from(Grown(), saved(tmp_path, weights))


def test_a_run_starts_from_another_and_a_resumed_one_from_its_own(expt, home) -> None:
    common = ("trainer.epochs=1", "trainer.test=false", "memory.plan=false")
    assert expt(*common, "hydra.run.dir=one")[0] == 0
    code, out, err = expt(*common, "hydra.run.dir=two", "trainer.start_from=one")
    assert code == 0, err
    assert "starting from one, step" in out and "are new" not in out
    code, out, err = expt("trainer.resume=two", "trainer.epochs=2", small=False)
    assert code == 0, err
    assert "starting from" not in out
    code, _, err = expt(*common, "hydra.run.dir=three", "trainer.start_from=nowhere")
    assert code == 2 and "nowhere has no checkpoints/best.pt" in err


def test_frozen_weights_of_another_run_are_in_the_checkpoints(expt, home) -> None:
    common = ("trainer.test=false", "memory.plan=false", "model=stid")
    assert expt(*common, "trainer.epochs=1", "hydra.run.dir=one")[0] == 0
    frozen = ("trainer.start_from=one", "trainer.trainable=[*.bias]")
    code, _, err = expt(*common, *frozen, "trainer.epochs=1", "hydra.run.dir=two")
    assert code == 0, err
    from expt import load

    first = dict(load("one").model.named_parameters())
    for name, weight in load("two").model.named_parameters():
        assert torch.equal(weight, first[name]) or name.endswith("bias"), name
    code, _, err = expt("trainer.resume=two", "trainer.epochs=2", small=False)
    assert code == 0, err
