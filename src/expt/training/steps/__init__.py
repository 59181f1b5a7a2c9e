"""How optimizer steps are executed: eagerly, compiled, or as a captured CUDA graph."""
