"""One file here is one method; the file's name is the method's name; this folder is the registry.

A method file has a docstring that cites its paper and a function ``method(*, option=default, ...)``
that returns a ``rolora.algorithm.method.Method``. Its options become the keys of ``[method]``.
"""
