"""Host side of FieldViT: models, data, training, quantization, continual learning, fleet and command line."""
