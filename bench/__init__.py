"""Benchmarks, a subject a folder; run from the folder above, as `python -m bench.attention.plot`.

attention/, reparam/, models/ and static/ (what is counted and compiled, not run) stand on harness/, which knows none of
them. paper/ reproduces papers; its commands may also be run by their paths, as `python bench/paper/nlg.py`.
"""
