"""The real vLLM engine with this library as its attention backend, against transformers. `make test-vllm` runs it."""
