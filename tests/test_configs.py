"""Every config in configs/ resolves to its golden text and has its recorded parameter count.

After a wanted change: `python -m tests.test_configs` writes both anew; read the difference before committing it.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlm import params
from jaxlm.config_loading import to_yaml
from jaxlm.models.language_model import abstract_model
from jaxlm.training.run import builtin_configs, load_config

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted(path.stem for path in builtin_configs().glob("*.yaml"))

# What the byte tokenizer gives a config without a vocabulary: 257 ids, rounded up to a multiple of 64.
BYTES_VOCABULARY = 320


def parameter_count(config) -> int:
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or BYTES_VOCABULARY})
    return params.count(params.describe(abstract_model(model, jnp.float32)))


@pytest.mark.parametrize("name", CONFIGS)
def test_resolved_text_is_golden(name):
    assert to_yaml(load_config(name).config) == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_is_recorded(name):
    recorded = json.loads((GOLDEN / "parameters.json").read_text())
    assert parameter_count(load_config(name).config) == recorded[name]


def test_nothing_golden_is_left_of_a_config_that_is_gone():
    assert sorted(path.stem for path in GOLDEN.glob("*.yaml")) == CONFIGS
    assert sorted(json.loads((GOLDEN / "parameters.json").read_text())) == CONFIGS


# Of papers, released models and the defaults of flash-linear-attention. The README says which configs are
# not among them.
PUBLISHED = {
    "gla-340m": 341_707_776, "gla-1.3b": 1_365_514_240, "deltanet-340m": 341_594_112, "deltanet-1.3b": 1_365_677_056,
    "gated-deltanet-1.3b": 1_387_348_732, "kda-1.3b": 1_390_941_568, "hgrn2-1.3b": 1_364_396_032,
    "rwkv7-1.3b": 1_366_644_736, "mamba2-370m": 368_346_624, "mamba2-1.3b": 1_343_757_312,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert parameter_count(load_config(name).config) == PUBLISHED[name]


def test_retnet_is_of_the_published_size_with_a_channel_mixer_twice_as_wide():
    """Counted with ratio 4, where the config has flash-linear-attention's 2."""
    config = load_config("retnet-1.3b", ["model.ffn.ratio=4.0"]).config
    assert parameter_count(config) == 1_766_963_200


def test_phi4_mini_flash_has_the_published_size():
    """As released: 3,339,955,200 weights beside the tied embedding; norms, attention's biases and lambdas come on top."""
    infos = params.describe(abstract_model(load_config("phi4-mini-flash").config.model, jnp.float32))
    attention = ("norm", "vectors", "q.bias", "v.bias", "output.bias")
    weights = sum(i.size for name, i in params.leaves(infos) if i.role != "constant" and not any(a in name for a in attention))
    assert weights == 3_339_955_200 + 200_064 * 2560
    assert params.count(infos) == pytest.approx(3.85e9, rel=0.001)


if __name__ == "__main__":
    for name in CONFIGS:
        (GOLDEN / f"{name}.yaml").write_text(to_yaml(load_config(name).config))
    counts = {name: parameter_count(load_config(name).config) for name in CONFIGS}
    (GOLDEN / "parameters.json").write_text(json.dumps(counts, indent=2) + "\n")
