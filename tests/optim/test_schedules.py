"""Learning-rate schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.optim.schedules import ConstantSchedule, CosineSchedule, WSDSchedule, make_schedule
from jaxlm.schema import UserError

SCHEDULES = [
    ConstantSchedule(warmup_steps=10),
    CosineSchedule(warmup_steps=10, final=0.1),
    WSDSchedule(warmup_steps=10, decay_steps=30, final=0.05),
    WSDSchedule(warmup_steps=10, decay="cosine"),
    WSDSchedule(warmup_steps=10, decay="one_minus_sqrt"),
]


def values(settings, peak=2.0, steps=100):
    schedule = jax.jit(make_schedule(settings, peak, steps))
    return np.array([schedule(jnp.asarray(t, jnp.int32)) for t in range(steps + 1)])


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda s: f"{s.kind}-{getattr(s, 'decay', '')}")
def test_warmup_is_linear_and_what_follows_never_rises(settings):
    rates = values(settings)
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    assert np.all(np.diff(rates[10:]) <= 1e-7)
    assert rates.max() == 2.0


def test_cosine_values():
    rates = values(CosineSchedule(warmup_steps=10, final=0.1))
    np.testing.assert_allclose(rates[10], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates[55], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(rates[100], 0.2, rtol=1e-6)


def test_wsd_values():
    rates = values(WSDSchedule(warmup_steps=10, decay_steps=30, final=0.05))
    assert np.all(rates[10:71] == 2.0)
    np.testing.assert_allclose(rates[85], 2.0 * (0.05 + 0.95 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(rates[100], 0.1, rtol=1e-6)
    root = values(WSDSchedule(decay_steps=40, decay="one_minus_sqrt"))
    np.testing.assert_allclose(root[70], 2.0 * (1 - np.sqrt(0.25)), rtol=1e-5)


def test_stages_longer_than_the_run_are_refused():
    with pytest.raises(UserError, match="warmup_steps=200 is longer than train.steps=100"):
        make_schedule(CosineSchedule(warmup_steps=200), 1.0, 100)
    with pytest.raises(UserError, match=r"warmup_steps=60 \+ decay_steps=50"):
        make_schedule(WSDSchedule(warmup_steps=60, decay_steps=50), 1.0, 100)
