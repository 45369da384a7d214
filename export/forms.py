"""Forms: the ways in which a model's attention, rotary embedding and norms can be written as operators.

Each family has a ladder of forms, fastest first. The exporter takes the first form whose graph traces and
whose numbers match torch; no form and no rung knows the name of an architecture.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """One way of writing a model.

    attention: ``"grouped"`` (GroupQueryAttention over a shared cache), ``"multi-head"`` (Attention,
        no cache) or ``"model"`` (the model's own eager attention; a decoder then concatenates its cache).
    rotary: ``"fused"`` (inside the attention operator) or ``"traced"`` (the model's own code).
    norms: whether norm modules become norm operators.
    """

    attention: str
    rotary: str = "traced"
    norms: bool = True

    @property
    def shared_cache(self) -> bool:
        """Whether past and present may be one preallocated buffer."""
        return self.attention == "grouped"

    def __str__(self) -> str:
        return (
            f"{self.attention} attention, {self.rotary} rotary, {'fused' if self.norms else 'traced'} norms"
        )


DECODER_FORMS = (
    Form("grouped", rotary="fused"),
    Form("grouped"),
    Form("model"),
    Form("model", norms=False),
)
# The decoder of a pair has its positions from the cache, so a rotary inside the operator is not tried.
ENCODER_DECODER_FORMS = (Form("grouped"), Form("model"), Form("model", norms=False))
ENCODER_FORMS = (Form("multi-head"), Form("model"), Form("model", norms=False))

LADDERS = {
    "decoder": DECODER_FORMS,
    "encoder": ENCODER_FORMS,
    "vision": ENCODER_FORMS,
    "encoder-decoder": ENCODER_DECODER_FORMS,
}
