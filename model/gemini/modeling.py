"""The Gemini models: the bare encoder-decoder, and one class a use.

model = GeminiForConditionalGeneration(GeminiConfig())
model.generate(**tokenizer(caption_prompt("en"), return_tensors="pt"), pixel_values=pixels)
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    ImageClassifierOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from gemini.errors import UsageError
from gemini.model.gemini.configuration import GeminiConfig
from gemini.model.gemini.decoder import GeminiDecoder
from gemini.model.gemini.embedders import ImageEmbedder
from gemini.model.gemini.encoder import GeminiEncoder
from gemini.model.gemini.fusion import joint_mask
from gemini.model.gemini.pretrained import GeminiPreTrainedModel

IGNORED = -100  # the label of a position that no loss counts, as in torch and transformers


def shift_right(labels: torch.Tensor, pad: int, start: int) -> torch.Tensor:
    """What the decoder reads while it predicts ``labels`` (B, T): the start token, then all but the last."""
    first = labels.new_full((labels.shape[0], 1), start)
    return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad)], dim=1)


class GeminiModel(GeminiPreTrainedModel):
    """Encoder and decoder over one table of token vectors, without a head."""

    _tied_weights_keys = {  # noqa: RUF012
        "encoder.text.tokens.weight": "shared.weight",
        "decoder.text.tokens.weight": "shared.weight",
    }

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.encoder = GeminiEncoder(config)
        self.decoder = GeminiDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.shared = self.encoder.text.tokens = self.decoder.text.tokens = value

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Everything that depends on the image alone: pixels (B, 3, H, W) -> (B, N, D)."""
        return self.encoder.get_image_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """last_hidden_state (B, T', D) of the decoder.

        Args:
            input_ids: the encoder's tokens, int64 (B, T).
            attention_mask: (B, T), 0 for padding; or (B, N + T) with encoder_outputs.
            decoder_input_ids: the decoder's tokens, int64 (B, T').
            pixel_values: (B, 3, H, W), or image_features (B, N, D) in their place, or neither.
            encoder_outputs: the encoder's output where it is known already; the inputs above are not read.
        """
        if decoder_input_ids is None:
            raise UsageError(
                "The decoder has no input.", "Pass decoder_input_ids, or labels to a model with a head."
            )
        encoded: Any = encoder_outputs
        if encoder_outputs is None:
            encoded = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                image_features=image_features,
                pixel_values=pixel_values,
                **kwargs,
            )
        elif isinstance(encoder_outputs, (tuple, list)):
            encoded = BaseModelOutput(*encoder_outputs)
        memory = encoded.last_hidden_state
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=memory,
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=joint_mask(attention_mask, memory),
            past_key_values=past_key_values,
            position_ids=decoder_position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )


class GeminiForConditionalGeneration(GeminiPreTrainedModel, GenerationMixin):
    """The model that writes: captions, continuations, repaired text, label words."""

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}  # noqa: RUF012

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__(config)
        self.model = GeminiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Everything that depends on the image alone: pixels (B, 3, H, W) -> (B, N, D)."""
        return self.model.get_image_features(pixel_values)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads while it predicts ``labels`` (B, T)."""
        return shift_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """logits (B, T', vocabulary), and with ``labels`` (B, T'; -100 does not count) the cross-entropy.

        The other arguments are those of `GeminiModel.forward`; labels give decoder_input_ids where there are
        none.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            pixel_values=pixel_values,
            image_features=image_features,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{key: value for key, value in outputs.items() if key != "last_hidden_state"},
        )


class GeminiForSequenceClassification(GeminiPreTrainedModel):
    """The encoder with a linear head over the mean of its vectors; the decoder is not needed."""

    _tied_weights_keys = {"encoder.text.tokens.weight": "shared.weight"}  # noqa: RUF012
    # Fine-tuning starts from a model that writes; its other half stays behind.
    _keys_to_ignore_on_load_unexpected = (r"decoder\.", r"lm_head\.")

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.encoder = GeminiEncoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.shared = self.encoder.text.tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """logits (B, labels); the loss with ``labels`` as ``config.problem_type`` says.

        Without a problem type, one label means regression, integer labels (B,) one class each, and float
        labels (B, labels) any number of classes each.
        """
        encoded = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_features=image_features,
            pixel_values=pixel_values,
            **kwargs,
        )
        logits = self.classifier(self.dropout(masked_mean(encoded.last_hidden_state, attention_mask)))
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


class GeminiForImageClassification(GeminiPreTrainedModel):
    """The convolutional tower under a linear head over its mean vector, or a prototype for each label.

    Captioning starts from it: a tower learns what tells drawings apart many times faster from one class a
    name than from names spelt token by token.
    """

    main_input_name = "pixel_values"

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__(config)
        if config.image_prototypes not in (0, config.num_labels):
            raise UsageError(
                f"{config.image_prototypes} prototypes cannot tell {config.num_labels} labels apart.",
                "Make image_prototypes the number of labels, or 0.",
            )
        self.image = ImageEmbedder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = (
            None if config.image_prototypes else nn.Linear(config.hidden_size, config.num_labels)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """Pixels (B, 3, H, W) -> logits (B, labels); the loss as `GeminiForSequenceClassification` says.

        H and W are multiples of ``config.image_stride``, not necessarily ``config.image_size``.
        """
        if self.classifier is None:
            logits = self.image.prototypes.resemblance(self.dropout(self.image.quarters(pixel_values)))
        else:
            logits = self.classifier(self.dropout(self.image.features(pixel_values).mean(dim=1)))
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


def masked_mean(vectors: torch.Tensor, text_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over image and text of (B, N + T, D) without padding: (B, D)."""
    mask = joint_mask(text_mask, vectors)
    if mask is None:
        return vectors.mean(dim=1)
    weights = mask[..., None].to(vectors.dtype)
    return (vectors * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: GeminiConfig) -> torch.Tensor:
    """Squared error, cross-entropy or binary cross-entropy, as transformers chooses."""
    problem = config.problem_type
    if problem is None:
        one_class = (
            "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        )
        problem = "regression" if config.num_labels == 1 else one_class
    if problem == "regression":
        return nn.functional.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if problem == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels.flatten())
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
