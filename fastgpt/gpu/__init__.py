"""What the compiled CUDA and Triton kernels are made of, judged without a GPU: resources, instructions, predictions.

``tools`` finds NVIDIA's programs, ``code`` reads kernels out of a build, ``occupancy`` says how many blocks an SM
holds, ``budget`` holds kernels to a budget file, ``diagnosis`` shows the source lines behind a violation, and
``predictions`` computes the time that no kernel can beat. ``catalogue`` calls every operator, and ``triton_build``
compiles the Triton kernels that those calls need.
"""
