"""Decoder architectures as ONNX graphs: a module for each, named as ``model_type`` in config.json."""
