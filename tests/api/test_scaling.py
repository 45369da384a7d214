"""Random bundles of several sizes, measured in processes of their own and fitted."""

import json

from gemini import random_bundles
from gemini.benchmarks import scaling

TINY = {f"{n}": (64 * n, 128 * n, n, 2 * n, n) for n in (1, 2, 3, 4)}


def test_random_bundles_are_made_measured_and_fitted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_bundles, "SIZES", TINY)
    monkeypatch.setattr(random_bundles, "VOCABULARY", 512)
    for name, value in (("CONTEXTS", (4, 8, 5000)), ("STARTS", 1), ("NEW", 3)):
        monkeypatch.setattr(scaling, name, value)
    assert random_bundles.main([str(tmp_path)]) == 0
    assert "gemini.benchmarks.scaling" in capsys.readouterr().out
    folders = [str(tmp_path / name) for name in TINY]
    assert scaling.main([*folders, "--threads", "1", "--rounds", "1"]) == 0
    table, result = capsys.readouterr().out.strip().rsplit("\n", 1)
    measured = json.loads(result)["measured"]
    assert [each["shape"]["layers"] for each in measured] == [1, 2, 3, 4]
    assert all(set(each["step_ms"]) == {"4", "8"} and each["load_ms"] > 0 for each in measured)
    sizes = [each["shape"]["weight_bytes"] for each in measured]
    assert sizes == sorted(sizes) and table.count("| 8B |") == 2


def test_too_few_sizes_are_refused(tmp_path, capsys):
    assert scaling.main([str(tmp_path)]) == 2
    assert "4 bundles" in capsys.readouterr().err
