"""What each fusion lets see what, and what it costs."""

from typing import Any

import pytest
import torch

from gemini.model.gemini import GeminiConfig, GeminiForConditionalGeneration, GeminiModel
from gemini.model.gemini.fusion import joint_mask


def test_nano_has_its_size_with_each_fusion(fusion: str) -> None:
    model = GeminiForConditionalGeneration(GeminiConfig.sized("nano", fusion=fusion))
    assert 7e6 < model.num_parameters() < 9e6


@pytest.mark.parametrize(("size", "millions"), [("base", 110), ("large", 400)])
def test_larger_sizes(fusion: str, size: str, millions: int) -> None:
    with torch.device("meta"):
        model = GeminiForConditionalGeneration(GeminiConfig.sized(size, fusion=fusion))
    assert abs(model.num_parameters() / 1e6 - millions) < 0.03 * millions


def test_layers_are_shared_out(tiny: Any, fusion: str) -> None:
    split = tiny(fusion=fusion, encoder_layers=6, joint_layers=1).layer_split
    assert split == {"early": (0, 0, 6), "late": (3, 3, 0), "hybrid": (2, 3, 1)}[fusion]
    split = tiny(fusion=fusion, encoder_layers=6, joint_layers=1, image_prototypes=9).layer_split
    assert split == {"early": (0, 0, 6), "late": (0, 6, 0), "hybrid": (0, 5, 1)}[fusion]


def test_beside_prototypes_text_alone_is_read_alike(
    tiny: Any, fusion: str, batch: dict[str, torch.Tensor]
) -> None:
    """With the same weights in the same order every fusion gives the vectors of early fusion."""
    sizes = {"encoder_layers": 3, "joint_layers": 1, "image_prototypes": 9}
    early, other = GeminiModel(tiny(fusion="early", **sizes)), GeminiModel(tiny(fusion=fusion, **sizes))
    theirs = other.encoder.fusion
    layers = [*getattr(theirs, "text", []), *getattr(theirs, "joint", [])]
    for layer, original in zip(layers, early.encoder.fusion.joint, strict=True):
        layer.load_state_dict(original.state_dict())
    norm = theirs.text_norm if fusion == "late" else theirs.norm
    norm.load_state_dict(early.encoder.fusion.norm.state_dict())
    other.encoder.text.load_state_dict(early.encoder.text.state_dict())
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    vectors = [model.eval().encoder(**text).last_hidden_state for model in (early, other)]
    assert torch.equal(*vectors)


def test_image_comes_first_then_text(tiny: Any, fusion: str, batch: dict[str, torch.Tensor]) -> None:
    model = GeminiModel(tiny(fusion=fusion)).eval()
    image = model.get_image_features(batch["pixel_values"])
    assert image.shape == (2, 4, 32)
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    split = model.get_encoder()(**text, image_features=image).last_hidden_state
    assert split.shape == (2, 4 + 7, 32)
    assert torch.equal(split, model.encoder(**batch).last_hidden_state)
    if fusion == "late":
        assert torch.equal(split[:, :4], image)


def test_no_image_is_an_image_of_no_vectors(tiny: Any, fusion: str, batch: dict[str, torch.Tensor]) -> None:
    model = GeminiModel(tiny(fusion=fusion)).eval()
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    without = model.encoder(**text).last_hidden_state
    assert without.shape == (2, 7, 32)
    assert torch.equal(without, model.encoder(**text, image_features=torch.zeros(2, 0, 32)).last_hidden_state)


def test_modalities_meet_where_they_should(tiny: Any, fusion: str, batch: dict[str, torch.Tensor]) -> None:
    """Another image changes the text's vectors, except in late fusion; and the other way round."""
    model = GeminiModel(tiny(fusion=fusion)).eval()
    before = model.encoder(**batch).last_hidden_state
    other_image = {**batch, "pixel_values": -batch["pixel_values"]}
    other_text = {**batch, "input_ids": (batch["input_ids"] * batch["attention_mask"] + 1) % 97}
    text_follows_image = not torch.equal(model.encoder(**other_image).last_hidden_state[:, 4:], before[:, 4:])
    image_follows_text = not torch.equal(model.encoder(**other_text).last_hidden_state[:, :4], before[:, :4])
    assert text_follows_image == image_follows_text == (fusion != "late")


def test_joint_mask_counts_the_image() -> None:
    vectors = torch.zeros(2, 5, 3)
    mask = torch.tensor([[1, 1], [1, 0]])
    assert joint_mask(mask, vectors).tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    whole = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    assert torch.equal(joint_mask(whole, vectors), whole)
    assert joint_mask(None, vectors) is None
