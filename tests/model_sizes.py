"""Sizes of models that plans are made for."""

from __future__ import annotations

from hybridflow.planner.sizes import ModelSize

SMOL = ModelSize(  # SmolLM2-135M
    parameters=134_515_008,
    trained_parameters=134_515_008,
    output_parameters=0,
    layer_parameters=3_540_096,
    layers_parameters=30 * 3_540_096,
    num_layers=30,
    hidden=576,
    attention=576,
    key_value=192,
    feed_forward=1536,
    vocabulary=49152,
)
HALF_BILLION = ModelSize(  # Qwen2.5-0.5B
    parameters=494_032_768,
    trained_parameters=494_032_768,
    output_parameters=0,
    layer_parameters=14_912_384,
    layers_parameters=24 * 14_912_384,
    num_layers=24,
    hidden=896,
    attention=896,
    key_value=128,
    feed_forward=4864,
    vocabulary=151936,
)
SEVEN_BILLION = ModelSize(  # Qwen2.5-7B
    parameters=7_615_616_512,
    trained_parameters=7_615_616_512,
    output_parameters=544_997_376,
    layer_parameters=233_057_792,
    layers_parameters=6_525_618_176,
    num_layers=28,
    hidden=3584,
    attention=3584,
    key_value=512,
    feed_forward=18944,
    vocabulary=152064,
)
