"""What tests ask of Pallas' interpreters, and what those keep to themselves."""

import contextlib
from collections.abc import Iterator

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import IDX_BY_GPU_MEMORY_SPACE, GPUSharedMemory, HostAllocationKey
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jaxlm.ops import kernels
from jaxlm.parallel.context import use_mesh
from jaxlm.parallel.mesh import make_mesh

# With race detection, on memory filled with NaN. The steps of a grid have no races on one core of a TPU: two share its
# parallel axes, in random order.
TPU = pltpu.InterpretParams(random_seed=1, detect_races=True, num_cores_or_threads=2)
# More copies than are under way, each with a clock of its own: of two that share one the wait for the later would do for both.
GPU = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)

# Tests of GPU kernels that run by the interpreter, and in the lane `gpu` on the GPU that is there.
ON_GPU = pytest.param(False, marks=pytest.mark.gpu, id="device")
INTERPRETER_AND_GPU = pytest.mark.parametrize("interpret", [pytest.param(True, id="interpreter"), ON_GPU])

# Of an op whose kernels take 64 key and value channels, on one GPU, on eight virtual ones and on those that are there.
ONE_AND_SEVERAL = pytest.mark.parametrize(
    ("kind", "T", "H", "mesh", "interpret"),
    [
        ("scalar", 150, 1, None, True),
        pytest.param("scalar", 70, 4, {"data": 2, "tensor": 4}, True, marks=pytest.mark.slow),
        pytest.param("vector", 70, 4, {"data": 2, "tensor": 4}, True, marks=pytest.mark.slow),
        pytest.param("scalar", 150, 4, None, False, marks=pytest.mark.gpu),
    ],
    ids=["one device", "split rows and heads", "split rows and heads, channels", "device"],
)

SMEM = IDX_BY_GPU_MEMORY_SPACE[plgpu.SMEM]

# Where an interpreter makes what it knows of races, anew for every kernel.
_STATES = ((tpu, "RaceDetectionState"), (gpu, "GPURaceDetectionState"))


def _checked(wgmma):
    """The interpreter looks for no races of what products read on a Hopper GPU. They read shared memory as the copy engine
    does, so that stores have to be committed; what was read is free once the product is there.

    Products with an operand in registers are not `wgmma` by the interpreter (`Call.dot`): of those it sees races, but no
    stores that were not committed.
    """

    @gpu.fail_on_exception
    def product(*, token, thread, source_info, **named):
        memory, races = gpu._get_shared_memory(), gpu.get_races()
        if memory.detect_races:
            clock = memory.incr_clock(thread)
            for operand in "ab":
                key = HostAllocationKey.from_array(named[f"{operand}_allocation_key_as_array"])
                transforms = jax.tree.map(int, gpu._remove_noop_transforms(named[f"{operand}_transforms"]))
                access = memory.access(key, transforms)
                races.check_read(thread, clock.generic_clock.copy(), key, access, source_info)
                if key.memory_space_id == SMEM:
                    seen = clock.async_smem_clock.copy()
                    seen.inc(memory.thread_to_vc_position(thread.warp(0)))  # else own stores would always be in order
                    races.check_read(thread, seen, key, access, source_info)
                    with races.lock:  # of what is not waited for later stores would be races
                        races.reads[key] = [other for other in races.reads[key] if other[1] is not seen]
        return wgmma(token=token, thread=thread, source_info=source_info, **named)

    return product


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
        patch.setattr(gpu, "wgmma", _checked(gpu.wgmma))
        try:
            yield
        finally:  # after an error the next kernel would find this one's memory
            pltpu.reset_tpu_interpret_mode_state()
            gpu.reset_gpu_interpret_mode_state()
    assert len(states) >= kernels
    assert not any(state.races_found for state in states)


@contextlib.contextmanager
def hopper(interpret: bool, mesh: dict[str, int] | None = None) -> Iterator[None]:
    """Ops within this context take the kernels of Hopper GPUs: by the interpreter, split over a mesh if there is one, or on the
    GPUs of this machine, split over all of them."""
    with contextlib.ExitStack() as stack:
        if interpret:
            stack.enter_context(kernels.interpreted("gpu", "NVIDIA H100 80GB HBM3"))
        else:
            data = 2 if jax.device_count() > 2 else 1
            mesh = {"data": data, "tensor": jax.device_count() // data}
        if mesh:
            stack.enter_context(use_mesh(make_mesh(mesh)))
        yield


def let_gpus_differ(patch: pytest.MonkeyPatch) -> None:
    """The first of several GPUs to end a kernel would find the others' barriers, which its interpreter takes for its own. Until
    the end of a test, as what it computes may be under way when it leaves `hopper`."""
    patch.setattr(GPUSharedMemory, "assert_no_barriers_allocated", lambda self: None)
