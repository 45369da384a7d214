"""The models: masks by perturbation, cache, generation, files, losses, tracing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from gemini.errors import UsageError
from gemini.model.gemini import (
    GeminiForConditionalGeneration,
    GeminiForImageClassification,
    GeminiForSequenceClassification,
    GeminiModel,
    shift_right,
)

TOLERANCE = 1e-5  # float32 sums in another order
Batch = dict[str, torch.Tensor]


@pytest.fixture
def decoder_ids() -> torch.Tensor:
    return torch.tensor([[1, 12, 34, 56, 78, 90], [1, 21, 43, 65, 87, 9]])


@pytest.fixture(params=["eager", "sdpa"])
def model(tiny: Any, fusion: str, request: pytest.FixtureRequest) -> GeminiForConditionalGeneration:
    return GeminiForConditionalGeneration(tiny(fusion=fusion, attn_implementation=request.param)).eval()


def test_a_later_token_changes_nothing_before_it(model: Any, batch: Batch, decoder_ids: torch.Tensor) -> None:
    before = model(**batch, decoder_input_ids=decoder_ids).logits
    for position in range(1, 6):
        changed = decoder_ids.clone()
        changed[:, position:] = 77
        after = model(**batch, decoder_input_ids=changed).logits
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


def test_padding_changes_nothing(model: Any, batch: Batch, decoder_ids: torch.Tensor) -> None:
    """Neither what stands in the padding nor how much of it there is."""
    before = model(**batch, decoder_input_ids=decoder_ids).logits
    noise = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 55)
    assert torch.equal(model(**{**batch, "input_ids": noise}, decoder_input_ids=decoder_ids).logits, before)
    alone = {"input_ids": batch["input_ids"][1:, :4], "pixel_values": batch["pixel_values"][1:]}
    after = model(**alone, decoder_input_ids=decoder_ids[1:]).logits
    torch.testing.assert_close(after, before[1:], atol=TOLERANCE, rtol=0)


def test_every_input_matters(model: Any, batch: Batch, decoder_ids: torch.Tensor) -> None:
    before = model(**batch, decoder_input_ids=decoder_ids).logits
    for changed in (
        {**batch, "input_ids": batch["input_ids"].clone().fill_(50)},
        {**batch, "pixel_values": -batch["pixel_values"]},
        {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])},
    ):
        assert not torch.allclose(model(**changed, decoder_input_ids=decoder_ids).logits, before)


def test_steps_with_a_cache_equal_the_whole(model: Any, batch: Batch, decoder_ids: torch.Tensor) -> None:
    whole = model(**batch, decoder_input_ids=decoder_ids, use_cache=False).logits
    encoder_outputs = model.get_encoder()(**batch)
    cache, steps = None, []
    for part in decoder_ids.split([2, 1, 3], dim=1):
        output = model(
            encoder_outputs=encoder_outputs,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=part,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=TOLERANCE, rtol=0)
    assert cache.cross_attention_cache.layers[0].keys.shape == (2, 4, 11, 8)


def test_greedy_generation_equals_its_definition(model: Any, batch: Batch) -> None:
    written = model.generate(**batch, max_new_tokens=8, min_new_tokens=8)
    expected = torch.ones(2, 1, dtype=torch.int64)
    for _ in range(8):
        logits = model(**batch, decoder_input_ids=expected).logits[:, -1]
        logits[:, 2] = -torch.inf  # min_new_tokens forbids the end
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, expected)
    features = model.get_image_features(batch.pop("pixel_values"))
    again = model.generate(**batch, image_features=features, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(again, written)


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 5, "temperature": 0.7}, {"num_beams": 3}])
def test_other_ways_to_generate_run(model: Any, batch: Batch, options: dict[str, Any]) -> None:
    written = model.generate(**batch, max_new_tokens=5, **options)
    assert written.shape[0] == 2
    assert (written[:, 0] == 1).all()


def test_loss_is_the_mean_over_labels_that_count(model: Any, batch: Batch) -> None:
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    output = model(**batch, labels=labels)
    decoder_ids = torch.tensor([[1, 5, 6, 7], [1, 8, 2, 0]])
    assert torch.equal(shift_right(labels, pad=0, start=1), decoder_ids)
    logs = model(**batch, decoder_input_ids=decoder_ids).logits.log_softmax(-1)
    counted = [logs[b, t, labels[b, t]] for b in range(2) for t in range(4) if labels[b, t] != -100]
    torch.testing.assert_close(output.loss, -torch.stack(counted).mean(), atol=TOLERANCE, rtol=0)


def test_no_decoder_input_is_an_error(model: Any, batch: Batch) -> None:
    with pytest.raises(UsageError, match="decoder has no input"):
        model(**batch)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_save_and_load(tiny: Any, fusion: str, positions: str, batch: Batch, tmp_path: Path) -> None:
    model = GeminiForConditionalGeneration(tiny(fusion=fusion, positions=positions)).train()
    labels = torch.tensor([[5, 6, 2], [8, 9, 2]])
    model(**batch, labels=labels)  # moves the statistics of the batch norms, which must be kept as well
    model.eval().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is GeminiForConditionalGeneration
    assert loaded.config.fusion == fusion
    assert torch.equal(loaded(**batch, labels=labels).logits, model(**batch, labels=labels).logits)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is GeminiModel
    assert torch.equal(bare.encoder(**batch)[0], model.get_encoder()(**batch)[0])


def test_one_table_of_tokens(tiny: Any) -> None:
    model = GeminiForConditionalGeneration(tiny())
    tables = {model.model.shared.weight, model.lm_head.weight}
    tables |= {model.model.encoder.text.tokens.weight, model.model.decoder.text.tokens.weight}
    assert len(tables) == 1
    model.resize_token_embeddings(101)
    assert model.lm_head.weight is model.model.encoder.text.tokens.weight
    assert model.lm_head.weight.shape == (101, 32)


def test_checkpointed_gradients_are_the_same(tiny: Any, fusion: str, batch: Batch) -> None:
    model = GeminiForConditionalGeneration(tiny(fusion=fusion, dropout=0.0)).train()
    labels = torch.tensor([[5, 6, 2], [8, 9, 2]])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], atol=TOLERANCE, rtol=0)


def test_inner_states_and_maps_are_returned(tiny: Any, batch: Batch) -> None:
    model = GeminiForConditionalGeneration(tiny(attn_implementation="eager")).eval()
    ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
    output = model(**batch, decoder_input_ids=ids, output_attentions=True, output_hidden_states=True)
    assert [len(output.encoder_attentions), len(output.cross_attentions)] == [4, 3]
    assert output.encoder_attentions[0].shape == (2, 4, 11, 11)
    assert output.cross_attentions[0].shape == (2, 4, 3, 11)
    assert [len(output.encoder_hidden_states), len(output.decoder_hidden_states)] == [5, 4]
    assert (output.cross_attentions[0][1, :, :, 8:] == 0).all()  # padding gets no weight


def test_classifier_takes_over_the_encoder(tiny: Any, batch: Batch, tmp_path: Path) -> None:
    writer = GeminiForConditionalGeneration(tiny()).eval()
    writer.save_pretrained(tmp_path / "writer")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "writer", num_labels=3)
    assert type(classifier) is GeminiForSequenceClassification
    encoded = writer.get_encoder()(**batch).last_hidden_state
    means = torch.stack([encoded[0].mean(0), encoded[1, :8].mean(0)])
    logits = classifier.eval()(**batch).logits
    torch.testing.assert_close(logits, classifier.classifier(means), atol=TOLERANCE, rtol=0)
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = GeminiForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(loaded(**batch).logits, logits)


def test_classifier_losses(tiny: Any, batch: Batch) -> None:
    model = GeminiForSequenceClassification(tiny(num_labels=3)).eval()
    logits = model(**batch).logits
    classes = torch.tensor([2, 0])
    expected = nn.functional.cross_entropy(logits, classes)
    assert torch.equal(model(**batch, labels=classes).loss, expected)
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    expected = nn.functional.binary_cross_entropy_with_logits(logits, several)
    assert torch.equal(model(**batch, labels=several).loss, expected)
    regressor = GeminiForSequenceClassification(tiny(num_labels=1)).eval()
    targets = torch.tensor([0.5, -1])
    expected = nn.functional.mse_loss(regressor(**batch).logits[:, 0], targets)
    assert torch.equal(regressor(**batch, labels=targets).loss, expected)


def test_image_classifier_is_a_linear_head_over_the_mean_of_the_tower(tiny: Any, tmp_path: Path) -> None:
    model = GeminiForImageClassification(tiny(num_labels=3)).eval()
    side = model.config.image_stride
    for size in (2 * side, 4 * side):
        pixels = torch.rand(2, 3, size, size)
        grid = model.image.stages(model.image.stem(pixels))
        expected = model.classifier(model.image.projection(grid.mean((2, 3))))
        torch.testing.assert_close(model(pixels).logits, expected, atol=TOLERANCE, rtol=0)
    labels = torch.tensor([2, 0])
    expected = nn.functional.cross_entropy(model(pixels).logits, labels)
    assert torch.equal(model(pixels, labels=labels).loss, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is GeminiForImageClassification
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)


class EncoderPart(nn.Module):
    """What the exporter makes one graph of."""

    def __init__(self, model: GeminiForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids=ids, attention_mask=mask, image_features=image).last_hidden_state


def test_traces_with_any_batch_length_and_image(tiny: Any, fusion: str, batch: Batch) -> None:
    """No Python that depends on data: one trace serves one row, one token and no image."""
    part = EncoderPart(GeminiForConditionalGeneration(tiny(fusion=fusion)).eval())
    rows, length, vectors = Dim("rows"), Dim("length"), Dim("vectors")
    example = (batch["input_ids"], batch["attention_mask"], torch.randn(2, 4, 32))
    shapes = ({0: rows, 1: length}, {0: rows, 1: length}, {0: rows, 1: vectors})
    with torch.no_grad():
        traced = export(part, example, dynamic_shapes=shapes, strict=False).module()
        for size in ((1, 1, 0), (3, 9, 0), (1, 5, 4), (2, 3, 7)):
            ids = torch.randint(3, 97, size[:2])
            mask = torch.ones_like(ids)
            mask[0, 3:] = 0
            image = torch.randn(size[0], size[2], 32)
            expected = part(ids, mask, image)
            torch.testing.assert_close(traced(ids, mask, image), expected, atol=TOLERANCE, rtol=0)
