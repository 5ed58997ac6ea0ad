"""What the compiled CUDA kernels are made of, judged without a GPU: resources, instructions, budgets, predictions.

``tools`` finds NVIDIA's programs, ``code`` reads kernels out of a build, ``occupancy`` says how many blocks an SM
holds, ``budget`` holds kernels to csrc/cuda/budget.toml, ``diagnosis`` shows the source lines behind a violation, and
``predictions`` computes the time that no kernel can beat.
"""
