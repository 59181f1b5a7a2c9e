"""Images encoded in chunks: the same loss and gradients, and no graph where nothing is trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from expt.errors import ConfigError, ModelError
from expt.jobs.attention import EncoderLayer
from expt.jobs.vision.chunks import EncodedInChunks


class Tower(nn.Module):
    """Patches of 4 x 4 pixels through one layer: [M, 3, 8, 8] -> [M, 4, 16]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.layer = EncoderLayer(16, 2, 2, dropout)
        self.seen: list[int] = []

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        self.seen.append(len(images))
        return scale * self.layer(self.patches(images).flatten(2).transpose(1, 2))


def tower(dropout: float = 0.0) -> Tower:
    torch.manual_seed(0)
    return Tower(dropout)


IMAGES = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_trained_tower_has_the_same_loss_and_gradients_and_is_computed_twice() -> None:
    plain, cut = tower(), tower()
    whole = plain(IMAGES.flatten(0, 1), scale=2.0).unflatten(0, (2, 5))
    chunked = EncodedInChunks(cut, 4)(IMAGES, scale=2.0)
    assert chunked.shape == (2, 5, 4, 16)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
    whole.square().sum().backward()
    chunked.square().sum().backward()
    for one, other in zip(plain.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-5)
    assert sorted(cut.seen) == sorted([4, 4, 2] * 2)


def test_dropout_draws_the_same_in_both_passes() -> None:
    encoder = EncodedInChunks(tower(0.5), 3)
    images = IMAGES.clone().requires_grad_()
    out = encoder(images)
    out.sum().backward()
    assert images.grad is not None
    torch.manual_seed(3)
    first = torch.autograd.grad(encoder(images).square().sum(), images)[0]
    torch.manual_seed(3)
    parts = [encoder.encoder(part) for part in images.flatten(0, 1).split(3)]
    second = torch.autograd.grad(torch.cat(parts).square().sum(), images)[0]
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_the_random_state_is_read_only_if_it_is_wanted(monkeypatch) -> None:
    read = []
    state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: read.append(1) or state())
    EncodedInChunks(tower(), 4, preserve_rng_state=False)(IMAGES).sum().backward()
    assert not read
    EncodedInChunks(tower(), 4)(IMAGES).sum().backward()
    assert read


def test_a_frozen_tower_leaves_no_graph() -> None:
    encoder = EncodedInChunks(tower().requires_grad_(False), 4)
    encoded = encoder(IMAGES)
    assert encoded.grad_fn is None
    whole = encoder.encoder(IMAGES.flatten(0, 1)).unflatten(0, (2, 5))
    torch.testing.assert_close(encoded, whole, rtol=1e-5, atol=1e-6)
    encoder.encoder.requires_grad_(True)  # staged unfreezing
    assert encoder(IMAGES).grad_fn is not None
    assert EncodedInChunks(encoder.encoder, 4, trained=False)(IMAGES).grad_fn is None
    with torch.no_grad():
        assert encoder(IMAGES[0]).shape == (5, 4, 16)


def test_the_last_hidden_state_of_an_object_is_taken() -> None:
    class Named(nn.Module):
        def forward(self, images: Tensor) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=images.mean((2, 3)))

    assert EncodedInChunks(Named(), 2)(IMAGES).shape == (2, 5, 3)


@pytest.mark.parametrize("chunk", [0, -1, True, 2.0])
def test_a_chunk_is_a_number_of_images(chunk) -> None:
    with pytest.raises(ConfigError, match=f"chunk={chunk!r} must be"):
        EncodedInChunks(nn.Identity(), chunk)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8), (2, 2, 3, 0, 8), (8,)])
def test_other_axes_and_no_pixels_are_refused(shape) -> None:
    with pytest.raises(ModelError, match="cannot be encoded"):
        EncodedInChunks(nn.Identity(), 2)(torch.zeros(shape))


def test_what_does_not_return_one_entry_per_image_is_refused() -> None:
    with pytest.raises(ModelError, match="one entry per image"):
        EncodedInChunks(nn.Flatten(0), 2)(IMAGES)


def test_batch_normalisation_is_refused_only_where_it_would_not_be_exact() -> None:
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ModelError, match=r"memory\.batch_norm=frozen"):
        EncodedInChunks(made, 2)(IMAGES)
    with pytest.raises(ModelError, match=r"memory\.batch_norm=frozen"):
        EncodedInChunks(made, 64)(IMAGES)  # its averages would be counted twice
    EncodedInChunks(made, 64, trained=False)(IMAGES)
    EncodedInChunks(made.eval(), 2)(IMAGES)
