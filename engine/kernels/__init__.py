"""GPU kernels in Triton, each with a torch reference of the same meaning.

Operations with several kernels, chosen in :mod:`engine.kernels.dispatch`; the first condition that holds
decides::

    operation         kernel                      condition                           file
    decode_attention  decode_attention_reference  not Triton                          decode_attention.py
                      decode_attention_gluon      Hopper, 16-bit, KV cache in fp8 of  fp8_attention.py
                                                  heads of 64 or 128, at most sixteen
                                                  query heads share one
                      decode_attention_triton     otherwise                           decode_attention.py
    paged_attention   paged_attention_reference   not Triton                          paged_attention.py
                      prefill_attention_gluon     Hopper, 16-bit, no window or cap,   prefill_attention.py
                                                  causal, blocks without other
                                                  layers' keys between,
                                                  a sequence with over 256 new
                                                  tokens (512 or 1024 where rows
                                                  are many), KV cache in the
                                                  model's dtype
                      single_attention_gluon      several sequences, causal, KV cache  fp8_attention.py
                      of those with one new       as for decode_attention_gluon
                      token
                      paged_attention_triton      otherwise                           paged_attention.py
    vision_attention  vision_attention_reference  not Triton                          vision_attention.py
                      image_attention_gluon       Hopper, 16-bit, heads of 64, 80 or  image_attention.py
                                                  128, segments whose tiles keep
                                                  the SMs busy
                      vision_attention_triton     otherwise                           vision_attention.py
    delta_rule        delta_rule_reference        not Triton                          delta_rule.py
                      delta_step_triton           one new token of each sequence      delta_rule.py
                      delta_prefill_triton        otherwise; its scan is in Gluon on  delta_prefill.py
                                                  Hopper with 16-bit heads of 128
    linear, 4 bits    int4_mma_ring_gluon         Triton, Hopper, at most 4 rows, or  int4_mma_ring.py
                                                  8 of over 32768 outputs, 16-bit,
                                                  128·n inputs, integers with scales
                                                  of 16 bits for 128·n inputs
                      int4_wgmma_gluon            the same, up to 256 rows            int4_wgmma.py
                      int4_mma_gluon              Triton, Hopper, at most 16 rows,    int4_mma.py
                                                  16-bit, 128·n inputs
                      int4_gemv_triton            Triton, 1 row                       int4_gemv.py
                      int4_gemm_triton            Triton, 2 to 128 rows, 16-bit       int4_gemm.py
                      dequantise_int4, F.linear   otherwise                           int4.py
    linear, gated     wide_gemm_gluon             Hopper, over 288 rows of 16 bits,   wide_gemm.py
                                                  over 352 for large weights, or
                                                  over 256 rounded rows of at most
                                                  8192 inputs
    linear            fp8_mma_gluon               Triton, 1 row, 64·n inputs, large   fp8_mma.py
                      of rounded rows             weight in fp8 made for fp8 inputs,
                                                  Hopper, one scale an output; up to
                                                  4096 inputs it rounds the row itself
                      tile_gemm_gluon             the same, 17 to 64 rows, 2048 to    ring_gemm.py
                      of rounded rows             8192 inputs, as many tiles of 64
                                                  outputs as SMs or up to half fewer,
                                                  no split-K
                      skinny_gemm_triton          the same, 1 to 64 rows; 2 or more   skinny_gemm.py
                      of rounded rows             of any size
                      even_gemm_gluon             the same, no gate, where tiles of   even_gemm.py
                      of rounded rows             64 or 144 outputs give each SM one,
                                                  and those of 128 leave SMs idle
                      scaled_gemm                 the same, otherwise                 fp8.py, cublaslt.py
                      gemv_triton                 Triton, 1 row                       gemv.py
                      ring_shares_gluon           Hopper, 16-bit, 17 to 64 rows, no   ring_shares.py
                                                  bias, 2048 inputs or more, 80 to
                                                  144 outputs an SM; also gated,
                                                  then 160 to 288, too
                      skinny_gemm_triton          Triton, 2 to 64 rows, 16-bit, at    skinny_gemm.py
                                                  most 65536 outputs, 16·n inputs if
                                                  not fp8
                      F.linear                    not fp8                             (torch)
                      dequantised_gemm            otherwise                           fp8.py
    split_linear      ring_gemm_gluon             Hopper, 2 to 64 rows of 16 bits     ring_gemm.py
                                                  and 1024 inputs or more, or 2 to
                                                  256 rounded rows of 8192 or more
                      skinny_gemm_triton          as in linear, not added up          skinny_gemm.py
                      linear                      otherwise                           dispatch.py
    norm_linear       norm_gemv_triton            Triton, 1 row, not 4 bits, not fp8  norm_gemv.py
                                                  made for fp8 inputs
                      a norm, then linear         otherwise                           dispatch.py
    sum_linear        gemv_sum_triton             Triton, 1 row, 16-bit, not 4 bits,  gemv.py
    over ranks                                    ranks that share memory
                      linear, then a sum          otherwise                           dispatch.py
    activated_linear  linear, then the activation  fp8                                dispatch.py
                      gemm_activation_triton      Triton, Hopper, 16-bit, tiles fill  gemm_activation.py
                                                  the GPU
                      gemm_activation_reference   otherwise                           gemm_activation.py
    experts           experts_reference           not Triton                          experts.py
                      int4_expert_gemv_triton     4 bits, few tokens as below         int4_experts.py
                      int4_grouped_gemm_triton    4 bits, otherwise                   int4_experts.py
                      expert_gemv_triton          1 token, or at most 4 with at most  expert_gemv.py
                                                  half as many pairs as experts, no
                                                  factors of experts
                      grouped_experts_gluon       Hopper, steps of 64 inputs; 16-bit  expert_gemm.py
                                                  and over 16 pairs an expert, or fp8
                                                  made for fp8 inputs, one scale an
                                                  output or a block of 128 by 128
                      grouped_experts_triton      otherwise                           grouped_gemm.py

"4 bits" are integers (int4) and floats (mxfp4, nvfp4). "Triton" means :func:`engine.kernels.device.use_triton`: the tensors are on a GPU; with fp8 weights also that
the GPU can read them (:func:`engine.kernels.fp8.reads_fp8`).

Operations with one kernel choose between it and the reference by ``use_triton`` themselves. Their files:
act_mul.py (act_mul, act_rounded), causal_conv.py (causal_conv, gated_conv), decode_state.py (gather_decode_inputs, advance, write_changes), fp8.py (dequantise, quantise_rows),
gated_norm.py, grid_attention.py, gumbel.py (gumbel_argmax, argmax), int4.py (dequantise_int4), kv_write.py, layer_norm.py (add_layer_norm, layer_norm_rounded), norm_router.py, patchify.py, quick_gelu.py, rms_norm.py (rms_norm, rms_norm_rounded, head_norms), rotary.py, route.py (the choice of experts), router_logits.py, shard_rows.py (rows of a table split over ranks), sigmoid_gate.py, step_inputs.py (inputs of steps with prompt chunks), truncation.py.

peer_reduce.py sums over the GPUs of a host and gathers from them; :class:`engine.distributed.group.TorchGroup` chooses between it and NCCL.

Shared by kernels: activation.py (inside kernels), delta_scan.py and delta_tiles.py (parts of delta_prefill.py), device.py (SMs, memory, capability), expert_groups.py
(sorts pairs of tokens and experts, adds up their results), image_plan.py (how the programs of image_attention.py share the work), int4_unpack.py (unpacks weights in 4 bits), launch.py (launch or compile), paged.py (KV cache, batch, online softmax), pdl.py (programmatic dependent launch),
recurrent_state.py (states of gated delta nets and convolutions), registers.py (layouts in registers, for Gluon), ring.py (buffers in shared memory, for Gluon), router_config.py (of a router of experts), scales.py (of fp8 weights), shares.py (equal shares of steps for programs, for Gluon), split_sums.py (results that a norm finishes), tile.py (attention tiles).
"""
