"""The 24 models of the published runs, and one iteration of the loop that they were measured in.

Only `published_plans.py` imports this, in an environment of its own that has torchvision's Python
models and the release of transformers that was measured (see `published_gpu.py`).

Sources: the sizes are those of the published checkpoints; weights are random, since the runs were
made from configurations. Inputs are as the runs had them: CIFAR-10 at 86x86, or lines of text cut
at 128 tokens and padded to the longest of the batch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.library
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 86
TOKENS = 128
CLASSES = 10
"""Classes of CIFAR-10: labels lie below it, whatever the model's own number of classes."""
CNNS: dict[str, tuple[str, int]] = {
    "VGG16": ("vgg16", 1000), "VGG19": ("vgg19", 1000),
    "ResNet101": ("resnet101", 1000), "ResNet152": ("resnet152", 1000),
    "MobileNetV2": ("mobilenet_v2", 1000),
    "MobeNetV3Small": ("mobilenet_v3_small", 10), "MobeNetV3Large": ("mobilenet_v3_large", 10),
    "MnasNet": ("mnasnet1_0", 10),
    "ConvNeXtTiny": ("convnext_tiny", 1000), "ConvNeXtBase": ("convnext_base", 1000),
    "RegNetX400MF": ("regnet_x_400mf", 1000), "RegNetY400MF": ("regnet_y_400mf", 1000),
}  # fmt: skip
"""torchvision's constructor and the number of classes, by the name in the rows."""


def _gpt2(**sizes: Any) -> Any:
    from transformers import GPT2Config

    return GPT2Config(**sizes)


def _opt(**sizes: Any) -> Any:
    from transformers import OPTConfig

    return OPTConfig(vocab_size=50272, **sizes)


def _gpt_neo() -> Any:
    from transformers import GPTNeoConfig

    return GPTNeoConfig(
        hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]]
    )


def _t5(**sizes: Any) -> Any:
    from transformers import T5Config

    return T5Config(vocab_size=32128, decoder_start_token_id=0, **sizes)


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=131072, rope_theta=500000.0,
    )  # fmt: skip


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip


def _gemma2() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
    )  # fmt: skip


CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "distilgpt2": lambda: _gpt2(n_layer=6),
    "gpt2": _gpt2,
    "opt-125m": lambda: _opt(
        hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "opt-350m": lambda: _opt(
        hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
        word_embed_proj_dim=512, do_layer_norm_before=False,
    ),
    "gpt-neo-125m": _gpt_neo,
    "cerebras-gpt-111m": lambda: _gpt2(
        n_embd=768, n_layer=10, n_head=12, n_inner=3072, n_positions=2048,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "t5-small": lambda: _t5(d_model=512, d_ff=2048, num_layers=6, num_heads=8, d_kv=64),
    "t5-base": lambda: _t5(d_model=768, d_ff=3072, num_layers=12, num_heads=12, d_kv=64),
    "llama-3.2-3b": _llama,
    "deepseek-r1-distill-qwen-1.5b": _qwen2,
    "qwen3-4b": _qwen3,
    "gemma-2-2b": _gemma2,
}  # fmt: skip
"""Configurations of transformers, by the name in the rows, in small letters."""
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad, "RMSprop": torch.optim.RMSprop,
    "Adafactor": torch.optim.Adafactor,
}  # fmt: skip


def configuration_of(name: str) -> str | None:
    """Return the entry of `CONFIGURATIONS` that a name in the rows means, None if there is none.

    Names may have an owner before them and a variant after them (``google/gemma-2-2b-it``).
    """
    last = name.rpartition("/")[2].lower()
    found = [known for known in CONFIGURATIONS if last.startswith(known)]
    return max(found, key=len, default=None)


def model_of(name: str) -> Callable[[], nn.Module]:
    """Return what makes the model of a row.

    Raises:
        KeyError: no such model was published.

    """
    if name in CNNS:
        return functools.partial(_cnn, *CNNS[name])
    known = configuration_of(name)
    if known is None:
        raise KeyError(f"no model {name}; known are {[*CNNS, *CONFIGURATIONS]}")
    return functools.partial(_transformer, known)


def _cnn(constructor: str, classes: int) -> nn.Module:
    models = torchvision_models()
    with warnings.catch_warnings():  # of weights that are not initialised as they will be
        warnings.simplefilter("ignore")
        made: nn.Module = getattr(models, constructor)(weights=None, num_classes=classes)
    return made


def _transformer(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

    config = CONFIGURATIONS[name]()
    made: nn.Module = (
        T5ForConditionalGeneration(config)
        if config.model_type == "t5"
        else AutoModelForCausalLM.from_config(config)
    )
    return made.train()


@functools.cache
def torchvision_models() -> Any:
    """Return `torchvision.models`, whose wheel is made for CUDA, beside a torch for the CPU.

    Its compiled operators are missing there, so that fakes for them cannot be registered.
    """
    register = torch.library.register_fake

    def passing_over(name: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **kwargs)

    torch.library.register_fake = passing_over  # type: ignore[assignment]
    try:
        import torchvision.models
    finally:
        torch.library.register_fake = register
    return torchvision.models


def batch_of(name: str, size: int) -> Callable[[], Any]:
    """Return what makes a batch of a row, as the measured loop had it."""
    if name in CNNS:
        return lambda: (torch.rand(size, 3, SIDE, SIDE), torch.randint(CLASSES, (size,)))

    def lines() -> dict[str, Tensor]:
        tokens = torch.randint(5, 1000, (size, TOKENS))
        mask = torch.ones(size, TOKENS, dtype=torch.int64)
        mask[1:, TOKENS // 2 :] = 0  # one line is the longest, the others are padded
        return {"input_ids": tokens, "attention_mask": mask}

    return lines


def loss_of(model: Callable[..., Any], batch: Any) -> Tensor:
    """Return the loss of a batch, as the measured loop computed it."""
    if isinstance(batch, dict):
        return model(**batch, labels=batch["input_ids"]).loss  # type: ignore[no-any-return]
    return F.cross_entropy(model(batch[0]), batch[1])


class GradientsKept:
    """An iteration of the loops that call `zero_grad` between forward and backward pass.

    Gradients then live through the next forward pass, as outputs and loss do.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._outputs: Any = None

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        """Take one step."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._outputs = model(*args, **kwargs)
            return self._outputs

        self._loss = loss_of(forward, batch)
        optimizer.zero_grad()
        self._loss.backward()
        optimizer.step()
