"""Devices: what is asked for is what runs, or an error says what to do."""

import warnings

import numpy as np
import onnxruntime as ort
import pytest

from gemini.errors import DeviceError, UsageError
from gemini.runtime import kv, load
from gemini.runtime.providers import CPU, CUDA, active_device, cuda_options, provider_list
from gemini.runtime.schema import LayerShape
from gemini.runtime.session import session_options

GPU_WHEEL = ["TensorrtExecutionProvider", CUDA, CPU]


def test_cpu_asks_for_the_cpu_only():
    assert provider_list("cpu", GPU_WHEEL) == [(CPU, {})]


def test_auto_takes_cuda_where_the_wheel_has_it():
    assert provider_list("auto", GPU_WHEEL) == [(CUDA, cuda_options()), (CPU, {})]
    assert provider_list("auto", [CPU]) == [(CPU, {})]


def test_cuda_without_the_gpu_wheel_is_an_error_with_the_remedy():
    with pytest.raises(DeviceError) as caught:
        provider_list("cuda", [CPU])
    assert "onnxruntime-gpu" in caught.value.remedy and "pip uninstall onnxruntime" in caught.value.remedy


def test_an_unknown_device_is_an_error():
    with pytest.raises(DeviceError, match="tpu"):
        provider_list("tpu", [CPU])


def test_cuda_that_did_not_start_is_an_error_and_never_the_cpu():
    asked = provider_list("cuda", GPU_WHEEL)
    with pytest.raises(DeviceError, match="could not start"):
        active_device("cuda", asked, [CPU])
    assert active_device("cuda", asked, [CUDA, CPU]) == "cuda"


def test_auto_says_so_when_cuda_did_not_start():
    with pytest.warns(RuntimeWarning, match="running on the CPU"):
        assert active_device("auto", provider_list("auto", GPU_WHEEL), [CPU]) == "cpu"


def test_load_refuses_cuda_here(shared_toy):
    if CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(DeviceError, match="no CUDA provider"):
        load(shared_toy.path, device="cuda")


def test_a_bundle_without_graphs_for_a_gpu_runs_on_the_cpu_or_says_what_to_do(shared_toy, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: GPU_WHEEL)
    assert load(shared_toy.path, threads=1).device == "cpu"
    with pytest.raises(DeviceError, match="no graphs for a GPU") as caught:
        load(shared_toy.path, device="cuda")
    assert "--gpu" in caught.value.remedy


def test_where_cuda_does_not_start_the_float32_graph_runs(half_toy, monkeypatch):
    """A wheel that names CUDA and has no such provider: what a machine without a driver looks like."""
    if CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(ort, "get_available_providers", lambda: GPU_WHEEL)
    monkeypatch.setattr("gemini.runtime.session.load_libraries", lambda: None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generator = load(half_toy.path, threads=1)
    assert any("running on the CPU" in str(each.message) for each in said)
    assert generator.device == "cpu" and generator.graph.inputs["past.0.key"][0] == "tensor(float)"
    with pytest.raises(DeviceError, match="could not start"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(half_toy.path, device="cuda")


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_a_bad_thread_count_is_refused(shared_toy, threads):
    with pytest.raises(UsageError):
        load(shared_toy.path, threads=threads)


def test_session_options_say_threads_and_spinning():
    options = session_options(3, spinning=False)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_loaded_session_knows_its_device_and_threads(shared_toy):
    generator = load(shared_toy.path, threads=2, spinning=False)
    assert (generator.device, generator.threads) == ("cpu", 2)


def test_buffers_lie_on_the_device_asked_for(monkeypatch):
    made = []

    def record(array, device_type="cpu", device_id=0):
        made.append((array.shape, device_type, device_id))
        return "value"

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", record)
    layers = [LayerShape(2, 16, 24)]
    assert kv.allocate(layers, 3, 64, "cuda", np.float16) == ["value", "value"]
    assert made == [((3, 2, 64, 16), "cuda", 0), ((3, 2, 64, 24), "cuda", 0)]


def test_cpu_values_share_the_memory_of_their_arrays():
    array = np.zeros((2, 3), np.float32)
    value = kv.to_device(array, "cpu")
    array[1, 2] = 5
    assert np.shares_memory(value.numpy(), array) and value.numpy()[1, 2] == 5


def test_growing_keeps_what_is_used_and_nothing_else():
    (key, value) = kv.allocate([LayerShape(1, 16, 16)], 2, 4, "cpu", np.float32)
    key.numpy()[:] = 7
    larger = kv.allocate([LayerShape(1, 16, 16)], 2, 8, "cpu", np.float32)
    kv.copy([key, value], larger, 3)
    larger, _ = larger
    assert (larger.numpy()[:, :, :3] == 7).all() and (larger.numpy()[:, :, 3:] == 0).all()


def test_host_inputs_are_bound_again_before_each_run_on_a_device(shared_toy, monkeypatch):
    """Binding copies a host input to the device, so a stale binding would feed the previous token."""
    from dataclasses import replace

    from gemini.runtime import decoder as module

    generator = load(shared_toy.path, threads=1)
    decoder = module.Decoder(generator.graph, generator.model, 4)
    decoder.prefill([[5, 6]])
    bound = []
    decoder._graph = replace(generator.graph, device="cuda")
    monkeypatch.setattr(
        ort.IOBinding,
        "bind_ortvalue_input",
        lambda self, name, value: bound.append((name, value.numpy().tolist())),
    )
    monkeypatch.setattr(ort.IOBinding, "synchronize_outputs", lambda self: bound.append("synchronized"))
    decoder.step([9])
    assert bound[-1] == "synchronized"
    assert sorted(bound[:-1]) == [
        ("input_ids", [[9]]),
        ("logit_positions", [[0]]),
        ("seqlens_k", [2]),
        ("total_sequence_length", 3),
    ]
