"""BDH's layers by Triton kernels: everything between two products is done in a product's epilogue.

`kernels` and what imports it need Triton, which is optional: import them only where it is used.
"""
