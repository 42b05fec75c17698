"""Frozen cases on disk, for those who test without Python: `refspan vectors OUT`.

vector    one case: what is asked, what is right, how far from it is still right, and why it is there; an attention step
program_vector, program_json   the same of calls of a whole model, and these as JSON
onnx_layout                    an attention step as the backend tests of ONNX have it
folder    a folder of them: what is where, and writing it
reading   reading one that somebody else may have made, with suspicion
lint      what is wrong with one (`refspan vectors --lint DIR`)
disk      its files, none of which is believed to be where, what or as large as it should
work      how much a case may ask for
replay    asking a backend (`refspan check --vectors DIR`)
frozen    the cases that ship with the package
"""
