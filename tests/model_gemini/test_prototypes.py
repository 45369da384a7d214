"""The memory that a picture is looked up in, against loops over its parts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gemini.errors import UsageError
from gemini.model.gemini import GeminiConfig, GeminiForImageClassification, GeminiModel
from gemini.model.gemini.embedders import ImageEmbedder
from gemini.model.gemini.prototypes import Prototypes

TOLERANCE = 1e-5


def test_what_is_recalled_is_the_softmax_of_resemblance_over_the_vectors(tiny: Any) -> None:
    memory = Prototypes(tiny(image_prototypes=5, prototype_sharpness=2.0))
    quarters = torch.randn(3, 4 * 32)
    recalled = memory(quarters)
    assert recalled.shape == (3, 1, 32)
    for row in range(3):
        query = memory.query.weight @ quarters[row] + memory.query.bias
        query = (query - query.mean()) / (query.var(correction=0) + 1e-5).sqrt()
        query = query * memory.norm.weight + memory.norm.bias
        logits = [2.0 * (query @ key + bias) for key, bias in zip(memory.keys.weight, memory.keys.bias)]  # noqa: B905
        shares = torch.stack(logits).exp() / torch.stack(logits).exp().sum()
        expected = sum(share * memory.values.weight[:, thing] for thing, share in enumerate(shares))
        torch.testing.assert_close(recalled[row, 0], expected, atol=TOLERANCE, rtol=0)


def test_quarters_are_the_means_of_the_cells_of_each(tiny: Any) -> None:
    image = ImageEmbedder(tiny(image_size=32)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    cells = image.features(pixels).view(2, 4, 4, 32)
    halves = (slice(0, 2), slice(2, 4))
    expected = torch.cat([cells[:, rows, columns].mean((1, 2)) for rows in halves for columns in halves], 1)
    torch.testing.assert_close(image.quarters(pixels), expected, atol=TOLERANCE, rtol=0)


def test_an_encoder_with_prototypes_sees_one_vector_a_picture(
    tiny: Any, fusion: str, batch: dict[str, torch.Tensor]
) -> None:
    model = GeminiModel(tiny(fusion=fusion, image_prototypes=6)).eval()
    assert model.get_image_features(batch["pixel_values"]).shape == (2, 1, 32)
    assert model.encoder(**batch).last_hidden_state.shape == (2, 1 + 7, 32)
    assert not any("positions.rows" in name for name, _ in model.named_parameters())


def test_classes_of_an_image_classifier_are_its_prototypes(tiny: Any, tmp_path: Path) -> None:
    model = GeminiForImageClassification(tiny(num_labels=3, image_prototypes=3)).eval()
    pixels = torch.rand(2, 3, 16, 16)
    logits = model(pixels).logits
    expected = model.image.prototypes.resemblance(model.image.quarters(pixels))
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(GeminiForImageClassification.from_pretrained(tmp_path)(pixels).logits, logits)


def test_prototypes_that_are_no_labels_are_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match="5 prototypes cannot tell 3 labels apart"):
        GeminiForImageClassification(tiny(num_labels=3, image_prototypes=5))


def test_a_grid_without_quarters_is_refused() -> None:
    with pytest.raises(UsageError, match="3 x 3 vectors has no quarters"):
        GeminiConfig(image_size=48, image_prototypes=4)
