"""Lossless codings of integers, without a loop over entries in either direction.

`bits` packs numbers of one width, `radix` digits of a base that is no power of two, `rice` and
`omega` numbers that are mostly small. `sets` and `levels` choose the shortest for sets of indices
and for quantised vectors.
"""
