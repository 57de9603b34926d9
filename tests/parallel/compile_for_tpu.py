"""Compile a training step for a TPU topology that nobody here owns, and print what the compiler says, as JSON.

    python -m tests.parallel.compile_for_tpu v5e:2x4 '{"model": {...}, "data": {...}, "mesh": {...}}'

A process of its own: the TPU compiler reads its settings from the environment before jax is imported.
"""

import json
import os
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxlm import params
from jaxlm.config import RunConfig
from jaxlm.parallel.context import use_mesh
from jaxlm.training.loop import jit_train_step, prepare
from jaxlm.training.state import abstract_state

COLLECTIVE = re.compile(r"= (\([^)]*\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
KERNEL = re.compile(r'%\w*?([a-z]+_[a-z]+_(?:forward|backward))_*[.\d]* = [^\n]*custom_call_target="tpu_custom_call"')


def compile_step(topology: str, config: dict) -> dict:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    setup = prepare(RunConfig.model_validate_json(json.dumps(config)), devices=devices)
    shape = (setup.config.data.batch_size, setup.config.data.sequence_length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32, sharding=setup.batch_sharding)
        for name in ("tokens", "targets", "segment_ids", "weights")
    }
    with use_mesh(setup.mesh, setup.rules):
        state = abstract_state(setup.optimizer, setup.infos, setup.shardings)
        compiled = jit_train_step(setup).lower(state, batch).compile()
    memory = compiled.memory_analysis()
    program = compiled.as_text()
    kinds = [kind for _, kind in COLLECTIVE.findall(program)]
    return {
        "parameters": params.count(setup.infos),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "peak_gib": memory.peak_memory_in_bytes / 2**30,
        "kernels": sorted(set(KERNEL.findall(program))),
        "collectives": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "mesh": {name: setup.mesh.shape[name] for name in setup.mesh.axis_names},
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    print(json.dumps(compile_step(sys.argv[1], json.loads(sys.argv[2]))))
