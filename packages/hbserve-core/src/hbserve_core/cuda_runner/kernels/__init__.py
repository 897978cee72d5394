"""Triton kernels of the CUDA engine. They need no compiler but Triton's own, which comes with torch.

Each kernel stands above the function that launches it. All of them also run in Triton's interpreter
(TRITON_INTERPRET=1), where the tests compare them with plain torch on a CPU. Sizes that are no powers of two are padded
and masked: head sizes of 80 and 96 and 9 query heads over 3 are ordinary.
"""
