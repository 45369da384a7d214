"""Scales of an 8-bit cache against a loop over keys and values, at every place of the context."""

import numpy as np
import pytest
import torch
from small_models import make_llama, make_windows, run

from gemini.compress.cache import rounded, scales_of
from gemini.compress.specs import QuantizeCache, QuantizeInt4
from gemini.errors import RecipeError


def keys_and_values(model, window, start):
    """The cache of a window that begins at ``start``, keys and values (kv_heads, S, dim) of each layer."""
    places = torch.arange(start, start + window.shape[1])[None]
    cache = model(input_ids=torch.as_tensor(window), position_ids=places, use_cache=True).past_key_values
    return [(layer.keys[0].detach(), layer.values[0].detach()) for layer in cache.layers]


def test_scales_are_the_largest_values_of_each_channel_wherever_a_text_stands():
    model, windows = make_llama(), make_windows(3)
    context, length = model.config.max_position_embeddings, windows[0].shape[1]
    (report,) = run(model, QuantizeCache(), calibration=windows)
    largest = [np.zeros((2, 2, 16)) for _ in range(2)]
    for window, start in zip(windows, (0, (context - length) // 2, context - length), strict=True):
        for layer, pair in enumerate(keys_and_values(model, window, start)):
            for part, x in enumerate(pair):
                for token in range(4 if start else 0, length):  # the first ones stand at the beginning only
                    for head in range(2):
                        for channel in range(16):
                            value = abs(float(x[head, token, channel]))
                            largest[layer][part, head, channel] = max(
                                largest[layer][part, head, channel], value
                            )
    for layer, pair in enumerate(scales_of(model).pairs()):
        for part, scales in enumerate(pair):
            np.testing.assert_allclose(scales.numpy(), largest[layer][part] / 127, rtol=1e-5)
    assert [one.name for one in report.layers] == [
        f"cache.{i}.{k}" for i in range(2) for k in ("key", "value")
    ]
    assert all(one.bits == 8 and one.bytes == 32 and 0 < one.relative_error < 1e-3 for one in report.layers)


def test_rounding_is_that_of_codes():
    x, scales = torch.randn(2, 5, 4), torch.rand(2, 4) * 0.01 + 0.005
    for head in range(2):
        for token in range(5):
            for channel in range(4):
                step = float(scales[head, channel])
                code = min(127, max(-128, round(float(x[head, token, channel]) / step)))
                assert rounded(x, scales)[head, token, channel] == pytest.approx(code * step, rel=1e-6)


def test_a_channel_that_is_never_used_has_a_scale():
    model = make_llama()
    model.model.layers[0].self_attn.v_proj.weight.data[3] = 0.0
    run(model, QuantizeCache(), calibration=make_windows())
    scales = scales_of(model).pairs()[0][1]
    assert scales[0, 3] > 0 and torch.isfinite(rounded(torch.zeros(2, 1, 16), scales)).all()


def test_weights_that_are_quantized_before_count():
    plain, model = make_llama(), make_llama()
    run(plain, QuantizeCache(), calibration=make_windows())
    reports = run(model, QuantizeInt4(), QuantizeCache(), calibration=make_windows())
    assert [one.type for one in reports] == ["quantize_int4", "quantize_cache"]
    pairs = zip(scales_of(plain).pairs(), scales_of(model).pairs(), strict=True)
    assert not any(torch.equal(a, b) for first, second in pairs for a, b in zip(first, second, strict=True))


def test_text_is_needed():
    with pytest.raises(RecipeError, match="needs calibration"):
        run(make_llama(), QuantizeCache())
