"""Small models of `transformers` with random weights: the architectures that people train, in two layers each."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB = 120
WIDTH = 48
ROWS = 2
TOKENS = 12

Batch = dict[str, Any]

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // 4,
    "max_position_embeddings": 64,
    "use_cache": False,
}


@dataclass(frozen=True)
class HFCase:
    """One architecture.

    Args:
        model: makes it, in training mode.
        batch: (generator) -> keyword arguments of one step.
        loss: `loss(model, **batch)`; None where the model returns `.loss`.
        refused: parts of the CaptureError, for a model that cannot be captured as it is.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[..., torch.Tensor] | None = None
    refused: tuple[str, ...] = ()

    def train(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of one step, as the plain loop computes it."""
        return model(**batch).loss if self.loss is None else self.loss(model, **batch)


def _build(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A builder of the class `name` of `transformers`; the import is left to the call."""

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        return getattr(transformers, name)(getattr(transformers, config)(**settings)).train()

    return build


def _decoder(family: str, **settings: Any) -> Callable[[], nn.Module]:
    return _build(f"{family}ForCausalLM", f"{family}Config", **{**_DECODER, **settings})


def _frozen_llama() -> nn.Module:
    """Fine-tuning the last layer and the norms: embeddings and the first layer stay as they are."""
    model = _decoder("Llama")()
    for name, parameter in model.named_parameters():
        frozen = "embed_tokens" in name or ("layers.0." in name and "norm" not in name)
        parameter.requires_grad_(not frozen)
    return model


def _lora_llama() -> nn.Module:
    """PEFT's adapters on two projections of each layer; everything else is frozen."""
    peft = importlib.import_module("peft")
    adapters = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(_decoder("Llama")(), adapters).train()


def _tokens(generator: torch.Generator, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(4, VOCAB, (ROWS, length), generator=generator)


def _mask(generator: torch.Generator) -> torch.Tensor:
    """A row may be whole: the mask of the first batch of one rank says nothing about those that follow."""
    lengths = torch.randint(TOKENS - 3, TOKENS + 1, (ROWS, 1), generator=generator)
    return (torch.arange(TOKENS) < lengths).long()


def _causal(generator: torch.Generator) -> Batch:
    """Next-token training, no padding."""
    ids = _tokens(generator)
    return {"input_ids": ids, "labels": ids}


def _padded(generator: torch.Generator) -> Batch:
    """Next-token training on rows of unlike lengths."""
    ids, mask = _tokens(generator), _mask(generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _masked(generator: torch.Generator) -> Batch:
    """Masked-token training on rows of unlike lengths."""
    ids, mask = _tokens(generator), _mask(generator)
    hidden = torch.rand(ids.shape, generator=generator) < 0.3
    hidden[:, 0] = True
    return {
        "input_ids": ids.masked_fill(hidden, 3),
        "attention_mask": mask,
        "labels": ids.masked_fill(~hidden | (mask == 0), -100),
    }


def _translation(generator: torch.Generator) -> Batch:
    return {"input_ids": _tokens(generator), "labels": _tokens(generator, 7)}


def _images(generator: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(ROWS, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, 5, (ROWS,), generator=generator),
    }


def _speech(generator: torch.Generator) -> Batch:
    return {"input_features": torch.randn(ROWS, 16, 40, generator=generator), "labels": _tokens(generator, 8)}


def _loss_of_logits(model: nn.Module, **batch: Any) -> torch.Tensor:
    """A loss that the user writes: label smoothing, for a model that is given no labels."""
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch).logits, labels, label_smoothing=0.1)


def _checkpointed(build: Callable[[], nn.Module], *, reentrant: bool) -> Callable[[], nn.Module]:
    """The same model with its layers computed again in backward."""

    def checkpointed() -> nn.Module:
        model = build()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return model

    return checkpointed


def _waves(generator: torch.Generator) -> Batch:
    return {
        "input_values": torch.randn(ROWS, 400, generator=generator),
        "labels": torch.randint(0, 5, (ROWS,), generator=generator),
    }


_GPT2 = _build(
    "GPT2LMHeadModel",
    "GPT2Config",
    vocab_size=VOCAB,
    n_embd=WIDTH,
    n_layer=2,
    n_head=4,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
)
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 64,
}
_VIT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
_WHISPER = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "use_cache": False,
}
_WAV2VEC2 = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "num_feat_extract_layers": 2,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "num_labels": 5,
    "layerdrop": 0.0,
    "mask_time_prob": 0.5,
    "mask_time_length": 4,
    "mask_time_min_masks": 1,
}
_MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_cache": False}

CASES: dict[str, HFCase] = {
    "llama": HFCase(_decoder("Llama"), _causal),
    "llama_padded": HFCase(_decoder("Llama", tie_word_embeddings=True), _padded),
    "llama_partly_frozen": HFCase(_frozen_llama, _causal),
    "llama_lora": HFCase(_lora_llama, _causal),
    "gpt2": HFCase(_GPT2, _causal),
    "gpt2_checkpointed": HFCase(_checkpointed(_GPT2, reentrant=False), _causal),
    "qwen2": HFCase(_decoder("Qwen2"), _causal),
    "qwen3": HFCase(_decoder("Qwen3"), _causal),
    "gemma2": HFCase(_decoder("Gemma2", sliding_window=8), _causal),
    "opt": HFCase(
        _build(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            use_cache=False,
        ),
        _causal,
    ),
    "bert": HFCase(_build("BertForMaskedLM", "BertConfig", **_BERT), _masked),
    "t5": HFCase(
        _build(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=12,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            use_cache=False,
        ),
        _translation,
    ),
    "vit": HFCase(_build("ViTForImageClassification", "ViTConfig", **_VIT), _images, _loss_of_logits),
    "whisper": HFCase(_build("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER), _speech),
    "mixtral": HFCase(_decoder("Mixtral", **_EXPERTS), _causal),
    "mixtral_eager_experts": HFCase(
        _decoder("Mixtral", experts_implementation="eager", **_EXPERTS),
        _causal,
        refused=("module 'model.layers.0.mlp.experts'", "for expert_idx in expert_hit", "data-dependent"),
    ),
    "mamba": HFCase(_build("MambaForCausalLM", "MambaConfig", **_MAMBA), _causal),
    "mamba2": HFCase(
        _build(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            **{**_MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
        ),
        _causal,
    ),
    "gpt2_reentrant_checkpoint": HFCase(
        _checkpointed(_GPT2, reentrant=True), _causal, refused=("backward", "set use_reentrant=False")
    ),
    "bart_layerdrop": HFCase(
        _build("BartForConditionalGeneration", "BartConfig", **_BART, encoder_layerdrop=0.1),
        _translation,
        refused=("module 'model.encoder'", "if dropout_probability < self.layerdrop", "data-dependent"),
    ),
    "wav2vec2_spec_augment": HFCase(
        _build("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **_WAV2VEC2),
        _waves,
        refused=("module 'wav2vec2'", "a draw from `random` or `numpy.random`"),
    ),
}
