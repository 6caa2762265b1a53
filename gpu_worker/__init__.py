"""The GPU worker: feed-forward neurons in slots of device memory, on CUDA or on an emulated host device."""
