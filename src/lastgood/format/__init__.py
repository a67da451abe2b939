"""The file format: PyTorch's zip, laid out so that every byte of it can be predicted. See docs/format.md.

Nothing here imports torch or touches storage; these modules turn descriptions into bytes and back.
"""
