"""How a model is sharded over ranks: layouts, device meshes, FSDP2, tensor and sequence parallelism."""
