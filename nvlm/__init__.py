"""What NVLM-D is: configuration, tensor names, number formats, files and modules.

Both `build` (makes artefacts) and `runtime` (runs them) import this package; it imports nothing
of ours. It knows no scheduling; what the entry scripts share is in command_line.py.
"""

__version__ = "0.1.0"
