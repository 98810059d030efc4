"""The algorithms: values and pure functions, on torch alone (and safetensors for bytes)."""
