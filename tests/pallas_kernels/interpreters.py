"""What tests ask of Pallas' interpreters, and what those keep to themselves."""

import contextlib
from collections.abc import Iterator

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

# With race detection, on memory filled with NaN. The steps of a grid have no races on one core of a TPU: two share its
# parallel axes, in random order.
TPU = pltpu.InterpretParams(random_seed=1, detect_races=True, num_cores_or_threads=2)
GPU = plgpu.InterpretGPUParams(detect_races=True)

# Where an interpreter makes what it knows of races, anew for every kernel.
_STATES = ((tpu, "RaceDetectionState"), (gpu, "GPURaceDetectionState"))


@contextlib.contextmanager
def no_races(kernels: int) -> Iterator[None]:
    """What runs within this context, `TPU` or `GPU` and so many kernels at least, has no races.

    From jax 0.12 on a race raises where it is found; before, it is printed.
    """
    states = []

    def remembered(make):
        def state(*args, **named):
            states.append(make(*args, **named))
            return states[-1]

        return state

    with pytest.MonkeyPatch.context() as patch:
        for module, name in _STATES:
            patch.setattr(module, name, remembered(getattr(module, name)))
        try:
            yield
        finally:  # after an error the next kernel would find this one's memory
            pltpu.reset_tpu_interpret_mode_state()
            gpu.reset_gpu_interpret_mode_state()
    assert len(states) >= kernels
    assert not any(state.races_found for state in states)


def let_gpus_differ(patch: pytest.MonkeyPatch) -> None:
    """The first of several GPUs to end a kernel would find the barriers of the others, which its interpreter takes for its
    own. Kernels with several threads a block may still wait for ever: XLA runs those on the threads that its devices hold.
    """
    patch.setattr(GPUSharedMemory, "assert_no_barriers_allocated", lambda self: None)
