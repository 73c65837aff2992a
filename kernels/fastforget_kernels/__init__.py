"""Triton kernels of fastforget: one module an operation. Needs torch and triton only.

A launcher writes into tensors that its caller allocated and checks nothing: checks, dispatch and autograd are in
`fastforget.ops`.
"""
