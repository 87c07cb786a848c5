"""GGUF, llama.cpp's file format: export of a checkpoint, and reading one back. Needs the package gguf."""
