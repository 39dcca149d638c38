"""SGLang on a CUDA device that is the CPU: its own code for CUDA, with what only a GPU can run replaced.

Real are SGLang's resolution of flags for CUDA, its scheduler, pools, prefix cache, speculation, graph runners and
attention in Triton, our model and our kernels; all code in Triton is interpreted. Emulated are the device (``cuda``),
the CUDA graphs, by records of what was captured (``graphs``), and what SGLang has in CUDA C++ (``kernels``). Nothing
runs at the same time as anything else here, memory is not used again, and time means nothing.
"""
