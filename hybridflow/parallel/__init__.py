"""How a model is cut over ranks: layouts, device meshes, FSDP2, tensor and sequence parallelism."""
