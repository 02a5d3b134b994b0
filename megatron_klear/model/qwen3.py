"""Qwen3 as a Megatron-Core GPTModel whose output layer is the fused head.

The head is asked for what the caller needs (logprobs, or the loss with its gradients) and never builds
the full logits. See `klear_kernels` for the computation and `HeadRequest` for the questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, _grad_accum_fusion_available
from megatron.core.transformer.transformer_config import TransformerConfig

from klear_kernels import linear_logprob, linear_policy_loss
from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import Architecture, Fp8Settings, ModelSettings, ParallelSettings, padded_vocab_size
from megatron_klear.config.yarn import Yarn
from megatron_klear.errors import ConfigError
from megatron_klear.model.layer_ranges import StageRanges
from megatron_klear.model.layer_spec import attention_backend, block_spec, pick_layer_spec
from megatron_klear.model.packed_layout import PackedLayout, packed_layout
from megatron_klear.model.precision import fp8_problems, megatron_fp8_fields
from megatron_klear.parallel import cuda_means_cpu
from megatron_klear.records import PackedBatch, ParallelContext


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadRequest:
    """What the last pipeline stage shall compute from its hidden states.

    Attributes:
        batch: the microbatch; labels, weights and old logprobs are read from it.
        objective: the policy loss, or None for logprobs only (no gradient).
        temperature: the sampling temperature that logprobs are defined under.
    """

    batch: PackedBatch
    objective: PolicyObjective | None
    temperature: float = 1.0


class HeadResult(NamedTuple):
    """Answer of the head for one microbatch on one rank; `loss` and its parts are sums, 0 without an objective.

    Attributes:
        loss: float32 scalar; carries the gradient.
        policy_loss, lm_loss: float32 scalars, detached.
        logprobs, entropy: float32 [T], detached, 0 where the label is ignored.
    """

    loss: torch.Tensor
    policy_loss: torch.Tensor
    lm_loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor


class FusedHead(ColumnParallelLinear):
    """Megatron's vocabulary-parallel output layer, answering a `HeadRequest` in place of giving logits.

    It stays a ColumnParallelLinear so that its weight is sharded, checkpointed, gathered by the distributed
    optimizer and tied exactly as Megatron does; only `forward` differs.
    """

    vocab_size: int

    @classmethod
    def adopt(cls, layer: ColumnParallelLinear, vocab_size: int) -> FusedHead:
        """Turn the output layer that GPTModel built into a fused head, weight and attributes untouched.

        Args:
            layer: the output layer.
            vocab_size: true vocabulary, without padding rows.
        """
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.vocab_size = vocab_size
        return layer

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor | None, request: HeadRequest) -> HeadResult:
        """Answer a request.

        Args:
            hidden: [T or T / tp, 1, H], this rank's slice of tokens under sequence parallelism.
            weight: [V / tp, H] when tied to the embedding, else None for the layer's own.
            request: what to compute.
        """
        batch = request.batch
        hidden = hidden.squeeze(1)
        weight = self.weight if weight is None else weight
        shared: dict[str, Any] = {
            "tp_group": self.tp_group,
            "vocab_size": self.vocab_size,
            "temperature": request.temperature,
            "sequence_parallel": self.config.sequence_parallel,
        }
        if request.objective is None:
            answer = linear_logprob(hidden, weight, batch.labels, with_entropy=True, **shared)
            zero = torch.zeros((), dtype=torch.float32, device=hidden.device)
            assert answer.entropy is not None
            return HeadResult(zero, zero, zero, answer.logprobs.detach(), answer.entropy.detach())
        terms = linear_policy_loss(
            hidden,
            weight,
            batch.labels,
            batch.old_logprobs,
            batch.advantages,
            batch.policy_weight,
            batch.lm_weight,
            objective=request.objective,
            into_main_grad=_takes_gradients(weight),
            **shared,
        )
        assert terms.entropy is not None
        return HeadResult(terms.loss, terms.policy_loss, terms.lm_loss, terms.logprobs, terms.entropy)


def _takes_gradients(weight: torch.Tensor) -> bool:
    """Whether the head may add its gradient to Megatron's buffer itself, which saves a copy of it in each microbatch.

    The head adds during its forward pass. The trainer runs a forward pass with gradients only to go back through it,
    and the head stands outside what is recomputed.
    """
    buffer = getattr(weight, "main_grad", None)
    return torch.is_grad_enabled() and weight.requires_grad and buffer is not None and buffer.dtype == torch.float32


class Qwen3Model(GPTModel):
    """GPTModel for packed sequences with explicit positions and the fused head.

    `forward(..., labels=HeadRequest)` on the last pipeline stage returns a `HeadResult`; earlier stages return
    hidden states as Megatron's schedules expect.
    """

    layer_kind: str
    finish_update: Callable[[], None] | None = None
    """Gathers what the last update left on other ranks; None where updates leave nothing behind."""
    ranges: StageRanges | None = None
    """Names layers and microbatches in profilers' timelines; None where no profiler is used."""

    def settle(self) -> None:
        """Make this rank's weights those of the last update before they are read (a collective, cheap if they are).

        Where weights are gathered while the next forward pass runs, an update alone leaves old ones behind.
        """
        if self.finish_update is not None:
            with cuda_means_cpu():
                self.finish_update()

    def sharded_state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        """Megatron's, of settled weights."""
        self.settle()
        shards: dict[str, Any] = super().sharded_state_dict(*args, **keywords)
        return shards

    def _preprocess(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        decoder_input: torch.Tensor | None = None,
        packed_seq_params: PackedLayout | None = None,
        **keywords: Any,
    ) -> tuple[Any, ...]:
        if packed_seq_params is None or packed_seq_params.qkv_format == "thd":
            prepared: tuple[Any, ...] = super()._preprocess(
                input_ids, position_ids, decoder_input, packed_seq_params=packed_seq_params, **keywords
            )
            return prepared
        # The local layers take one rotary angle per packed token, so no assumption about how context parallelism
        # cuts sequences is needed. Megatron's tuple: input, angles, and four that only inference and MoE use.
        assert packed_seq_params.position_ids is not None
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        rotary = self._rotary_angles(packed_seq_params.position_ids, packed_seq_params.max_seqlen_q)
        return (embedded, rotary, None, None, None, None)

    def _rotary_angles(self, position_ids: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        if isinstance(self.rotary_pos_emb, YarnRotaryEmbedding):
            # The second value scales cosine and sine; Megatron's attention reads it from the configuration.
            angles, _ = self.rotary_pos_emb.get_emb(max_seqlen)
            picked: torch.Tensor = angles.index_select(0, position_ids.to(angles.device))
            return picked
        return rotary_frequencies(self.rotary_pos_emb.inv_freq, position_ids)

    def _postprocess(
        self, hidden_states: torch.Tensor, labels: HeadRequest | None = None, **_: Any
    ) -> torch.Tensor | HeadResult:
        if not self.post_process:
            return hidden_states
        assert labels is not None, "the last pipeline stage needs a HeadRequest"
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        answer: HeadResult = self.output_layer(hidden_states, tied, labels)
        return answer


def rotary_frequencies(inv_freq: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Rotary angles of every packed token, [T, 1, 1, head_dim] float32; positions restart with each sequence.

    Args:
        inv_freq: float32 [head_dim / 2].
        position_ids: int64 [T].
    """
    angles = position_ids.to(inv_freq.device, torch.float32)[:, None] * inv_freq[None, :]
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def transformer_config(
    arch: Architecture,
    model: ModelSettings,
    parallel: ParallelSettings,
    *,
    yarn: Yarn | None = None,
    fp8: Fp8Settings | None = None,
) -> TransformerConfig:
    """Megatron's configuration for a Qwen3 architecture under a layout.

    The loss is a plain sum with global denominators folded in, hence `calculate_per_token_loss`: Megatron then
    neither divides by microbatches nor averages over data-parallel ranks.
    """
    on_gpu = torch.cuda.is_available()
    bf16 = model.dtype == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    te = pick_layer_spec(model) == "te"
    config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=arch.init_std,
        rotary_interleaved=False,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=parallel.pp > 1,
        moe_token_dispatcher_type="alltoall",  # no experts here, but Megatron wants it beside variable lengths
        batch_p2p_comm=on_gpu,
        calculate_per_token_loss=True,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not on_gpu,
        # Megatron asks for apex's kernel here even where only Transformer Engine's layers would accumulate.
        gradient_accumulation_fusion=te and _grad_accum_fusion_available,
        attention_backend=attention_backend(model),
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Megatron 0.16.1 drops YaRN's scale of cosine and sine in the fused kernel for packed sequences.
        apply_rope_fusion=on_gpu and te and yarn is None,
        attention_softmax_in_fp32=True,
        **_recompute(model.recompute, arch.num_layers, parallel.pp),
        **({} if fp8 is None else megatron_fp8_fields(fp8)),
    )
    config.klear_attention = model.attention
    if yarn is not None:
        _add_yarn(config, yarn)
    return config


def _add_yarn(config: TransformerConfig, yarn: Yarn) -> None:
    """What GPTModel and attention look up by these names when positions are embedded by YaRN (not fields in 0.16.1)."""
    config.yarn_rotary_scaling_factor = yarn.factor
    config.yarn_original_max_position_embeddings = yarn.original_positions
    config.yarn_beta_fast, config.yarn_beta_slow = 32.0, 1.0
    config.yarn_mscale = config.yarn_mscale_all_dim = None
    config.yarn_correction_range_round_to_int = True


def _recompute(setting: str, num_layers: int, pp: int) -> dict[str, Any]:
    if setting == "none":
        return {}
    if setting == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def build_qwen3(
    arch: Architecture,
    model: ModelSettings,
    parallel: ParallelSettings,
    context: ParallelContext,
    *,
    yarn: Yarn | None = None,
    fp8: Fp8Settings | None = None,
) -> Qwen3Model:
    """Build this rank's part of the model with random weights.

    Args:
        arch: sizes of the model.
        model: data type, layer spec, attention backend, recomputation.
        parallel: layout.
        context: this rank's place in it.
        yarn: scaled rotary embedding; None for the plain one.
        fp8: matrix products in FP8; None for none.

    Raises:
        ConfigError: Transformer Engine or FP8 was asked for and this machine does not have it.
    """
    problems = [] if fp8 is None else fp8_problems(fp8, context.device)
    if problems:
        raise ConfigError(problems)
    config = transformer_config(arch, model, parallel, yarn=yarn, fp8=fp8)
    kind = pick_layer_spec(model)
    with cuda_means_cpu():
        qwen3 = Qwen3Model(
            config=config,
            transformer_layer_spec=block_spec(config, kind),
            vocab_size=padded_vocab_size(arch.vocab_size, model.vocab_multiple),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=context.pp.rank == 0,
            post_process=context.pp.rank == context.pp.size - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tie_embeddings,
            position_embedding_type="rope" if yarn is None else "yarn",
            rotary_base=arch.rope_theta,  # hinted int by Megatron, which would cut off fractions
        )
    qwen3.layer_kind = kind
    if qwen3.post_process:
        FusedHead.adopt(qwen3.output_layer, arch.vocab_size)
    if torch.cuda.is_available():
        qwen3.to(context.device)
    return qwen3


def forward_microbatch(
    model: Callable[..., Any], request: HeadRequest, context: ParallelContext, *, transformer_engine: bool
) -> torch.Tensor | HeadResult:
    """Run one packed microbatch through this pipeline stage.

    Args:
        model: the stage, possibly wrapped for data parallelism.
        request: the microbatch and what to compute of it.
        context: the layout.
        transformer_engine: whether the stage was built with Transformer Engine's layers.
    """
    batch = request.batch
    layout = packed_layout(batch, context.cp, transformer_engine=transformer_engine)
    answer: torch.Tensor | HeadResult = model(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,
        packed_seq_params=layout,
        labels=request,
    )
    return answer
