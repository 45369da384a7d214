"""Checkpoints and averages: round trips, damage, a full disk."""

import errno

import pytest
import torch
from torch import nn

from gemini.errors import CheckpointError
from gemini.model.training import state
from gemini.model.training.average import RunningAverage
from gemini.model.training.losses import make_optimizer
from gemini.model.training.state import Progress


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def work(network, optimizer):
    network(torch.randn(5, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_checkpoint_restores_model_and_optimizer(network, tmp_path):
    optimizer = make_optimizer(network, 0.1)
    work(network, optimizer)
    parts = {
        "model": state.model_tensors(network),
        "optimizer": state.optimizer_tensors(network, optimizer),
    }
    path = state.save_state(tmp_path, Progress(step=3, elapsed=1.5, history=[{"loss": 2.0}]), parts)
    expected = {name: value.clone() for name, value in state.model_tensors(network).items()}
    work(network, optimizer)

    progress, loaded = state.load_state(path)
    assert progress == Progress(step=3, elapsed=1.5, history=[{"loss": 2.0}])
    state.copy_tensors(state.model_tensors(network), loaded["model"])
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    fresh = make_optimizer(network, 0.1)
    state.restore_optimizer(network, fresh, loaded["optimizer"])
    restored = state.optimizer_tensors(network, fresh)
    assert restored.keys() == loaded["optimizer"].keys()
    assert all(torch.equal(value, loaded["optimizer"][name]) for name, value in restored.items())


def test_half_written_checkpoints_are_not_seen_and_old_ones_go(network, tmp_path):
    parts = {"model": state.model_tensors(network)}
    state.save_state(tmp_path, Progress(step=1), parts)
    state.save_state(tmp_path, Progress(step=2), parts)
    (tmp_path / "step-00000003.partial").mkdir()
    assert [path.name for path in state.finished_states(tmp_path)] == ["step-00000002"]


def test_a_full_disk_leaves_the_last_checkpoint(network, tmp_path, monkeypatch):
    parts = {"model": state.model_tensors(network)}
    state.save_state(tmp_path, Progress(step=1), parts)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        state.save_state(tmp_path, Progress(step=2), parts)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_damage_and_other_models_are_refused(network, tmp_path):
    path = state.save_state(tmp_path, Progress(step=1), {"model": state.model_tensors(network)})
    _, loaded = state.load_state(path)
    with pytest.raises(CheckpointError, match="another model"):
        state.copy_tensors(state.model_tensors(nn.Linear(2, 2)), loaded["model"])
    (path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read"):
        state.load_state(path)


def test_the_running_average_follows_its_formula(network):
    average = RunningAverage(network, 0.9)
    expected = network[3].weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            network[3].weight.normal_()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network[3].weight.detach()
        average.update(network, step)
    torch.testing.assert_close(average.tensors["3.weight"], expected, rtol=1e-5, atol=1e-6)
    own = network[3].weight.detach().clone()
    with average.applied(network):
        torch.testing.assert_close(network[3].weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(network[3].weight, own)
