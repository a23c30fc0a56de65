"""Several processes serve a model as one does: each rank chooses for its own heads."""

import os
import sys

import pytest
from vllm import SamplingParams

from mikv_vllm.config import CompressionConfig
from mikv_vllm.evaluation.forced_decoding import ForcedDecoding
from mikv_vllm.evaluation.quality import QualityRun, generate_together
from mikv_vllm.evaluation.windows import Window

from .conftest import idle_stats, ratio, start, stop
from .generated import random_tokens, save_model

pytestmark = pytest.mark.engine

RATIO = 4.0
WINDOWS = [
    Window(random_tokens(length, seed=length), random_tokens(48, seed=1))
    for length in (1500, 1000, 700)
]
PARALLEL = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "ray": {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def one_cpu_each():
    """Workers of one machine need their threads bound apart; two of them, here."""
    cpus = sorted(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cpus[0]}|{cpus[-1]}")
        yield


def engine_of(model, **kwargs):
    return start(
        model,
        CompressionConfig(),
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=32 << 20,
        logits_processors=[ForcedDecoding],
        **kwargs,
    )


def mixed_batch(engine):
    """Reports of native and compressed requests that share their steps."""
    ratios = (1.0, 2.0, RATIO, 6.0)
    prompts = [{"prompt_token_ids": random_tokens(300 + 400 * i, seed=i)} for i in range(4)]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=60, ignore_eos=True, detokenize=False, extra_args=ratio(r)
        )
        for r in ratios
    ]
    outputs = generate_together(engine, prompts, params)
    assert all(len(output.outputs[0].token_ids) == 60 for output in outputs)
    return [output.kv_transfer_params["kv_compression"] for output in outputs]


@pytest.fixture(scope="module")
def single(model):
    """One process: its reports, and references at ratio 1 and at ``RATIO``."""
    engine = engine_of(model)
    reports = mixed_batch(engine)
    references = {}
    for reference in (1.0, RATIO):
        engine.reset_prefix_cache()
        references[reference] = QualityRun(engine, WINDOWS, reference)
    compressed = references[1.0].measure(RATIO).divergence
    stop(engine)
    yield reports, references, compressed
    for run in references.values():
        run.close()


def let_ray_have_cpus() -> None:
    """vLLM's CPU platform names no resource of Ray's, and so refuses Ray: name one."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


@pytest.fixture(scope="module")
def ray():
    """A cluster of two GPUs, as Ray believes: they are the CPUs of this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.platforms.cpu.CpuPlatform.ray_device_key", "GPU")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token in the home directory
        ray.init(
            num_cpus=2,
            num_gpus=2,
            object_store_memory=80 << 20,
            include_dashboard=False,
            _system_config={"worker_niceness": 0},  # else they starve beside this process
            runtime_env={
                "worker_process_setup_hook": let_ray_have_cpus,
                "env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            },
        )
        yield
        ray.shutdown()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name != "tensor" else ()) for name in PARALLEL
    ],
)
def parallel(request, model, single, one_cpu_each):
    if request.param == "ray":
        request.getfixturevalue("ray")
    engine = engine_of(model, **PARALLEL[request.param])
    yield engine
    stop(engine)


def test_ranks_serve_as_one_process_does(parallel, single):
    reports, references, compressed = single
    assert mixed_batch(parallel) == reports
    for reference, run in references.items():
        run.use(parallel)
        parallel.reset_prefix_cache()
        divergence = run.measure(reference).divergence
        print(f"ratio {reference}: {divergence:.2e} nats apart; compression: {compressed:.2e}")
        assert divergence < compressed / 5


def test_ranks_agree_on_every_count(parallel):
    before = idle_stats(parallel)["operations"]["compress"]
    mixed_batch(parallel)
    assert idle_stats(parallel)["operations"]["compress"] == before + 3
