"""The operators of dfqvit, usable alone: each is one folder with its public function, its reference and its backends.

    fake_quantize              quantize and dequantize, straight-through gradient
    layer_norm_quantize        LayerNorm and quantization in one pass
    gate_quantize              activation(gate) * value as integers, of SwiGLU and its kin
    quant_attention            attention on integers, of whole images or of windows
    quant_linear               integer matrix product; bias, ACM, activation, residual, requantization in the epilogue
    quant_block                a transformer block of these three in one call
    quant_conv_block           a ConvNeXt block: depthwise convolution, LayerNorm, integer MLP, in one call
    quantize_heads             Q, K and V as integers for the attention, rotated on the way
    patch_similarity_entropy   the entropy of patch similarities that drives synthesis
    similarity_range           the range that its density is taken over, for batches processed in parts
    roll_resize                crop, resize, flip and roll of images as one interpolation
    round_second_order         weights rounded together, so that they keep a layer's outputs
    total_variation            of images, without temporaries
    pack_weight, unpack_weight weights of 2 to 8 bits, packed
    block_weight               packed weights in the order that the CPU kernels read
    weight_sums                sums of packed weights' rows, for GPUs

This package never imports the method (`dfqvit.synthesis`, ...) and never imports timm.
"""

# With a clone's root on sys.path this folder can be found as `kernels`, the name of a package of Hugging Face that transformers
# looks for. It is not that package: by that name it is empty, and registers nothing a second time.
if __name__ != "kernels":
    from .dispatch import BackendError, BackendFallbackWarning, backends, set_backend, use_backend
    from .fake_quantize import fake_quantize
    from .gate_quantize import gate_quantize
    from .layer_norm_quantize import layer_norm_quantize
    from .pack_weight import pack_weight, unpack_weight
    from .patch_similarity_entropy import patch_similarity_entropy, similarity_range
    from .quant_attention import quant_attention
    from .quant_block import quant_block
    from .quant_conv_block import quant_conv_block
    from .quant_linear import block_weight, quant_linear, weight_sums
    from .quantize_heads import quantize_heads
    from .roll_resize import roll_resize
    from .round_second_order import round_second_order
    from .total_variation import total_variation

    __all__ = [
        "BackendError",
        "BackendFallbackWarning",
        "backends",
        "block_weight",
        "fake_quantize",
        "gate_quantize",
        "layer_norm_quantize",
        "pack_weight",
        "patch_similarity_entropy",
        "quant_attention",
        "quant_block",
        "quant_conv_block",
        "quant_linear",
        "quantize_heads",
        "roll_resize",
        "round_second_order",
        "set_backend",
        "similarity_range",
        "total_variation",
        "unpack_weight",
        "use_backend",
        "weight_sums",
    ]
