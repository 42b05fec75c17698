"""Frozen cases on disk, for those who test without Python: `refspan vectors OUT`.

vector    one case: what is asked, what is right, how far from it is still right, and why it is there
folder    a folder of them: written, read with suspicion, checked (`refspan vectors --lint DIR`)
replay    asking a backend (`refspan check --vectors DIR`)
frozen    the cases that ship with the package
"""
