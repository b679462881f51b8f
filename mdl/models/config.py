"""What a receiver knows of a transformer before it has any weight: sizes and choices."""

from __future__ import annotations

from dataclasses import dataclass

from mdl.errors import ModelError

NORMS = ("layer", "rms", "none")
POSITIONS = ("learned", "rotary", "none")


@dataclass(frozen=True)
class TransformerConfig:
    """The architecture, which the receiver of a message knows (accounting standard, "Region").

    **Arguments:** sizes as in TransformerLens; `norm` is "layer", "rms" or "none" (`final_norm`: the same for the norm
    before the unembedding, by default like the others); `positions` is "learned", "rotary" or "none";
    `rotary_frequencies` has one angular frequency (radians per position) for each rotated pair, so that any frequency
    scaling is resolved when a checkpoint is read; `rotary_adjacent` pairs neighbouring channels (GPT-J) in place of
    halves; `windows` holds, per layer, the number of latest positions that attention may look at, or None for all;
    `logit_softcap` and `attention_softcap` are Gemma-2's `cap * tanh(x / cap)`; `scale_by_inverse_layer` divides the
    attention scores of layer L by L + 1; `d_vocab_out` is the number of logits, where it is not `d_vocab`.

    **Raises:** `ModelError` for a norm or position embedding that does not exist, for heads that key-value heads do not
    divide, and for `windows` that are not one a layer.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_vocab: int
    n_ctx: int
    d_mlp: int = 0
    n_key_value_heads: int | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    positions: str = "learned"
    rotary_frequencies: tuple[float, ...] = ()
    activation: str = "gelu_new"
    gated_mlp: bool = False
    parallel: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] | None = None
    post_norms: bool = False
    embedding_scale: float = 1.0
    tied: bool = False
    final_norm: str | None = None
    rotary_adjacent: bool = False
    causal: bool = True
    scale_by_inverse_layer: bool = False
    d_vocab_out: int | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS or self.norm_before_unembedding not in NORMS:
            raise ModelError(f"norm {self.norm!r}, final norm {self.final_norm!r}: each must be one of {NORMS}.")
        if self.positions not in POSITIONS:
            raise ModelError(f"position embedding {self.positions!r} is not one of {POSITIONS}.")
        if self.n_heads % self.key_value_heads:
            raise ModelError(f"{self.key_value_heads} key-value heads do not divide {self.n_heads} heads.")
        if self.windows is not None and len(self.windows) != self.n_layers:
            raise ModelError(f"{len(self.windows)} attention windows for {self.n_layers} layers; give one a layer.")

    @property
    def key_value_heads(self) -> int:
        return self.n_key_value_heads or self.n_heads

    @property
    def norm_before_unembedding(self) -> str:
        return self.norm if self.final_norm is None else self.final_norm

    @property
    def sequential(self) -> bool:
        """Whether a layer has a residual stream between attention and MLP."""
        return self.d_mlp > 0 and not self.parallel

    @property
    def n_logits(self) -> int:
        return self.d_vocab if self.d_vocab_out is None else self.d_vocab_out

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by; 1/sqrt(d_head) unless the checkpoint says otherwise."""
        return self.d_head**-0.5 if self.attention_scale is None else self.attention_scale
