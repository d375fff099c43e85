"""A claims file that is right, for tests to spoil."""

from __future__ import annotations

PAPER = """[paper]
key = "toy"
title = "A toy"
authors = "Nobody"
year = 2020
arxiv = "2001.00001"
bibtex = '''
@article{toy,
  id = {not a key of a claim},
}
'''
"""


CLAIM = """
[[claim]]
id = "T1"
place = "Tab 1"
says = "it is one"
kind = "number"
quantity = "the number"
unit = "nats"
published = 1.0
source_quality = "R"
relation = "within"
tolerance = 0.1
tolerance_why = "a tenth"
profile = "standard"
measure = "digits/vae/nll"
"""
