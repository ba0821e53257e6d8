"""The C source of the CPU library, and what compiles it: see cpu_library.py for how it is called."""
