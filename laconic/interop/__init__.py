"""Formats of other programs, both ways: their bytes become our packed matrices with the same values, and back.

- `matrix`: one quantized matrix in our numbers, which every format reads into and writes from.
- `ggml_blocks`, `gguf_file`, `gguf`: llama.cpp's block types, its files, and the models in them.
- `checkpoints`: folders of Hugging Face whose config says that they are quantized: `compressed_tensors`, `gptq`, `awq`,
  `bitsandbytes`.
- `graphs`: ONNX, for ONNX Runtime and OpenVINO, and `torch.export`.

Nothing here opens a model: `laconic.pipeline.source_quantized` and `laconic.pipeline.export` do.
"""
